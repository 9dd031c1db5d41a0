"""Bound a predicate over every tile of the score matrix at once, by interval arithmetic.

An integer expression has a least and a largest value over a tile; a predicate may hold or may fail in a tile. Both
bounds are sound: a value that depends on more than the indices may be anything. They are exact if each comparison
alone decides, as in windows, sinks, dilations and neighborhoods of an image. A tile in which two conditions hold, but
at different scores, counts as live.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np

from attnfx.ir import poly
from attnfx.ir.expr import BOOL, INT, Expr
from attnfx.mask import affine as P
from attnfx.spec import AXES

LIVE, DEAD = 1, 2  # as in `runtime_summary`
FAR = 1 << 62  # beyond every index: no bound

Bounds = tuple[np.ndarray, np.ndarray]
Truth = tuple[np.ndarray, np.ndarray]


def states(keep: Expr, sizes: Mapping[str, int], rows: int, keys: int) -> np.ndarray:
    """Return the state of each tile of `rows` queries by `keys` keys, a uint8 matrix.

    It is LIVE if `keep` may hold for some score of the tile, in any batch and head, plus DEAD if it may fail for some.
    `sizes` has the values of B, H, T, S and the sizes that `keep` names.
    """
    made = _Boxes(sizes, rows, keys)
    some, dead = made.truth(P.numeric(keep, sizes))
    shape = made.env["i"][0].shape[0], made.env["j"][0].shape[1]
    return np.broadcast_to(LIVE * some + DEAD * dead, shape).astype(np.uint8)


def extent(e: Expr, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the least and the largest value of an integer over all indices; FAR in magnitude or more if unknown."""
    low, high = _Boxes(sizes, max(1, sizes["T"]), max(1, sizes["S"])).of(P.numeric(e, sizes))
    return int(low.min()), int(high.max())


class _Boxes:
    """One evaluation; `env` has the first and last value of each index in every tile."""

    def __init__(self, sizes: Mapping[str, int], rows: int, keys: int) -> None:
        i, j = np.arange(0, sizes["T"], rows)[:, None], np.arange(0, sizes["S"], keys)[None, :]
        self.env: dict[str, Bounds] = {
            "i": (i, np.minimum(i + rows, sizes["T"]) - 1),
            "j": (j, np.minimum(j + keys, sizes["S"]) - 1),
        }
        for name in "bh":
            self.env[name] = np.array(0), np.array(sizes[AXES[name]] - 1)
        self.truths: dict[Expr, Truth] = {}
        self.bounds: dict[Expr, Bounds] = {}

    def truth(self, e: Expr) -> Truth:
        """Return (whether the predicate may hold, whether it may fail) by tile."""
        if e not in self.truths:
            self.truths[e] = self._truth(e)
        return self.truths[e]

    def _truth(self, e: Expr) -> Truth:
        match e.op:
            case "const":
                return np.array(bool(e.value)), np.array(not e.value)
            case "ge0" | "eq0":
                low, high = self.of(e.args[0])
                if e.op == "ge0":
                    return high >= 0, low < 0
                return (low <= 0) & (high >= 0), (low != 0) | (high != 0)
            case "not":
                holds, fails = self.truth(e.args[0])
                return fails, holds
            case "and" | "or":
                every, some = (np.logical_and, np.logical_or) if e.op == "and" else (np.logical_or, np.logical_and)
                parts = [self.truth(a) for a in e.args]
                return reduce(every, (p for p, _ in parts)), reduce(some, (n for _, n in parts))
            case "where" if e.kind == BOOL:
                (c, no_c), *branches = (self.truth(a) for a in e.args)
                (x, no_x), (y, no_y) = branches
                return (c & x) | (no_c & y), (c & no_x) | (no_c & no_y)
        return np.array(True), np.array(True)

    def of(self, e: Expr) -> Bounds:
        """Return (least, largest) value of an integer by tile; beyond FAR / 2 in magnitude if unknown."""
        if e not in self.bounds:
            low, high = self._of(e)
            self.bounds[e] = np.maximum(low, -FAR), np.minimum(high, FAR)
        return self.bounds[e]

    def _of(self, e: Expr) -> Bounds:
        unknown = np.array(-FAR), np.array(FAR)
        match e.op:
            case "const" if abs(e.value) < 1 << 31:  # type: ignore[arg-type]
                return np.array(e.value), np.array(e.value)
            case "var" if e.value in self.env:
                return self.env[str(e.value)]
            case "add" | "mul":
                return self._sum(e)
            case "floordiv" | "mod":
                return self._quotient(e)
            case "min" | "max":
                choose = np.minimum if e.op == "min" else np.maximum
                parts = [self.of(a) for a in e.args]
                return reduce(choose, (low for low, _ in parts)), reduce(choose, (high for _, high in parts))
            case "abs":
                low, high = self.of(e.args[0])
                return np.maximum(np.maximum(low, -high), 0), np.maximum(-low, high)
            case "where" if e.kind == INT:
                c, no_c = self.truth(e.args[0])
                (x, most_x), (y, most_y) = (self.of(a) for a in e.args[1:])
                low = np.minimum(np.where(c, x, FAR), np.where(no_c, y, FAR))
                return low, np.maximum(np.where(c, most_x, -FAR), np.where(no_c, most_y, -FAR))
        return unknown

    def _sum(self, e: Expr) -> Bounds:
        """Bound a polynomial; products of two indices are unknown, as are values that might not fit into 63 bits."""
        low, high = np.array(0), np.array(0)
        for atoms, c in poly.of(e).items():
            if len(atoms) > 1 or abs(c) >= 1 << 30:
                return np.array(-FAR), np.array(FAR)
            x, y = self.of(atoms[0]) if atoms else (np.array(1), np.array(1))
            if (x <= -(1 << 31)).any() or (y >= 1 << 31).any():
                return np.array(-FAR), np.array(FAR)
            low, high = low + min(c, 0) * y + max(c, 0) * x, high + min(c, 0) * x + max(c, 0) * y
        return low, high

    def _quotient(self, e: Expr) -> Bounds:
        (low, high), by = self.of(e.args[0]), e.args[1]
        if by.op != "const" or by.value <= 0:  # type: ignore[operator]
            return np.array(-FAR), np.array(FAR)
        n = int(by.value)  # type: ignore[call-overload]
        if e.op == "floordiv":
            return low // n, high // n
        known = low // n == high // n  # a tile within one period
        return np.where(known, low % n, 0), np.where(known, high % n, n - 1)
