"""Which tiles a kernel visits, and in which of them no score is masked, as far as the indices alone decide.

A kernel owns a block of one index (rows, or keys in the pass for their gradients) and walks along the other. For each
block it is given four numbers [start, full_start, full_end, end], multiples of the step but for `end`: tiles outside
[start, end) hold no live score, tiles inside [full_start, full_end) no dead one and nothing out of bounds. Where empty
tiles lie between the live ones it is given the list of the live ones, as `summary.py` makes it for tensors.
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
from attnfx.mask import affine as P
from attnfx.mask import ranges_of
from attnfx.mask import tile_bounds as boxes
from attnfx.mask.row_intervals import spans
from attnfx.spec import I, J

SPARSE = 7 / 8  # of the tiles from the first live one to the last: a list of more saves less than its reading costs
LARGEST = 1 << 22  # tiles of a matrix that are looked at one by one


@dataclass(frozen=True, eq=False)
class Path:
    """walks   (blocks, 4)
    states  (blocks, tiles) of uint8 where empty tiles lie between a block's live ones, else None: LIVE of
            `attnfx.mask.tile_bounds` where a tile must be visited, DEAD where that must look at the mask or the bounds
    step    the length of a tile
    """

    walks: np.ndarray
    states: np.ndarray | None
    step: int

    def lists(self) -> tuple[np.ndarray, np.ndarray]:
        """(blocks, 4) [0, 0, full, live] and (blocks, most) the first index of `full` tiles, then of the others up to
        `live` in all; of a path with states."""
        assert self.states is not None
        live, full = self.states & boxes.LIVE != 0, self.states == boxes.LIVE
        count, zero = live.sum(1), np.zeros(len(live), np.int64)
        order = np.argsort(np.where(full, 0, np.where(live, 1, 2)), axis=1, kind="stable")
        return np.stack([zero, zero, full.sum(1), count], 1), order[:, : max(1, count.max())] * self.step


def along_keys(keep: Expr | None, sizes: Mapping[str, int], block: int, step: int) -> Path:
    """For each block of `block` rows, the path along the keys in steps of `step`."""
    return _path(keep or A.TRUE, tuple(sorted(sizes.items())), block, step)


def along_rows(keep: Expr | None, sizes: Mapping[str, int], block: int, step: int) -> Path:
    """For each block of `block` keys, the path along the rows in steps of `step`."""
    turned = substitute(keep or A.TRUE, {I: J, J: I, A.size("T"): A.size("S"), A.size("S"): A.size("T")})
    # the extents of i and j are T and S by name, so both change places; T and S in the mask itself do as well
    return _path(turned, tuple(sorted({**sizes, "T": sizes["S"], "S": sizes["T"]}.items())), block, step)


@lru_cache(maxsize=512)
def _path(keep: Expr, items: tuple[tuple[str, int], ...], block: int, step: int) -> Path:
    sizes = dict(items)
    last = sizes["S"]
    keep = P.numeric(keep, sizes)
    # a score program with this mask: `key_ranges` takes what it masks from there
    found = ranges_of(keep, sizes, block)
    begin, end, whole = (np.array(x) for x in zip(*((r.j0, r.j1, r.full) for r in found)))
    start = begin // step * step
    known, count = spans(keep, keep, items, block), -(-last // step)
    small = len(found) * count <= LARGEST
    visited = int((-(-end // step) - start // step).sum())
    states = None
    if small and (not known.exact or known.tiles(block, step, False) <= SPARSE * visited):
        tiles = np.arange(count)[None, :] * step
        states = boxes.states(keep, sizes, block, step)
        states = np.where((tiles >= start[:, None]) & (tiles < end[:, None]), states, boxes.DEAD)
        states[:, last // step :] |= boxes.DEAD  # what reaches beyond the end
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
    """Of all rows together, the longest run [first, end) of keys in tiles without a live one, (0, 0) without such; None
    where the mask can have none at any length."""
    if keep is None or not any(e.op in ("or", "where", "not", "eq0", "mod", "floordiv") for e in walk(keep)):
        return None
    return _gap(P.numeric(keep, sizes), tuple(sorted(sizes.items())), step)


@lru_cache(maxsize=512)
def _gap(keep: Expr, items: tuple[tuple[str, int], ...], step: int) -> tuple[int, int]:
    sizes = dict(items)
    states = boxes.states(keep, sizes, max(1, sizes["T"]), step)
    first, end = _longest(states & boxes.LIVE == 0)
    return int(first[0]) * step, int(end[0]) * step


def _longest(marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[first, end) of the longest run of marked columns of each row, (0, 0) where there is none."""
    edges = np.diff(marked.astype(np.int8), axis=1, prepend=0, append=0)
    row, first = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    by_length = np.argsort(end - first, kind="stable")
    out = np.zeros((2, len(marked)), np.int64)
    out[:, row[by_length]] = first[by_length], end[by_length]  # of a row's runs the last, the longest, stays
    return out[0], out[1]


@lru_cache(maxsize=512)
def on_device(path: Path, device: torch.device) -> Tensor:
    """The walks as (blocks, 4) of int32. Kept: a captured CUDA graph may hold its address."""
    return _lasting(path.walks, torch.int32, device)


@lru_cache(maxsize=512)
def states_on_device(path: Path, device: torch.device) -> Tensor | None:
    """The states of a path's tiles, or None."""
    return None if path.states is None else _lasting(path.states, torch.uint8, device)


@lru_cache(maxsize=512)
def lists_on_device(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lists of a path with states, of int32."""
    ends, order = path.lists()
    return _lasting(ends, torch.int32, device), _lasting(order, torch.int32, device)


def _lasting(values: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    return lasting(lambda: torch.tensor(values, dtype=dtype, device=device), device)
