"""How a kernel of a call walks over its tiles: by what the indices decide, and by the summary of its mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attnfx.ir.expr import Expr
from attnfx.kernels.call import Call
from attnfx.kernels.flash.launcher import Launch
from attnfx.kernels.flash.ranges import along_keys, along_rows, on_device
from attnfx.kernels.flash.summary import lists_kernel
from attnfx.kernels.flash.tiles import Tile
from attnfx.mask import summary


@dataclass(frozen=True)
class Walks:
    """arguments  `walks` and `order` of a kernel, as `functions.walk_at` and `functions.tile_at` take them
    before     what must run first
    """

    arguments: Mapping[str, object]
    before: tuple[Launch, ...] = ()


def over_keys(call: Call, keep: Expr | None, tile: Tile, spans: bool = False) -> Walks:
    """For a kernel that owns blocks of rows and walks along the keys; `keep` is the mask, None where there is none.

    With `spans` there are no lists: start and end say between which tiles the live ones lie.
    """
    return _walks(call, keep, tile.rows, tile.keys, True, spans)


def over_rows(call: Call, keep: Expr | None, tile: Tile) -> Walks:
    """For a kernel that owns blocks of keys and walks along the rows."""
    return _walks(call, keep, tile.keys, tile.rows, False, False)


def _walks(call: Call, keep: Expr | None, own: int, step: int, by_row: bool, spans: bool) -> Walks:
    sizes, device, states = call.sizes, call.query.device, call.summary
    along, size, other = (along_keys, "T", "S") if by_row else (along_rows, "S", "T")
    found = None if states is None else summary.of(call.spec)
    if states is None or found is None:
        if keep is None:
            return Walks(_arguments(None, spans))
        return Walks(_arguments((on_device(along(keep, sizes, own, step), device), 1, 1), spans))
    batches, heads, grains_t, grains_s = states.shape
    blocks, count = -(-sizes[size] // own), -(-sizes[other] // step)
    ends = torch.empty((batches, heads, blocks, 4), dtype=torch.int32, device=device)
    order = None if spans else torch.empty((batches, heads, blocks, count), dtype=torch.int32, device=device)
    counts = (grains_t, grains_s, grains_s, 1) if by_row else (grains_s, grains_t, 1, grains_s)
    made = Launch(
        lists_kernel,
        (blocks, heads, batches),
        dict(
            states=states, fixed=on_device(along(found.fixed, sizes, own, step), device), ends=ends, order=order,
            sizes=tuple(2 * n + 1 for n in (*counts, count)),
        ),
        dict(OWN=own, STEP=step, GRAIN=summary.GRAIN, TILES=1 << (count - 1).bit_length()),
        Tile(1, 0, 4, 1),
    )  # fmt: skip
    free = summary.axes(found.spec)
    distances = heads * blocks if "b" in free else 0, blocks if "h" in free else 0
    walks = (ends, *(2 * n + 1 for n in distances))
    return Walks(_arguments(walks, spans) | ({} if spans else dict(order=(order, 2 * count + 1))), (made,))


def _arguments(walks: object, spans: bool) -> dict[str, object]:
    return dict(walks=walks) if spans else dict(walks=walks, order=None)
