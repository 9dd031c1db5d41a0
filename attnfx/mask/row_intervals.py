"""Represent masks by intervals of keys per row: causal, windows, prefixes, sinks, blocks, and their combinations.

In these masks, the live keys of a row are the union of a few intervals [low, high), and so are its dead keys. Arrays of
interval ends serve blocks and tiles of any size, and take a hundredth of the time of isl, which analyzes one size at a
time. For other masks (remainders of keys, differences by batch or head) the intervals are a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache

import numpy as np

from attnfx.ir.expr import Expr
from attnfx.mask import affine as P
from attnfx.mask.intervals import Intervals, intervals

GRAINS = (64, 32, 1)  # rows; a block is analyzed in parts of the largest that divides it
# A matrix of more than GROUPS groups of GROUP rows is sampled: only GROUPS groups are counted.
GROUP, GROUPS = 128, 256
GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are spread evenly, and do not align with a mask's period


class Spans:
    """The intervals of one mask, by blocks of `step` rows. `live` contains every score that may be live, `dead` every
    score that may be dead. If `exact`, they contain only these."""

    def __init__(self, live: Intervals, dead: Intervals, rows: int, keys: int, step: int, exact: bool) -> None:
        self.rows, self.keys, self.step, self.exact = rows, keys, step, exact
        self.share = 1.0  # groups of rows that each group represents, except the first and the last
        self._blocks = {step: (live, dead)}
        self._ends: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._sorted: dict[tuple[int, bool], Intervals] = {}

    def blocks(self, size: int) -> tuple[Intervals, Intervals]:
        """Return (live, dead) of each block of `size` rows, a multiple of the step."""
        if size not in self._blocks:
            starts = np.arange(0, -(-self.rows // self.step), size // self.step)
            live, dead = (
                Intervals(np.minimum.reduceat(x.low, starts, axis=1), np.maximum.reduceat(x.high, starts, axis=1))
                for x in self._blocks[self.step]
            )
            self._blocks[size] = live, dead
        return self._blocks[size]

    def ends(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (j0, j1) of each block of `size` rows, which sees only keys in [j0, j1); [0, 0) if it sees none."""
        if size not in self._ends:
            live, _ = self.blocks(size)
            low, high = live.low.min(0, initial=self.keys), live.high.max(0, initial=0)
            self._ends[size] = np.where(low < high, low, 0), high
        return self._ends[size]

    def ranges(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (j0, j1, full) of each block of `size` rows; if full, it sees all keys in [j0, j1)."""
        (low, high), (_, dead) = self.ends(size), self.blocks(size)
        holes = np.maximum(low, dead.low) < np.minimum(high, dead.high)
        return low, high, (low < high) & ~holes.any(0)

    def full(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return [low, high) of each block of `size` rows: the longest run of certainly live keys in its range."""
        first, last, _ = self.ranges(size)
        dead = self.blocks(size)[1]
        by_start = np.argsort(dead.low, axis=0)
        starts, ends = (np.take_along_axis(x, by_start, 0) for x in dead)
        low = np.concatenate([first[None], np.maximum(np.maximum.accumulate(ends, axis=0), first)])
        high = np.concatenate([np.minimum(starts, last), last[None]])
        longest = np.argmax(high - low, axis=0)[None]
        return np.take_along_axis(low, longest, 0)[0], np.take_along_axis(high, longest, 0)[0]

    def tiles(self, size: int, step: int, dead: bool) -> int:
        """Count the tiles of `size` rows by `step` keys with a possibly dead score or, without `dead`, a live one."""
        key = size, dead
        if key not in self._sorted:
            self._sorted[key] = _sorted(*self.blocks(size)[dead])
        low, high = self._sorted[key]
        return self.total(_covered(low // step, -(-high // step)), size)

    def total(self, counts: np.ndarray, size: int) -> int:
        """Sum the counts of all blocks of `size` rows, scaled up if the rows are a sample."""
        if self.share == 1.0:
            return int(counts.sum())
        ends = GROUP // size, -(-(self.rows % GROUP or GROUP) // size)
        outer = counts[: ends[0]].sum() + counts[-ends[1] :].sum()
        return round(float(outer + self.share * counts[ends[0] : -ends[1]].sum()))

    def sampled(self, size: int) -> Spans:
        """Return a sample of many rows: the first group, the last, and some between; of few rows, return all. A sample
        needs blocks of `size` rows that divide a group. Sums over its blocks are estimates, else exact."""
        groups = -(-self.rows // GROUP)
        return self if groups <= GROUPS or GROUP % size else self._sample

    @cached_property
    def _sample(self) -> Spans:
        groups, inner = -(-self.rows // GROUP), np.arange(GROUPS - 2)
        share = (groups - 2) / len(inner)
        between = 1 + ((inner + inner * GOLDEN % 1) * share).astype(np.int64)
        starts = np.concatenate([[0], between, [groups - 1]]) * (GROUP // self.step)
        columns = (starts[:, None] + np.arange(GROUP // self.step)).ravel()
        columns = columns[columns < -(-self.rows // self.step)]
        live, dead = (Intervals(x.low[:, columns], x.high[:, columns]) for x in self._blocks[self.step])
        rows = (GROUPS - 1) * GROUP + (self.rows % GROUP or GROUP)
        made = Spans(live, dead, rows, self.keys, self.step, False)
        made.share = share
        return made

    def touches(self, size: int, step: int, row: int, column: int) -> tuple[bool, bool]:
        """Return whether a tile of `size` rows by `step` keys has (a score that may be live, one that may be dead)."""
        low, high = column * step, (column + 1) * step
        live, dead = (bool(((x.low[:, row] < high) & (x.high[:, row] > low)).any()) for x in self.blocks(size))
        return live, dead

    @property
    def live(self) -> int:
        """Return how many (i, j) may be live; needs a step of one row."""
        return int(_covered(*_sorted(*self.blocks(1)[0])).sum())


def _sorted(low: np.ndarray, high: np.ndarray) -> Intervals:
    """Sort the starts and the ends of each row separately; an empty interval starts at its end."""
    low = np.minimum(low, high)
    return Intervals(low, high) if len(low) < 2 else Intervals(np.sort(low, axis=0), np.sort(high, axis=0))


def _covered(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Count the keys in the union of each row's intervals, given their sorted starts and ends. These are the keys from
    the first start to the last end, without the gaps. A gap begins once as many intervals have ended as started."""
    if not len(low):
        return np.zeros(low.shape[1], np.int64)
    whole = high[-1] - low[0]
    return whole if len(low) < 2 else whole - np.maximum(low[1:] - high[:-1], 0).sum(0)


def spans(seen: Expr, keep: Expr, sizes: Mapping[str, int], size: int) -> Spans:
    """Return the intervals of possibly live scores, by `seen`, and of possibly dead ones, by `keep`. They serve blocks
    of `size` rows. `sizes` has the values of T and S; in the predicates, all sizes must be replaced by values."""
    grain = next(n for n in GRAINS if size % n == 0)
    return _spans(seen, keep, sizes["T"], sizes["S"], grain)


@lru_cache(maxsize=256)
def _spans(seen: Expr, keep: Expr, rows: int, keys: int, step: int) -> Spans:
    live, dead, exact = intervals(P.formula(seen, True), P.formula(keep, False), rows, keys, step)
    return Spans(live, dead, rows, keys, step, exact)
