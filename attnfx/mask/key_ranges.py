"""Find the range of keys that each block of queries can see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import islpy as isl

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.expr import INT, Expr
from attnfx.ir.interpret import evaluate
from attnfx.mask import affine as P
from attnfx.mask.predicate import analysis
from attnfx.mask.row_intervals import spans as by_row


class KeyRange(NamedTuple):
    """Queries [i0, i1) see only keys in [j0, j1); with `full`, the mask keeps every key in this range."""

    i0: int
    i1: int
    j0: int
    j1: int
    full: bool


@analysis(maxsize=1024)
def key_ranges(seen: Expr, keep: Expr, sizes: Mapping[str, int], block: int) -> tuple[KeyRange, ...]:
    """Return the smallest key interval of each block of `block` queries, for all b and h together.

    `sizes` has the values of B, H, T, S and the spec's own sizes. A row without a live key adds no keys to its block's
    interval, although with a finite fill its output averages over every key; `rows_live` rules such rows out.
    """
    T, S = sizes["T"], sizes["S"]
    spans = [(i0, min(i0 + block, T)) for i0 in range(0, T, block)]
    if keep is A.TRUE:
        return tuple(KeyRange(*span, 0, S, True) for span in spans)
    known = by_row(seen, keep, sizes, block)
    if known.exact:
        return tuple(KeyRange(*span, *r) for span, r in zip(spans, zip(*(x.tolist() for x in known.ranges(block)))))
    hidden = P.hidden(seen.free | keep.free, "j")
    within = f"{P.domain(sizes, hidden + 'j')} and {block} t <= i < {block} t + {block}"
    head = f"{{ [t] -> [j] : exists {', '.join(hidden)} : {within} and "
    some = f"{head} ({P.text(seen, True)}) }}"
    try:
        bounds = _parametric(some, len(spans))
    except P.TooHard:
        try:
            bounds = _one_by_one(some, len(spans))
        except P.TooHard:
            bounds = [(0, S)] * len(spans)
    out = [KeyRange(*span, *bound, False) for span, bound in zip(spans, bounds)]
    sure = P.text(keep, False)
    doubtful = [n for n, r in enumerate(out) if sure != P.NO and r.j0 < r.j1 and not _corner_is_dead(keep, r)]
    if doubtful:
        try:
            with P.solver() as context:
                dead = isl.Map(f"{head} not ({sure}) }}", context)
                boxes = "; ".join(f"[{n}] -> [j] : {out[n].j0} <= j < {out[n].j1}" for n in doubtful)
                wrong = dead.intersect(isl.Map(f"{{ {boxes} }}", context)).domain().indicator_function()
                for n, is_wrong in enumerate(_values(wrong, len(spans))):
                    out[n] = out[n]._replace(full=n in doubtful and not is_wrong)
        except P.TooHard:
            pass
    return tuple(out)


def _parametric(some: str, count: int) -> list[tuple[int, int]]:
    """Return [j0, j1) of each block by one projection: first and last live key as functions of the block's index."""
    with P.solver() as context:
        keys = isl.Map(some, context)
        pairs = zip(_values(keys.dim_min(0), count), _values(keys.dim_max(0), count))
        return [(0, 0) if low is None or high is None else (low, high + 1) for low, high in pairs]


def _one_by_one(some: str, count: int) -> list[tuple[int, int]]:
    """Return [j0, j1) of each block by one projection per block, for masks too hard for the parametric one."""
    with P.solver(5) as context:
        keys, out = isl.Map(some, context), []
        for n in range(count):
            seen = keys.intersect_domain(isl.Set(f"{{ [{n}] }}", context)).range()
            low, high = seen.dim_min_val(0), seen.dim_max_val(0)
            out.append((low.to_python(), high.to_python() + 1) if low.is_int() else (0, 0))
        return out


def _values(function: isl.PwAff, count: int) -> list[int | None]:
    """Return function(0) to function(count - 1), each None if undefined."""
    at, context = isl.Point.zero(function.get_domain_space()), function.get_ctx()
    points = (at.set_coordinate_val(isl.dim_type.set, 0, isl.Val(n, context)) for n in range(count))
    values = [function.eval(p) for p in points]
    return [None if v.is_nan() else v.to_python() for v in values]


class _Opaque(Exception):
    pass


def _corner_is_dead(keep: Expr, r: KeyRange) -> bool:
    """Return whether a corner of the range is masked: a cheap refutation of `full` before the solver runs."""

    def refuse(slot: object, index: tuple[int, ...]) -> int:
        raise _Opaque

    for i, j in ((r.i0, r.j1 - 1), (r.i1 - 1, r.j0), (r.i0, r.j0), (r.i1 - 1, r.j1 - 1)):
        try:
            if not evaluate(keep, {"b": 0, "h": 0, "i": i, "j": j}, refuse):
                return True
        except (_Opaque, KeyError):  # a load, or a score
            return False
    return False


@analysis(maxsize=1024)
def key_span(_: Expr, keep: Expr, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return [first, end) of the keys that some row may see, from the affine conditions on only i and j. With many rows
    it is not the smallest range, but it takes about 0.1 ms, without the solver."""
    first, end = 0, sizes["S"]
    for e in keep.args if keep.op == "and" else (keep,):
        if e.op != "ge0" or e.args[0].kind != INT:
            continue
        terms = {tuple(x.value for x in m): c for m, c in poly.of(e.args[0]).items()}
        if not terms.keys() <= {(), ("i",), ("j",)}:
            continue
        by_key, by_row = terms.get(("j",), 0), terms.get(("i",), 0)
        most = terms.get((), 0) + max(0, by_row * (sizes["T"] - 1))  # largest sum of the other terms
        if by_key > 0:
            first = max(first, -(most // by_key))
        elif by_key < 0:
            end = min(end, most // -by_key + 1)
    return first, max(first, end)


@analysis(maxsize=1024)
def rows_live(_: Expr, keep: Expr, sizes: Mapping[str, int]) -> bool:
    """Return whether every row (b, h, i) provably keeps a live key, so that a fill never decides a row."""
    names = P.hidden(keep.free, "j")
    try:
        with P.solver() as context:
            rows = isl.Set(f"{{ [{', '.join(names)}] : {P.domain(sizes, names)} }}", context)
            sure = f"exists j : {P.domain(sizes, 'j')} and ({P.text(keep, False)})"
            return rows.is_subset(isl.Set(f"{{ [{', '.join(names)}] : {sure} }}", context))
    except P.TooHard:
        return False
