"""The intervals of keys that a formula of affine comparisons leaves in each block of rows.

A comparison that is affine in j bounds j by a function of i: from below or from above. A conjunction of them leaves
each row one interval, from the largest lower bound to the smallest upper one, and the disjunctive form a few. Where
the bounds are monotone within a block of rows, its first and last row mostly give the union of the block's intervals;
where it is not proven that they do, all rows of the block are looked at.
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

TERMS = 8  # intervals of a row; beyond, a mask counts as none
FACTOR, CONSTANT = 1 << 15, 1 << 40  # of a comparison; larger ones might not fit into 63 bits with sizes of 31
MANY = 1 << 62

Number = np.ndarray | int


class _Apart(Exception):
    """The rows of a comparison are no intervals."""


class Intervals(NamedTuple):
    """Keys [low, high) by (term, block of rows); low is not below high where there are none."""

    low: np.ndarray
    high: np.ndarray


def intervals(may: Formula, sure: Formula, rows: int, keys: int, step: int) -> tuple[Intervals, Intervals, bool]:
    """(where `may` holds, where `sure` does not, whether both are exact) in each block of `step` rows, for each term of
    the formula's disjunctive form. Exact: the rows see just these keys, and the intervals of a term's consecutive rows,
    but for empty ones, meet. Else they see no others."""
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
    """(low, high) of each term and block, and whether the union of the block's rows in each term is proven to be that:
    it is empty, or has the ends of the first or last row, and the rows meet. They do where all meet at one key: the
    largest low and the smallest high are of the first or the last row. And where bounds are lines of slope 1 at most,
    `gentle`: low - high is convex then, so that between two rows that are not empty none is."""
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
    """Whether along the last axis the intervals, but for empty ones, meet one after the other."""
    some = low < high
    line, _ = np.nonzero(some)
    low, high = low[some], high[some]
    apart = (low[1:] > high[:-1]) | (high[1:] < low[:-1])
    return not (apart & (line[1:] == line[:-1])).any()


@dataclass
class _Term:
    """A conjunction's interval: [low, high) of each row that is looked at, by (first and last, block); and `least` and
    `most`, beyond which no row of a block has a key. What is one for all rows is a number."""

    low: Number
    high: Number
    least: Number
    most: Number

    def both(self, other: _Term) -> _Term:
        return _Term(
            _larger(self.low, other.low), _smaller(self.high, other.high),
            _larger(self.least, other.least), _smaller(self.most, other.most),
        )  # fmt: skip


def _larger(x: Number, y: Number) -> Number:
    return max(x, y) if isinstance(x, int) and isinstance(y, int) else np.maximum(x, y)


def _smaller(x: Number, y: Number) -> Number:
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else np.minimum(x, y)


def _least(x: Number) -> Number:
    """Of each block."""
    return x if isinstance(x, int) else np.minimum(x[0], x[-1])


def _most(x: Number) -> Number:
    return x if isinstance(x, int) else np.maximum(x[0], x[-1])


class _Rows:
    """The rows that are looked at: of each block of `step` rows the first and the last, or its only one.

    monotone  whether all bounds seen so far are, within each block
    gentle    whether they are lines whose slope is 1 at most
    exact     whether all comparisons bound the keys; one that does not leaves them all
    """

    def __init__(self, rows: np.ndarray, keys: int, step: int) -> None:
        self.keys, self.step = keys, step
        self.monotone = self.gentle = self.exact = True
        self.env = {"i": rows}
        self.parts: dict[Expr, tuple[int, Expr | None, Number]] = {}

    def terms(self, f: Formula, holds: bool) -> list[_Term]:
        """The terms of the formula's disjunctive form, or of its negation's."""
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
        low, high = _larger(low, 0), _smaller(high, self.keys)
        return _Term(low, high, _least(low), _most(high))

    def within(self, e: Expr, least: Number | None, most: Number | None) -> _Term:
        """The keys at which least <= e <= most, for an affine e; None is no bound."""
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
                self.monotone = False  # a bound may rise by one part and fall by the other
            return self.within(
                inner, None if least is None else least * by, None if most is None else most * by + by - 1
            )
        return self.term(0 if least is None else least, self.keys if most is None else most + 1)

    def split(self, e: Expr) -> tuple[int, Expr | None, Number]:
        """(factor, at, rest) with e = factor * at + rest, where `at` is j, a quotient of it, or None."""
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
    """Whether a value in [low, high] may be in [least, most]."""
    return (least is None or high >= least) & (most is None or low <= most)


def _slope(e: Expr, step: int) -> int:
    """1 or -1 where an affine function of i rises or falls along a block of `step` rows, 0 where neither is sure."""
    if e.op == "floordiv":
        signs = {_slope(a, step) * (1 if c > 0 else -1) for m, c in poly.of(e.args[0]).items() for a in m}
        return signs.pop() if len(signs) == 1 else 0
    if e.op == "mod":  # of i itself, by blocks of rows
        return int(e.args[0].op == "var" and int(e.args[1].value) % step == 0)  # type: ignore[call-overload]
    return int(e.op == "var")
