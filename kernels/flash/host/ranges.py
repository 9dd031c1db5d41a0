"""Find the tiles that a kernel visits, and the tiles that need no mask, as far as the indices alone decide.

A program owns a block of one index (rows, or keys in the pass for their gradients) and walks along the other. Each
block has four numbers [start, full_start, full_end, end], multiples of the step except `end`. Tiles outside
[start, end) are empty. Tiles inside [full_start, full_end) are fully live and in bounds. If empty tiles lie between
live ones, the block gets a list of the live tiles, as `lists_kernel` makes it for masks in tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import Expr, walk
from attnfx.kernels.gpu import lasting
from attnfx.mask import key_ranges
from attnfx.mask import tile_bounds as boxes
from attnfx.mask.predicate import analysis
from attnfx.mask.row_intervals import spans
from attnfx.spec import I, J

SPARSE = 7 / 8  # largest share of live tiles, from the first to the last, at which a list saves more than it costs
LARGEST = 1 << 22  # the most tiles of a matrix to examine one by one


@dataclass(frozen=True, eq=False)
class Path:
    """The tiles that each block visits.

    walks   (blocks, 4), the numbers [start, full_start, full_end, end]
    states  (blocks, tiles) of uint8 if empty tiles lie between a block's live ones, else None. Bits of
            `attnfx.mask.tile_bounds`: LIVE if the tile must be visited, DEAD if it must check the mask or the bounds
    step    the length of a tile
    """

    walks: np.ndarray
    states: np.ndarray | None
    step: int

    def lists(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lists of live tiles of a path with states. The first tensor (blocks, 4) has [0, 0, full, live].
        The second (blocks, most) has the first index of each live tile: first the `full` unmasked tiles, then the
        others, `live` in all."""
        assert self.states is not None
        live, full = self.states & boxes.LIVE != 0, self.states == boxes.LIVE
        count, zero = live.sum(1), np.zeros(len(live), np.int64)
        order = np.argsort(np.where(full, 0, np.where(live, 1, 2)), axis=1, kind="stable")
        return np.stack([zero, zero, full.sum(1), count], 1), order[:, : max(1, count.max())] * self.step


def along_rows(keep: Expr, sizes: Mapping[str, int], block: int, step: int) -> Path:
    """Return the path of each block of `block` keys along the rows, in steps of `step`."""
    turned = substitute(keep, {I: J, J: I, A.size("T"): A.size("S"), A.size("S"): A.size("T")})
    # i and j have the extents T and S by name, so swap these too, including T and S in the mask itself
    return along_keys(turned, {**sizes, "T": sizes["S"], "S": sizes["T"]}, block, step)


@analysis(maxsize=512)
def along_keys(_: Expr, keep: Expr, sizes: Mapping[str, int], block: int, step: int) -> Path:
    """Return the path of each block of `block` rows along the keys, in steps of `step`."""
    last = sizes["S"]
    # the live key range of each block
    found = key_ranges(keep, sizes, block)
    begin, end, whole = (np.array(x) for x in zip(*((r.j0, r.j1, r.full) for r in found)))
    start = begin // step * step
    known, count = spans(keep, keep, sizes, block), -(-last // step)
    small = len(found) * count <= LARGEST
    visited = int((-(-end // step) - start // step).sum())
    states = None
    if small and (not known.exact or known.tiles(block, step, False) <= SPARSE * visited):
        tiles = np.arange(count)[None, :] * step
        states = boxes.states(keep, sizes, block, step)
        states = np.where((tiles >= start[:, None]) & (tiles < end[:, None]), states, boxes.DEAD)
        states[:, last // step :] |= boxes.DEAD  # tiles that reach beyond the end
        low, high = (x * step for x in _longest(states == boxes.LIVE))
        if (states & boxes.LIVE).sum() > SPARSE * visited:
            states = None
    else:
        low, high = known.full(block)
    low, high = (np.where(whole, x, y) for x, y in ((begin, low), (end, high)))
    low, high = np.maximum(-(-low // step) * step, start), high // step * step
    low, high = (np.where(low < high, x, start) for x in (low, high))
    return Path(np.stack([start, low, high, end], 1), states, step)


def gap(keep: Expr | None, sizes: Mapping[str, int], step: int) -> tuple[int, int] | None:
    """Return the longest run [first, end) of keys in tiles that are empty for all rows, or (0, 0). Return None if the
    mask cannot have such a run at any length."""
    if keep is None or not any(e.op in ("or", "where", "not", "eq0", "mod", "floordiv") for e in walk(keep)):
        return None
    return _gap(keep, sizes, step)


@analysis(maxsize=512)
def _gap(_: Expr, keep: Expr, sizes: Mapping[str, int], step: int) -> tuple[int, int]:
    states = boxes.states(keep, sizes, max(1, sizes["T"]), step)
    first, end = _longest(states & boxes.LIVE == 0)
    return int(first[0]) * step, int(end[0]) * step


def _longest(marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return [first, end) of the longest run of marked columns in each row, (0, 0) for an unmarked row."""
    edges = np.diff(marked.astype(np.int8), axis=1, prepend=0, append=0)
    row, first = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    by_length = np.argsort(end - first, kind="stable")
    out = np.zeros((2, len(marked)), np.int64)
    out[:, row[by_length]] = first[by_length], end[by_length]  # a row's last assignment, its longest run, stays
    return out[0], out[1]


@lru_cache(maxsize=512)
def on_device(path: Path, device: torch.device) -> Tensor:
    """Return the walks as an int32 tensor (blocks, 4). Cached, because a captured CUDA graph may hold its address."""
    return _lasting(path.walks, torch.int32, device)


@lru_cache(maxsize=512)
def states_on_device(path: Path, device: torch.device) -> Tensor | None:
    """Return the states of a path's tiles as a tensor, or None."""
    return None if path.states is None else _lasting(path.states, torch.uint8, device)


@lru_cache(maxsize=512)
def lists_on_device(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the lists of a path with states as int32 tensors."""
    ends, order = path.lists()
    return _lasting(ends, torch.int32, device), _lasting(order, torch.int32, device)


def _lasting(values: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    return lasting(lambda: torch.tensor(values, dtype=dtype, device=device), device)
