"""How a kernel of a call walks over its tiles: by what the indices decide, and by the summary of its mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attnfx.ir.expr import Expr
from attnfx.kernels.call import Call
from attnfx.kernels.flash.launcher import Launch
from attnfx.kernels.flash.ranges import Walk, along_keys, along_rows, on_device
from attnfx.kernels.flash.summary import lists_kernel
from attnfx.kernels.flash.tiles import Tile
from attnfx.mask import key_span, summary


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


@dataclass(frozen=True)
class Splits:
    """What the splits of a decode kernel share.

    first, end  the keys from a multiple of the tile's to the last that some row may see
    listed      the tiles that they share instead; None where they share all of these keys
    """

    first: int
    end: int
    listed: Walks | None = None


def over_splits(call: Call, keep: Expr | None, tile: Tile, certain: bool) -> Splits:
    """For a kernel that has all rows in one block. With `certain`, because a row without a live key is made of the
    others, no key is left out unless each row certainly has a live one."""
    sizes, found = call.sizes, None if call.summary is None else summary.of(call.spec)
    if found is not None and ("h" not in summary.axes(found.spec) or call.key.shape[1] == sizes["H"]):
        block = -(-sizes["T"] // summary.GRAIN) * summary.GRAIN
        span = along_keys(found.fixed, sizes, block, tile.keys)[0]
        return Splits(0, sizes["S"], _listed(call, found, block, tile.keys, True, False, span, certain))
    if certain or keep is None:
        return Splits(0, sizes["S"])
    first, end = key_span(keep, sizes)
    return Splits(first // tile.keys * tile.keys, end)


def _walks(call: Call, keep: Expr | None, own: int, step: int, by_row: bool, spans: bool) -> Walks:
    found = None if call.summary is None else summary.of(call.spec)
    if found is not None:
        return _listed(call, found, own, step, by_row, spans)
    if keep is None:
        return Walks(_arguments(None, spans))
    along = along_keys if by_row else along_rows
    return Walks(_arguments((on_device(along(keep, call.sizes, own, step), call.query.device), 1, 1), spans))


def _listed(
    call: Call, found: summary.Summary, own: int, step: int, by_row: bool, spans: bool,
    span: Walk | None = None, certain: bool = False,
) -> Walks:  # fmt: skip
    """Walks by a call's summary; of a single block, `span` is the walk by the indices alone."""
    sizes, device, states = call.sizes, call.query.device, call.summary
    assert states is not None
    along, size, other = (along_keys, "T", "S") if by_row else (along_rows, "S", "T")
    batches, heads, grains_t, grains_s = states.shape
    blocks, count = -(-sizes[size] // own), -(-sizes[other] // step)
    ends = torch.empty((batches, heads, blocks, 4), dtype=torch.int32, device=device)
    order = None if spans else torch.empty((batches, heads, blocks, count), dtype=torch.int32, device=device)
    counts = (grains_t, grains_s, grains_s, 1) if by_row else (grains_s, grains_t, 1, grains_s)
    made = Launch(
        lists_kernel,
        (blocks, heads, batches),
        dict(
            states=states, ends=ends, order=order,
            fixed=None if span is not None else on_device(along(found.fixed, sizes, own, step), device),
            span=None if span is None else tuple(2 * n + 1 for n in span),
            sizes=tuple(2 * n + 1 for n in (*counts, count, sizes[other])),
        ),
        dict(OWN=own, STEP=step, GRAIN=summary.GRAIN, TILES=1 << (count - 1).bit_length(), SURE=certain),
        Tile(1, 0, 4, 1),
    )  # fmt: skip
    free = summary.axes(found.spec)
    distances = heads * blocks if "b" in free else 0, blocks if "h" in free else 0
    walks = (ends, *(2 * n + 1 for n in distances))
    return Walks(_arguments(walks, spans) | ({} if spans else dict(order=(order, 2 * count + 1))), (made,))


def _arguments(walks: object, spans: bool) -> dict[str, object]:
    return dict(walks=walks) if spans else dict(walks=walks, order=None)
