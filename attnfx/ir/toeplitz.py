"""Find Toeplitz expressions: they depend on i and j only through j - i, so they are constant along diagonals."""

from __future__ import annotations

from functools import lru_cache

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import FLOAT, Expr, node, walk

OPAQUE = frozenset(("dot", "prob"))
SPAN = "w"  # the variable of a diagonal: w = j - i + T - 1, from 0 to T + S - 2


@lru_cache(maxsize=10_000)
def opaque(e: Expr) -> bool:
    """Return whether the expression depends on the scores themselves."""
    return any(x.op in OPAQUE for x in walk(e))


@lru_cache(maxsize=10_000)
def toeplitz(e: Expr) -> Expr | None:
    """Rewrite a Toeplitz expression over the diagonal `w` (and b, h) instead of i and j; None if it is not Toeplitz."""
    if not {"i", "j"} <= e.free or opaque(e):
        return None
    variables = {str(x.value): x for x in walk(e) if x.op == "var"}
    i, j = variables["i"], variables["j"]
    last_row = A.sub(i.args[0], A.ONE)
    along = A.var(SPAN, A.add(last_row, j.args[0]))
    by = {j: A.sub(A.add(i, along), last_row)}

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        # convert a sum of converted indices as a whole: terms cancel only among integers
        whole = A.as_integer(old) if old.kind == FLOAT and old.op in ("add", "mul") else None
        return by.get(old) if whole is None else node("float", FLOAT, (substitute(whole, by),))

    moved = rebuild(e, change)
    return None if {"i", "j"} & moved.free else moved
