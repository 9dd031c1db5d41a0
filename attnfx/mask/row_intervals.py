"""Masks whose rows are intervals of keys: causal, windows, prefixes, sinks, blocks, and what is made of them.

There every row sees the union of a few intervals [low, high) of keys, and the rest of it is the union of a few others.
Arrays of their ends answer for blocks and tiles of any size what the polyhedral library answers for one size at a time,
and a hundred times faster. Of other masks (remainders of keys, differences by batch or head) they are a bound.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np

from attnfx.ir.expr import Expr
from attnfx.mask import affine as P
from attnfx.mask.intervals import Intervals, intervals

GRAINS = (64, 32, 1)  # rows; the largest that divides a block is what the block is made of
# Of a matrix of more rows than so many groups of so many, a sample is counted: that many groups.
GROUP, GROUPS = 128, 256
GOLDEN = (5**0.5 - 1) / 2  # its multiples are spread evenly, and meet no period of a mask's


class Spans:
    """The intervals of one mask by blocks of `step` rows: `live` hold every score that may be live, `dead` every one
    that may be dead, and where they are `exact` no other."""

    def __init__(self, live: Intervals, dead: Intervals, rows: int, keys: int, step: int, exact: bool) -> None:
        self.rows, self.keys, self.step, self.exact = rows, keys, step, exact
        self.share = 1.0  # groups of rows that each stands for, but for the first and the last
        self._blocks = {step: (live, dead)}
        self._ends: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._sorted: dict[tuple[int, bool], Intervals] = {}

    def blocks(self, size: int) -> tuple[Intervals, Intervals]:
        """(live, dead) of each block of `size` rows, a multiple of the step."""
        if size not in self._blocks:
            starts = np.arange(0, -(-self.rows // self.step), size // self.step)
            live, dead = (
                Intervals(np.minimum.reduceat(x.low, starts, axis=1), np.maximum.reduceat(x.high, starts, axis=1))
                for x in self._blocks[self.step]
            )
            self._blocks[size] = live, dead
        return self._blocks[size]

    def ends(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(j0, j1) of each block of `size` rows: it sees keys in [j0, j1) alone, which is [0, 0) where it sees none."""
        if size not in self._ends:
            live, _ = self.blocks(size)
            low, high = live.low.min(0, initial=self.keys), live.high.max(0, initial=0)
            self._ends[size] = np.where(low < high, low, 0), high
        return self._ends[size]

    def ranges(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(j0, j1, full) of each block of `size` rows: it sees all keys in [j0, j1) where full."""
        (low, high), (_, dead) = self.ends(size), self.blocks(size)
        holes = np.maximum(low, dead.low) < np.minimum(high, dead.high)
        return low, high, (low < high) & ~holes.any(0)

    def full(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """[low, high) of each block of `size` rows: the longest run of keys in its range of which none may be dead."""
        first, last, _ = self.ranges(size)
        dead = self.blocks(size)[1]
        by_start = np.argsort(dead.low, axis=0)
        starts, ends = (np.take_along_axis(x, by_start, 0) for x in dead)
        low = np.concatenate([first[None], np.maximum(np.maximum.accumulate(ends, axis=0), first)])
        high = np.concatenate([np.minimum(starts, last), last[None]])
        longest = np.argmax(high - low, axis=0)[None]
        return np.take_along_axis(low, longest, 0)[0], np.take_along_axis(high, longest, 0)[0]

    def tiles(self, size: int, step: int, dead: bool) -> int:
        """How many tiles of `size` rows by `step` keys hold a score that may be dead; else, one that may be live."""
        key = size, dead
        if key not in self._sorted:
            self._sorted[key] = _sorted(*self.blocks(size)[dead])
        low, high = self._sorted[key]
        return self.total(_covered(low // step, -(-high // step)), size)

    def total(self, counts: np.ndarray, size: int) -> int:
        """The sum of a count of each block of `size` rows."""
        if self.share == 1.0:
            return int(counts.sum())
        ends = GROUP // size, -(-(self.rows % GROUP or GROUP) // size)
        outer = counts[: ends[0]].sum() + counts[-ends[1] :].sum()
        return round(float(outer + self.share * counts[ends[0] : -ends[1]].sum()))

    def sampled(self, size: int) -> Spans:
        """Of many rows the first group, the last one and some between, for blocks of `size` rows that a group is made
        of. Sums over its blocks are estimates then; of few rows all, and the sums are exact."""
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
        """Whether one of those tiles holds (a score that may be live, one that may be dead)."""
        low, high = column * step, (column + 1) * step
        live, dead = (bool(((x.low[:, row] < high) & (x.high[:, row] > low)).any()) for x in self.blocks(size))
        return live, dead

    @property
    def live(self) -> int:
        """How many (i, j) may be live; for a step of one row."""
        return int(_covered(*_sorted(*self.blocks(1)[0])).sum())


def _sorted(low: np.ndarray, high: np.ndarray) -> Intervals:
    """The starts and the ends of each row in order, each with its own: where there are none of an interval's numbers,
    its start is its end."""
    low = np.minimum(low, high)
    return Intervals(low, high) if len(low) < 2 else Intervals(np.sort(low, axis=0), np.sort(high, axis=0))


def _covered(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How many numbers the intervals of each row hold, by their sorted starts and ends: from the first start to the
    last end, but for the gaps, which begin where as many have ended as have started."""
    if not len(low):
        return np.zeros(low.shape[1], np.int64)
    whole = high[-1] - low[0]
    return whole if len(low) < 2 else whole - np.maximum(low[1:] - high[:-1], 0).sum(0)


def spans(seen: Expr, keep: Expr, items: tuple[tuple[str, int], ...], size: int) -> Spans:
    """The intervals of what may be live by the predicate `seen`, and of what may be dead by `keep`, for blocks of
    `size` rows; `items` has numbers for T and S, the predicates for all sizes."""
    grain = next(n for n in GRAINS if size % n == 0)
    return _spans(seen, keep, *(dict(items)[name] for name in "TS"), grain)


@lru_cache(maxsize=256)
def _spans(seen: Expr, keep: Expr, rows: int, keys: int, step: int) -> Spans:
    live, dead, exact = intervals(P.formula(seen, True), P.formula(keep, False), rows, keys, step)
    return Spans(live, dead, rows, keys, step, exact)
