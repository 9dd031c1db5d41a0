"""Compute the block mask of a predicate without its T x S values: its partial tiles and its full tiles.

A part of the predicate that depends on the queries alone, or on the keys alone, is evaluated at each of them. A part
that loads by query and key is evaluated at every pair, in one reduction of the loaded tensor. The rest is interval
arithmetic on these: it bounds each integer over a tile. Both answers are sound. A tile without a live score may count
as partial, a full tile too.

The functions take tensors and sizes, real ones to compute a constant, or traced ones to become nodes of a graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.expr import BOOL, INT, Expr, walk
from attnfx.kernels.evaluate import Evaluator, block_axes
from attnfx.kernels.flex.element import Size
from attnfx.mask import FLEX_TILE
from attnfx.spec import AXES

DENSE = 4  # a part of the predicate is evaluated at every pair if the scores are at least this many times the pairs


@dataclass(frozen=True)
class Truth:
    """The state of a predicate in each tile, as tensors that broadcast over (batch, heads, rows, keys) of tiles.

    some   it may hold for some score
    fails  it may fail for some score
    rows   it holds for some key of the tile in each row
    """

    some: Tensor
    fails: Tensor
    rows: Tensor


Bounds = tuple[Tensor, Tensor]  # the least and the largest value in each tile


class _Tiles:
    def __init__(self, captures: Sequence[Tensor], sizes: Mapping[str, Size], device: torch.device) -> None:
        self.captures, self.sizes, self.device = captures, sizes, device
        axes = block_axes(*((0, sizes[AXES[name]]) for name in AXES))  # type: ignore[arg-type]
        self.points = Evaluator(captures, sizes, axes, torch.float32, device)  # type: ignore[arg-type]
        self.truths: dict[Expr, Truth] = {}
        self.bounds: dict[Expr, Bounds | None] = {}

    # -- values at points --------------------------------------------------------------------------
    def at_points(self, e: Expr) -> bool:
        """Return whether a part is evaluated at every point that it depends on."""
        if not {"i", "j"} <= e.free:
            return True
        return any(x.op == "load" and {"i", "j"} <= x.free for x in walk(e)) and self.shared(e)

    def shared(self, e: Expr) -> bool:
        """Return whether several heads or batches share the values of a part that is evaluated at every pair."""
        apart = (self.sizes[AXES[name]] for name in "bh" if name not in e.free)
        return math.prod(n for n in apart if isinstance(n, int)) >= DENSE

    def cut(self, e: Expr) -> Tensor:
        """Return the values of a part as (batch, heads, row tile, row, key tile, key); a last tile that is not whole
        repeats its last values."""
        found = self.points.tensor(e)
        found = found.reshape((1,) * (4 - found.ndim) + tuple(found.shape))
        for name, dim in (("i", 2), ("j", 4)):
            if name not in e.free:
                found = found.unsqueeze(dim)
                continue
            extent = self.sizes[AXES[name]]
            count = (extent + FLEX_TILE - 1) // FLEX_TILE
            at = torch.arange(count * FLEX_TILE, device=self.device).clamp(max=extent - 1)
            found = found.index_select(dim, at).unflatten(dim, (count, FLEX_TILE))
        return found

    # -- predicates --------------------------------------------------------------------------------
    def truth(self, e: Expr) -> Truth:
        if e not in self.truths:
            self.truths[e] = self._truth(e)
        return self.truths[e]

    def constant(self, value: bool) -> Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=torch.bool, device=self.device)

    def _truth(self, e: Expr) -> Truth:
        if e.op == "const":
            return Truth(self.constant(bool(e.value)), self.constant(not e.value), self.constant(bool(e.value)))
        if self.at_points(e) and e.op not in ("and", "or"):
            found = self.cut(e)
            by_row = found.any(5)
            return Truth(by_row.any(3), found.logical_not().any(5).any(3), by_row.all(3))
        match e.op:
            case "ge0" | "eq0":
                bounds = self.of(e.args[0])
                if bounds is not None:
                    low, high = bounds
                    if e.op == "ge0":
                        return self._sure(high >= 0, low < 0)
                    return self._sure((low <= 0) & (high >= 0), (low != 0) | (high != 0))
            case "not":
                inner = self.truth(e.args[0])
                return self._sure(inner.fails, inner.some)
            case "and":
                return reduce(_both, map(self.truth, e.args))
            case "or":
                return reduce(_either, map(self.truth, e.args))
            case "where" if e.kind == BOOL:
                c, x, y = e.args
                return self.truth(A.or_(A.and_(c, x), A.and_(A.not_(c), y)))
        return self._sure(self.constant(True), self.constant(True))

    @staticmethod
    def _sure(some: Tensor, fails: Tensor) -> Truth:
        return Truth(some, fails, fails.logical_not())

    # -- integers ----------------------------------------------------------------------------------
    def of(self, e: Expr) -> Bounds | None:
        """Return the bounds of an integer in each tile; None if unknown."""
        if e not in self.bounds:
            self.bounds[e] = self._of(e)
        return self.bounds[e]

    def _of(self, e: Expr) -> Bounds | None:
        if self.at_points(e):
            found = self.cut(e)
            return found.amin((3, 5)), found.amax((3, 5))
        parts = [self.of(a) for a in e.args] if e.op not in ("add", "mul", "where") else []
        known = [p for p in parts if p is not None]
        if len(known) < len(parts):
            return None
        match e.op:
            case "add" | "mul":
                return self._sum(e)
            case "floordiv" | "mod" if e.args[1].op == "const" and int(e.args[1].value) > 0:  # type: ignore[call-overload]
                (low, high), n = known[0], int(e.args[1].value)  # type: ignore[call-overload]
                first, last = low.div(n, rounding_mode="floor"), high.div(n, rounding_mode="floor")
                if e.op == "floordiv":
                    return first, last
                within = first == last  # a tile within one period
                return torch.where(within, low - first * n, 0), torch.where(within, high - first * n, n - 1)
            case "min" | "max":
                choose = torch.minimum if e.op == "min" else torch.maximum
                return reduce(choose, (low for low, _ in known)), reduce(choose, (high for _, high in known))
            case "abs":
                low, high = known[0]
                return torch.maximum(low, -high).clamp(min=0), torch.maximum(-low, high)
            case "where" if e.kind == INT:
                x, y = (self.of(a) for a in e.args[1:])
                if x is not None and y is not None:
                    return torch.minimum(x[0], y[0]), torch.maximum(x[1], y[1])
        return None

    def _sum(self, e: Expr) -> Bounds | None:
        """Bound a polynomial, by its terms in one unknown; products of two are unknown."""
        low = high = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=self.device)
        for atoms, c in poly.of(e).items():
            inner = A.from_poly({atoms: 1}) if atoms else A.ONE
            if inner is e:
                return None
            found = self.of(inner)
            if found is None:
                return None
            least, most = (c * x for x in (found if c >= 0 else found[::-1]))
            low, high = low + least, high + most
        return low, high


def _both(x: Truth, y: Truth) -> Truth:
    rows = (x.rows & y.fails.logical_not()) | (x.fails.logical_not() & y.rows)
    return Truth(x.some & y.some, x.fails | y.fails, rows)


def _either(x: Truth, y: Truth) -> Truth:
    return Truth(x.some | y.some, x.fails & y.fails, x.rows | y.rows)


def block_mask(tiles: Expr, masked: bool, average: bool, captures: Sequence[Tensor], sizes: Mapping[str, Size],
               device: torch.device, backward: bool) -> list[Tensor | None]:  # fmt: skip
    """Compute the block mask of a predicate.

    masked    whether mask_mod masks the partial tiles; else they count as full
    average   whether rows that may lack a live key visit every tile
    backward  whether the lists of the backward pass are wanted too

    Returns the number and the indices of partial key tiles for each row tile, (batch, heads, row tiles) and (batch,
    heads, row tiles, key tiles) in int32; the same for the full ones; with `backward`, the same four with rows and keys
    swapped. `batch` and `heads` are 1 if all share the tiles. With a single tile of keys, the lists of full tiles
    are None: a compiler would merge their indices, all zeros, with the indices of the partial ones.
    """
    counts = [(sizes[n] + FLEX_TILE - 1) // FLEX_TILE for n in ("T", "S")]
    found = _Tiles(captures, sizes, device).truth(tiles)
    visited = found.some
    if average:
        visited = visited | found.rows.any(-1, keepdim=True).logical_not()
    some, fails = torch.broadcast_tensors(visited, found.fails)
    shape = (*some.shape[:2], *counts)
    single = isinstance(counts[1], int) and counts[1] == 1
    partial, full = (some, None) if single else (some & fails, some & fails.logical_not()) if masked else (None, some)
    out: list[Tensor | None] = []
    for swapped in (False, True)[: 1 + backward]:
        for kind in (partial, full):
            if kind is not None:
                kind = kind.expand(shape)
                out += _listed(kind.transpose(-2, -1) if swapped else kind)
            elif single:
                out += [None, None]
            else:
                empty = (*shape[:2], *counts[:: -1 if swapped else 1])
                out += [torch.zeros(n, dtype=torch.int32, device=device) for n in (empty[:3], empty)]
    return out


def _listed(kind: Tensor) -> list[Tensor]:
    """Return the number of marked tiles in each row, and the indices of all tiles, marked ones first."""
    marks = kind.to(torch.int32)
    order = torch.argsort(marks, dim=-1, descending=True, stable=True)
    return [marks.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()]
