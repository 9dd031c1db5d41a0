"""Compute the intervals of keys that satisfy a formula of affine comparisons, for each block of rows.

A comparison that is affine in j bounds j from below or above by a function of i. A conjunction of comparisons gives
each row one interval, from the largest lower bound to the smallest upper bound; the disjunctive normal form gives a
few. If the bounds are monotone within a block of rows, the first and last row usually determine the union of the
block's intervals. If that is not proven, all rows of the block are analyzed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from attnfx.ir import poly
from attnfx.ir.expr import Expr
from attnfx.ir.interpret import evaluate
from attnfx.mask.affine import Formula

TERMS = 8  # intervals of a row; beyond, the bound is all keys
FACTOR, CONSTANT = 1 << 15, 1 << 40  # largest in a comparison: more might not fit into 63 bits with 31-bit sizes
MANY = 1 << 62

Number = np.ndarray | int


class _Apart(Exception):
    """The error if a comparison does not limit each row to one interval."""


class Intervals(NamedTuple):
    """Keys [low, high) by (term, block of rows); empty unless low < high."""

    low: np.ndarray
    high: np.ndarray


def intervals(may: Formula, sure: Formula, rows: int, keys: int, step: int) -> tuple[Intervals, Intervals, bool]:
    """Return (keys at which `may` holds, keys at which `sure` fails, whether both are exact) by block of `step` rows.
    Each term of the formula's disjunctive normal form has an interval. If exact, a block's rows have exactly these
    keys, and the nonempty intervals of a term's consecutive rows meet. Else the rows have only keys in them."""
    starts = np.arange(0, rows, step)
    found = _Rows(np.array([starts, np.minimum(starts + step, rows) - 1]), keys, step)
    live, dead = found.terms(may, True), found.terms(sure, False)
    low, high, proven = _unions(live + dead, keys, found)
    exact = found.exact
    if not proven.all():
        doubtful = np.flatnonzero(~proven)
        inside = np.minimum(starts[doubtful, None] + np.arange(step), rows - 1)
        found = _Rows(inside.reshape(1, -1), keys, 1)
        first, last, _ = _unions(found.terms(may, True) + found.terms(sure, False), keys, found)
        first, last = (x.reshape(-1, step) for x in (first, last))
        exact &= _meet(first, last)
        low[:, doubtful] = first.min(1).reshape(len(low), -1)
        high[:, doubtful] = last.max(1).reshape(len(low), -1)
    exact &= _meet(low, high)
    return Intervals(low[: len(live)], high[: len(live)]), Intervals(low[len(live) :], high[len(live) :]), exact


