"""Choose the tiles that each block of a kernel visits, from the indices and from the summary of the call's mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attnfx.ir.expr import Expr
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host.launch import Launch
from attnfx.kernels.flash.host.ranges import along_keys, along_rows, gap, lists_on_device, on_device, states_on_device
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.kernels.flash.triton.mask_summary import lists_kernel
from attnfx.mask import key_span
from attnfx.mask import runtime_summary as summary


@dataclass(frozen=True)
class Walks:
    """The walks of a kernel's blocks.

    walks, order  the kernel's arguments, as `functions.walk` and `functions.tile_at` take them
    before        launches that must run first
    """

    walks: tuple[object, ...] | None = None
    order: tuple[object, ...] | None = None
    before: tuple[Launch, ...] = ()


def walks_of(call: Call, keep: Expr | None, tile: Tile, by_row: bool, spans: bool = False) -> Walks:
    """Return the walks of a kernel that owns blocks of rows and visits keys (`by_row`), or the other way around. `keep`
    is the mask, or None.

    With `spans`, return start and end of the range that contains the live tiles, not lists of them.
    """
    own, step = (tile.rows, tile.keys) if by_row else (tile.keys, tile.rows)
    found, device = _summary(call), call.query.device
    along = along_keys if by_row else along_rows
    if found is not None:
        path = along(found.fixed, call.sizes, own, step)
        fixed = dict(fixed=on_device(path, device), table=states_on_device(path, device), span=None)
        return _listed(call, found, own, step, by_row, spans, fixed)
    if keep is None:
        return Walks()
    path = along(keep, call.sizes, own, step)
    if path.states is None or spans:
        return Walks((on_device(path, device), 1, 1))
    ends, order = lists_on_device(path, device)
    return Walks((ends, 1, 1), (order, 2 * order.shape[1] + 1))


@dataclass(frozen=True)
class Splits:
    """The keys that the splits of a decode kernel divide among them.

    first, end  the range of keys that some row may see; first is a multiple of the tile's keys
    gap         the range [first, end) of whole tiles in between that no row sees; None if the mask never has one
    listed      the list of tiles to divide instead, if any
    """

    first: int
    end: int
    gap: tuple[int, int] | None = None
    listed: Walks = Walks()


def over_splits(call: Call, keep: Expr | None, tile: Tile, certain: bool) -> Splits:
    """Return the keys to divide for a kernel that has all rows in one block. With `certain`, skip keys only if each row
    is known to have a live key: a row without one depends on masked keys."""
    sizes, found = call.sizes, _summary(call)
    if found is not None:
        per_group = sizes["H"] // call.key.shape[1] if "h" in summary.axes(found.spec) else 1
        block = -(-sizes["T"] // summary.GRAIN) * summary.GRAIN  # all rows, and all heads of a group
        path = along_keys(found.fixed, sizes, block, tile.keys)
        empty = gap(found.fixed, sizes, tile.keys) or (0, 0)
        fixed = dict(fixed=None, table=None, span=tuple(2 * n + 1 for n in (*path.walks[0].tolist(), *empty)))
        listed = _listed(call, found, block, tile.keys, True, False, fixed, certain, per_group)
        return Splits(0, sizes["S"], None, listed)
    if certain or keep is None:
        return Splits(0, sizes["S"])
    first, end = key_span(keep, sizes)
    first, empty = first // tile.keys * tile.keys, gap(keep, sizes, tile.keys)
    if empty is None:
        return Splits(first, end)
    low, high = max(empty[0], first), min(empty[1], -(-end // tile.keys) * tile.keys)
    if low >= high:
        return Splits(first, end, (0, 0))
    if low == first:
        return Splits(min(high, end), end, (0, 0))
    return Splits(first, end, (low, high)) if high < end else Splits(first, low, (0, 0))


def _summary(call: Call) -> summary.Summary | None:
    return None if call.summary is None else summary.of(call.spec)


def _listed(
    call: Call, found: summary.Summary, own: int, step: int, by_row: bool, spans: bool, fixed: Mapping[str, object],
    certain: bool = False, per_group: int = 1,
) -> Walks:  # fmt: skip
    """Return the walks from a call's summary, one per `per_group` heads. `fixed` are the arguments of `lists_kernel`
    for the part of the mask that the indices decide."""
    sizes, device, states = call.sizes, call.query.device, call.summary
    assert states is not None
    size, other = ("T", "S") if by_row else ("S", "T")
    batches, heads, grains_t, grains_s = states.shape
    lists = heads // per_group
    blocks, count = -(-sizes[size] // own), -(-sizes[other] // step)
    ends = torch.empty((batches, lists, blocks, 4), dtype=torch.int32, device=device)
    order = None if spans else torch.empty((batches, lists, blocks, count), dtype=torch.int32, device=device)
    counts = (grains_t, grains_s, grains_s, 1) if by_row else (grains_s, grains_t, 1, grains_s)
    made = Launch(
        lists_kernel,
        (blocks, lists, batches),
        dict(
            states=states, ends=ends, order=order, **fixed,
            sizes=tuple(2 * n + 1 for n in (*counts, count, sizes[other])),
        ),
        dict(
            OWN=own, STEP=step, GRAIN=summary.GRAIN, TILES=1 << (count - 1).bit_length(), SURE=certain,
            PER_GROUP=per_group,
        ),
        Tile(1, 0, 4, 1),
    )  # fmt: skip
    free = summary.axes(found.spec)
    distances = lists * blocks if "b" in free else 0, blocks if "h" in free else 0
    walks = (ends, *(2 * n + 1 for n in distances))
    return Walks(walks, None if spans else (order, 2 * count + 1), (made,))
