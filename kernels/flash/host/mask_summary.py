"""Launch the kernel that summarizes a mask's tensors (see `attnfx.mask.runtime_summary`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx.kernels.call import Call
from attnfx.kernels.flash.host.fallback import CannotLaunch, first_that_runs
from attnfx.kernels.flash.host.forward import Arguments
from attnfx.kernels.flash.host.launch import Launch
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.kernels.flash.triton.mask_summary import summary_kernel
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AttentionSpec


def summarise(captures: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    """Compute the summary of `Summary.spec` over its captures: uint8, of `attnfx.mask.runtime_summary.shape`. `sizes`
    are B, H, T, S and the spec's own. If no kernel compiles, every grain counts as partial, which is always valid."""
    call = call_of(captures, sizes, spec)
    states = captures[0].new_empty(summary.shape(spec, call.sizes), dtype=torch.uint8)
    try:
        first_that_runs("summary", call, [Tile(0, 0, 4, 1)], lambda tile: launch(call, states, tile).run(states.device))
    except CannotLaunch:
        states.fill_(summary.LIVE | summary.DEAD)
    return states


def call_of(captures: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Call:
    """Create a call whose operands have only shapes: each is one expanded element."""
    batches, heads, rows, keys, *given = sizes
    one = captures[0].new_empty((), dtype=torch.float32)
    key = one.expand(batches, 1, keys, 1)
    return Call(spec, one.expand(batches, heads, rows, 1), key, key, captures, given)


def launch(call: Call, states: Tensor, tile: Tile) -> Launch:
    """Create the launch of the summary kernel, with the warps and stages of `tile`."""
    some, free = Arguments(call), summary.axes(call.spec)
    names = ("heads", "rows", "columns", "keep")
    batches, heads, *grains = states.shape
    by_row, by_column = "i" in free, "j" in free
    return Launch(
        summary_kernel,
        (math.prod(grains), heads, batches),
        dict(states=states, captures=some.captures, sizes=some.encoded),
        {name.upper(): some.functions[name] for name in names}
        | dict(
            SCORE=some.functions["score"] if summary.added(call.spec) is not None else None, SCALE=some.program.scale,
            BM=summary.GRAIN if by_row else 1, BN=summary.GRAIN if by_column else 1, BY_ROW=by_row, BY_COLUMN=by_column,
        ),
        tile,
    )  # fmt: skip
