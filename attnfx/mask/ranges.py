"""Which keys a block of queries can see."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import islpy as isl

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.ir.interpret import evaluate
from attnfx.mask import polyhedron as P
from attnfx.mask.keep import live
from attnfx.spec import AttentionSpec


class KeyRange(NamedTuple):
    """Queries [i0, i1) see no key outside [j0, j1); `full` where they see every key inside."""

    i0: int
    i1: int
    j0: int
    j1: int
    full: bool


def key_ranges(spec: AttentionSpec | Expr, sizes: Mapping[str, int], block: int) -> tuple[KeyRange, ...]:
    """The smallest key interval of each block of `block` queries, for all b and h together.

    `sizes` has numbers for B, H, T, S and the spec's own sizes. A row without a live key gets no key at all from
    this: where the fill is finite, such a row averages over every key, and `rows_live` says whether there is one.
    """
    return _key_ranges(live(spec), tuple(sorted(sizes.items())), block)


@lru_cache(maxsize=1024)
def _key_ranges(keep: Expr, items: tuple[tuple[str, int], ...], block: int) -> tuple[KeyRange, ...]:
    sizes = dict(items)
    T, S = sizes["T"], sizes["S"]
    spans = [(i0, min(i0 + block, T)) for i0 in range(0, T, block)]
    keep = P.numeric(keep, sizes)
    if keep is A.TRUE:
        return tuple(KeyRange(*span, 0, S, True) for span in spans)
    try:
        with P.solver() as context:
            return _solve(context, keep, sizes, block, spans)
    except P.TooHard:
        return tuple(KeyRange(*span, 0, S, False) for span in spans)


def _solve(
    context: isl.Context, keep: Expr, sizes: dict[str, int], block: int, spans: list[tuple[int, int]]
) -> tuple[KeyRange, ...]:
    """One parametric projection: the first and last live key as functions of the block's number."""
    names = P.hidden(keep, "j")
    within = f"{P.domain(sizes, names + 'j')} and {block} t <= i < {block} t + {block}"
    head = f"{{ [t] -> [j] : exists {', '.join(names)} : {within} and "
    some = isl.Map(f"{head} ({P.text(keep, True)}) }}", context)
    low, high = some.dim_min(0), some.dim_max(0)
    at = isl.Point.zero(low.get_domain_space())
    out = []
    for number, span in enumerate(spans):
        point = at.set_coordinate_val(isl.dim_type.set, 0, isl.Val(number, context))
        first = low.eval(point)
        j0, j1 = (0, 0) if first.is_nan() else (first.to_python(), high.eval(point).to_python() + 1)
        out.append(KeyRange(*span, j0, j1, False))
    sure = P.text(keep, False)
    if sure == P.NO:
        return tuple(out)
    doubtful = [n for n, r in enumerate(out) if r.j0 < r.j1 and not _corner_is_dead(keep, r)]
    if doubtful:
        dead = isl.Map(f"{head} not ({sure}) }}", context)
        for n in doubtful:
            i0, i1, j0, j1, _ = out[n]
            box = isl.Map(f"{{ [{n}] -> [j] : {j0} <= j < {j1} }}", context)
            out[n] = KeyRange(i0, i1, j0, j1, dead.is_disjoint(box))
    return tuple(out)


class _Opaque(Exception):
    pass


def _corner_is_dead(keep: Expr, r: KeyRange) -> bool:
    """A cheap refutation, before the solver is asked."""

    def refuse(slot: object, index: tuple[int, ...]) -> int:
        raise _Opaque

    for i, j in ((r.i0, r.j1 - 1), (r.i1 - 1, r.j0), (r.i0, r.j0), (r.i1 - 1, r.j1 - 1)):
        try:
            if not evaluate(keep, {"b": 0, "h": 0, "i": i, "j": j}, refuse):
                return True
        except (_Opaque, KeyError):  # a load, or a score
            return False
    return False


def rows_live(spec: AttentionSpec | Expr, sizes: Mapping[str, int]) -> bool:
    """Whether every row (b, h, i) provably keeps a live key: then no row is decided by a fill."""
    return _rows_live(live(spec), tuple(sorted(sizes.items())))


@lru_cache(maxsize=1024)
def _rows_live(keep: Expr, items: tuple[tuple[str, int], ...]) -> bool:
    sizes = dict(items)
    keep = P.numeric(keep, sizes)
    names = P.hidden(keep, "j")
    try:
        with P.solver() as context:
            rows = isl.Set(f"{{ [{', '.join(names)}] : {P.domain(sizes, names)} }}", context)
            sure = f"exists j : {P.domain(sizes, 'j')} and ({P.text(keep, False)})"
            return rows.is_subset(isl.Set(f"{{ [{', '.join(names)}] : {sure} }}", context))
    except P.TooHard:
        return False
