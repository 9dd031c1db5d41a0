"""Expressions that depend on i and j through j - i only: a block's values lie along its diagonals."""

from __future__ import annotations

from functools import lru_cache

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import FLOAT, Expr, node, walk

OPAQUE = frozenset(("dot", "prob"))
SPAN = "w"  # the variable of a diagonal: w = j - i + T - 1, from 0 to T + S - 2


@lru_cache(maxsize=10_000)
def opaque(e: Expr) -> bool:
    """Whether the expression depends on the block's own scores."""
    return any(x.op in OPAQUE for x in walk(e))


@lru_cache(maxsize=10_000)
def toeplitz(e: Expr) -> Expr | None:
    """The expression over the diagonal `w` alone (and b, h), where it depends on i and j through j - i only."""
    if not {"i", "j"} <= e.free or opaque(e):
        return None
    variables = {str(x.value): x for x in walk(e) if x.op == "var"}
    i, j = variables["i"], variables["j"]
    last_row = A.sub(i.args[0], A.ONE)
    along = A.var(SPAN, A.add(last_row, j.args[0]))
    by = {j: A.sub(A.add(i, along), last_row)}

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        # a sum of converted indices is converted as a whole: only among integers do terms cancel
        whole = A.as_integer(old) if old.kind == FLOAT and old.op in ("add", "mul") else None
        return by.get(old) if whole is None else node("float", FLOAT, (substitute(whole, by),))

    moved = rebuild(e, change)
    return None if {"i", "j"} & moved.free else moved