def _unions(terms: list[_Term], keys: int, found: _Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (low, high) of each term and block, and whether they are proven to be the union of the block's rows.

    A proven union is empty, or it has the ends of the first or last row and the rows' intervals meet. They meet if they
    share a key: the largest low and the smallest high are of the first or last row. They also meet if the bounds are
    lines of slope at most 1 (`gentle`): low - high is convex, so rows between two nonempty rows are not empty."""
    rows = found.env["i"]
    low, high = np.empty((2, len(terms), *rows.shape), np.int64)
    least, most = np.empty((2, len(terms), rows.shape[1]), np.int64)
    for n, x in enumerate(terms):
        low[n], high[n], least[n], most[n] = x.low, x.high, x.least, x.most
    empty = least >= most
    if rows.shape[0] == 1:
        proven = np.ones(rows.shape[1], bool)
    else:
        proven = np.broadcast_to(found.monotone, rows.shape[1])
        meet = found.gentle or low.max(1) <= high.min(1)
        some = low < high
        reached = (np.where(some, low, MANY).min(1) == least) & (np.where(some, high, -1).max(1) == most)
        proven = proven & (empty | (reached & meet)).all(0)
    return np.where(empty, keys, least), np.where(empty, 0, most), proven


def _meet(low: np.ndarray, high: np.ndarray) -> bool:
    """Return whether consecutive nonempty intervals along the last axis meet."""
    some = low < high
    line, _ = np.nonzero(some)
    low, high = low[some], high[some]
    apart = (low[1:] > high[:-1]) | (high[1:] < low[:-1])
    return not (apart & (line[1:] == line[:-1])).any()


@dataclass
class _Term:
    """The interval of a conjunction. [low, high) is the interval of each analyzed row, by (first and last, block).
    [least, most) contains the keys of all rows of a block. A value that all rows share is a scalar."""

    low: Number
    high: Number
    least: Number
    most: Number

    def both(self, other: _Term) -> _Term:
        return _Term(
            np.maximum(self.low, other.low), np.minimum(self.high, other.high),
            np.maximum(self.least, other.least), np.minimum(self.most, other.most),
        )  # fmt: skip


def _least(x: Number) -> Number:
    """Return the smallest value of each block."""
    x = np.asarray(x)
    return np.minimum(x[0], x[-1]) if x.ndim else x


def _most(x: Number) -> Number:
    x = np.asarray(x)
    return np.maximum(x[0], x[-1]) if x.ndim else x


class _Rows:
    """The analyzed rows: the first and last of each block of `step` rows, or its only row.

    monotone  whether all bounds so far are monotone within each block
    gentle    whether they are lines of slope at most 1
    exact     whether all comparisons so far bound the keys; others leave all keys
    """

    def __init__(self, rows: np.ndarray, keys: int, step: int) -> None:
        self.keys, self.step = keys, step
        self.monotone = self.gentle = self.exact = True
        self.env = {"i": rows}
        self.parts: dict[Expr, tuple[int, Expr | None, Number]] = {}

    def terms(self, f: Formula, holds: bool) -> list[_Term]:
        """Return the terms of the disjunctive normal form of the formula, or of its negation."""
        if f.op == "not":
            return self.terms(f.parts[0], not holds)
        if f.line is not None:
            try:
                if holds:
                    return [self.within(f.line, 0, 0 if f.op == "eq0" else None)]
                return [self.within(f.line, None, -1)] + [self.within(f.line, 1, None)] * (f.op == "eq0")
            except _Apart:
                return self.all_keys()
        parts = [self.terms(p, holds) for p in f.parts]
        if (f.op == "or") == holds:
            found = [term for part in parts for term in part]
        else:
            found = [self.term(0, self.keys)]
            for part in parts:
                found = [x.both(y) for x in found for y in part]
                if len(found) > TERMS:
                    break
        return found if len(found) <= TERMS else self.all_keys()

    def all_keys(self) -> list[_Term]:
        self.exact = False
        return [self.term(0, self.keys)]

    def term(self, low: Number, high: Number) -> _Term:
        low, high = np.maximum(low, 0), np.minimum(high, self.keys)
        return _Term(low, high, _least(low), _most(high))

    def within(self, e: Expr, least: Number | None, most: Number | None) -> _Term:
        """Return the keys at which least <= e <= most, for an affine e; None means unbounded."""
        if e not in self.parts:
            self.parts[e] = self.split(e)
        factor, at, rest = self.parts[e]
        if at is None:
            self.gentle = False
            if isinstance(rest, int):
                return self.term(0, self.keys if _between(rest, rest, least, most) else 0)
            most_keys = np.where(_between(_least(rest), _most(rest), least, most), self.keys, 0)
            return _Term(0, np.where(_between(rest, rest, least, most), self.keys, 0), 0, most_keys)
        least, most = (None if x is None else x - rest for x in (least, most))
        if factor < 0:
            least, most = (None if x is None else -x for x in (most, least))
        if abs(factor) > 1:
            by = abs(factor)
            least, most = None if least is None else -(-least // by), None if most is None else most // by
        if at.op == "floordiv":
            inner, by = at.args[0], int(at.args[1].value)  # type: ignore[call-overload]
            if by > FACTOR or any(a.op == "floordiv" and "j" in a.free for atoms in poly.of(inner) for a in atoms):
                raise _Apart
            if not isinstance(rest, int) and "i" in inner.free:
                self.monotone = False  # a bound may rise with one part and fall with the other
            return self.within(
                inner, None if least is None else least * by, None if most is None else most * by + by - 1
            )
        return self.term(0 if least is None else least, self.keys if most is None else most + 1)

    def split(self, e: Expr) -> tuple[int, Expr | None, Number]:
        """Return (factor, at, rest) with e = factor * at + rest; `at` is j, a quotient of it, or None."""
        factor, at, signs = 0, None, set()
        rest: Number = 0
        for atoms, c in poly.of(e).items():
            free = frozenset().union(*(a.free for a in atoms))
            if free & {"b", "h"} or abs(c) > (FACTOR if atoms else CONSTANT):
                raise _Apart
            if "j" not in free:
                rest = rest + c * math.prod(evaluate(a, self.env) for a in atoms)  # type: ignore[assignment,arg-type,operator]
                signs |= {_slope(a, self.step) * (1 if c > 0 else -1) for a in atoms if "i" in a.free}
                self.gentle &= "i" not in free or (abs(c) == 1 and atoms[0].op == "var")
            elif at is None and len(atoms) == 1 and atoms[0].op in ("var", "floordiv"):
                factor, at = c, atoms[0]
                self.gentle &= abs(c) == 1 and at.op == "var"
            else:
                raise _Apart
        self.monotone &= len(signs) < 2 and 0 not in signs
        return factor, at, rest


def _between(low: Number, high: Number, least: Number | None, most: Number | None) -> np.ndarray | bool:
    """Return whether a value in [low, high] may be in [least, most]."""
    return (least is None or high >= least) & (most is None or low <= most)


def _slope(e: Expr, step: int) -> int:
    """Return 1 or -1 if an affine function of i rises or falls along a block of `step` rows, 0 if neither is proven."""
    if e.op == "floordiv":
        signs = {_slope(a, step) * (1 if c > 0 else -1) for m, c in poly.of(e.args[0]).items() for a in m}
        return signs.pop() if len(signs) == 1 else 0
    if e.op == "mod":  # i mod n rises within a block of rows if the block's size divides n
        return int(e.args[0].op == "var" and int(e.args[1].value) % step == 0)  # type: ignore[call-overload]
    return int(e.op == "var")
