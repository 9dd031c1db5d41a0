"""Divide a call into blocks: ranges of queries and their live key ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnfx.kernels.chunked.program import program_of
from attnfx.kernels.gpu import capturing
from attnfx.mask import KeyRange, key_ranges, rows_live
from attnfx.spec import AttentionSpec

# Elements of one tile of scores, and the fewest rows of a block. Measured on 2 cores of an AMD EPYC with 1 MiB of L2
# each and 32 MiB of L3 (8 heads x 4096 x 64, float32). Larger on a GPU, because each operator is a kernel launch.
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
ROWS = {"cpu": 128, "cuda": 512}
LEAST_ROWS = 16  # fewest rows of a part of a block


class Block(NamedTuple):
    """Batches [b0, b1), key heads [g0, g1), queries [i0, i1), keys [j0, j1).

    number  the block's number, which seeds its dropout
    full    whether every score is live
    live    whether every row is known to have a live key
    whole   for a part of a block, that block, whose dropout is sampled as a whole; else None
    """

    number: int
    b0: int
    b1: int
    g0: int
    g1: int
    i0: int
    i1: int
    j0: int
    j1: int
    full: bool
    live: bool
    whole: Block | None = None


class Plan:
    """The division of a call into blocks, the same in both passes.

    If `elements` allows fewer scores than a tile has, each block is computed in parts. The blocks and their dropout
    stay the same.
    """

    def __init__(
        self, spec: AttentionSpec, sizes: dict[str, int], groups: int, device: torch.device, elements: int = 0
    ):
        kind = device.type if device.type in ROWS else "cuda"
        self.spec, self.sizes, self.groups = spec, sizes, groups
        self.tile = TILE_ELEMENTS[kind]
        self.elements = min(elements or self.tile, self.tile)
        heads, rows = sizes["B"] * sizes["H"], sizes["T"]
        step = ROWS[kind]
        while step > 16 and step // 2 >= rows:
            step //= 2
        while step * sizes["S"] > self.tile and step > 32:
            step //= 2
        if heads and sizes["S"]:
            while step < rows and 2 * step * sizes["S"] * heads <= self.tile:
                step *= 2
        self.rows = list(key_ranges(spec, sizes, step)) if rows and heads else []
        self.fill = program_of(spec).fill
        # a row without a live key then gives zeros, whichever keys are visited
        self.exact = self.fill is None or (spec.safe and self.fill == -math.inf)
        self.doubtful: set[int] | None = None  # unknown

    def widen(self, logsumexp: Tensor) -> set[int]:
        """Find the ranges that have rows without a live key, and widen them to all keys.

        Return the numbers of the widened ranges. A captured CUDA graph will be replayed on other values, so during
        capture every range counts as having such rows.
        """
        self.doubtful = set()
        if self.exact or self.fill is None or not logsumexp.numel() or rows_live(self.spec, self.sizes):
            return set()
        if capturing():
            self.doubtful = set(range(len(self.rows)))
        else:
            dead = ~(logsumexp > self.fill / 2).all(dim=1).all(dim=0)  # NaN counts as dead
            if not bool(dead.any()):
                return set()
            self.doubtful = self.holding(dead)
        wide = {n for n in self.doubtful if (self.rows[n].j0, self.rows[n].j1) != (0, self.sizes["S"])}
        for n in wide:
            self.rows[n] = KeyRange(self.rows[n].i0, self.rows[n].i1, 0, self.sizes["S"], False)
        return wide

    def holding(self, some: Tensor) -> set[int]:
        """Return the numbers of the ranges that contain a row marked in `some`, a bool tensor (T,)."""
        some = some.cpu()
        return {n for n, r in enumerate(self.rows) if bool(some[r.i0 : r.i1].any())}

    def blocks(self, which: set[int] | None = None) -> Iterator[list[Block]]:
        """Yield, for each range of rows, its blocks over batches and heads."""
        size_b, size_g = self.sizes["B"], self.groups
        per_group = max(1, self.sizes["H"] // max(size_g, 1))
        # the number of a block must not depend on its key range, which may have been widened
        for n, r in enumerate(self.rows):
            if which is not None and n not in which:
                continue
            fit = max(1, self.tile // max(1, (r.i1 - r.i0) * (r.j1 - r.j0) * per_group))
            out = []
            step_b, step_g = (max(1, fit // size_g), size_g) if fit >= size_g else (1, fit)
            for b in range(0, size_b, step_b):
                for g in range(0, size_g, step_g):
                    number = (n * size_b + b) * size_g + g
                    live = self.doubtful is not None and n not in self.doubtful
                    out.append(Block(number, b, min(b + step_b, size_b), g, min(g + step_g, size_g), *r, live))
            if self.elements == self.tile:
                yield out
            else:
                for block in out:
                    yield from self._parts(block, per_group)

    def _parts(self, whole: Block, per_group: int) -> Iterator[list[Block]]:
        """Divide a block into parts and yield, for each range of rows, its parts. A part has at most `elements` scores,
        unless one group of heads with LEAST_ROWS rows already exceeds that."""
        row = max(1, (whole.j1 - whole.j0) * per_group)
        rows = min(max(self.elements // row, LEAST_ROWS), max(whole.i1 - whole.i0, 1))
        fit, groups = max(1, self.elements // (row * rows)), whole.g1 - whole.g0
        step_b, step_g = (fit // groups, groups) if fit >= groups else (1, fit)
        for i in range(whole.i0, max(whole.i1, whole.i0 + 1), rows):
            yield [
                whole._replace(
                    b0=b, b1=min(b + step_b, whole.b1), g0=g, g1=min(g + step_g, whole.g1), i0=i,
                    i1=min(i + rows, whole.i1), whole=whole,
                )
                for b in range(whole.b0, whole.b1, step_b) for g in range(whole.g0, whole.g1, step_g)
            ]  # fmt: skip
