"""The flash and the decode tier as the operator calls them. Triton is imported when one is asked, not before.

Where no kernel compiles or fits the device, the call runs in blocks of PyTorch's operators; reports say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from attnfx.kernels.call import Call
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.kernels.gpu import capability
from attnfx.spec import AttentionSpec

LEAST_CAPABILITY = 80  # asynchronous copies and bfloat16
MOST_PROGRAMS = 65535  # of a grid's second and third dim (CUDA programming guide): heads and batches


def missing(device: torch.device, target: int | None = None) -> str | None:
    """What the machine lacks; with `target`, what a GPU of that compute capability lacks."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        from triton import knobs

        return None if knobs.runtime.interpret else "Triton cannot compile for the CPU, which holds the tensors"
    if device.type != "cuda" or (target is None and torch.version.hip is not None):
        return f"the kernels need an NVIDIA GPU, and the tensors are on {device}"
    if target is not None or torch.cuda.is_available():
        found = capability(device) if target is None else target
        if found < LEAST_CAPABILITY:
            return f"the kernels need compute capability 8.0, and the GPU has {found // 10}.{found % 10}"
    return None


def beyond(batches: int, heads: int) -> str | None:
    """Why no kernel has a program for each batch and head, or None."""
    for name, number in (("batches", batches), ("heads", heads)):
        if number > MOST_PROGRAMS:
            return f"the attention has {number} {name}, and a kernel launch takes at most {MOST_PROGRAMS}"
    return None


def expresses(
    spec: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    value_width: int,
    target: int | None = None,
) -> str | None:
    """Why the flash and decode tiers run no such calls, one sentence, or None; with `target`, on a GPU of that compute
    capability."""
    if (why := missing(device, target)) is not None:
        return why
    from attnfx.kernels.flash.host import forward as launch

    return launch.expresses(spec, dtype, head_dim, value_width)


def source(spec: AttentionSpec) -> str:
    """The Triton functions that are generated for a spec. Raises as `launch.functions` does."""
    from attnfx.kernels.flash.codegen.emit import emit
    from attnfx.kernels.flash.host import forward as launch

    return emit(spec, launch.program(spec)).text


def summarise(captures: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    """The summary of a mask, as `attnfx.mask.runtime_summary` has it, of one of its specs."""
    from attnfx.kernels.flash.host import mask_summary as kernels

    return kernels.summarise(captures, sizes, spec)


def supports(call: Call) -> str | None:
    """Why the flash tier cannot run the call, one sentence, or None."""
    if (why := missing(call.query.device) or beyond(*call.query.shape[:2])) is not None:
        return why
    from attnfx.kernels.flash.host import forward as launch

    return launch.supports(call)


def forward(call: Call, tile: Tile | None = None, splits: int = 0) -> tuple[Tensor, Tensor]:
    """out (B, H, T, Dv) in the spec's dtype, logsumexp (B, H, T) in float32 (natural; zeros without a softmax).

    `tile` is tried before those of the table.
    """
    from attnfx.kernels.flash.host import blocks
    from attnfx.kernels.flash.host import forward as launch
    from attnfx.kernels.flash.host.fallback import CannotLaunch

    try:
        return launch.forward(call, chosen=tile)
    except CannotLaunch:
        return blocks.forward(call)


def backward(
    call: Call, grad_out: Tensor, out: Tensor, logsumexp: Tensor, grad_logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of query, key, value, and of the captures whose `grad` is True, each of its tensor's dtype. What
    either tier's forward pass gave is taken."""
    from attnfx.kernels.flash.host import backward as gradients
    from attnfx.kernels.flash.host import blocks
    from attnfx.kernels.flash.host.fallback import CannotLaunch

    try:
        return gradients.backward(call, grad_out, out, logsumexp, grad_logsumexp=grad_logsumexp)
    except CannotLaunch:
        return blocks.backward(call, grad_out, out, logsumexp, grad_logsumexp)


def supports_decode(call: Call) -> str | None:
    """Why the decode tier cannot run the call, one sentence, or None."""
    if (why := missing(call.query.device) or beyond(*call.query.shape[:2])) is not None:
        return why
    from attnfx.kernels.flash.host import decode as split

    return split.supports(call)


def forward_decode(call: Call, tile: Tile | None = None, splits: int = 0) -> tuple[Tensor, Tensor]:
    """As `forward`, with the keys split among programs, into `splits` parts where that is not 0."""
    from attnfx.kernels.flash.host import decode as split
    from attnfx.kernels.flash.host.fallback import CannotLaunch

    try:
        return split.forward(call, chosen=tile, wanted=splits)
    except CannotLaunch:
        return forward(call)
