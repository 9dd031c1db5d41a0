"""Recognize a softmax in a lifted value: its weights, or the logarithm of the sum of its exponentials."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import Expr
from attnfx.passes.lift.tables import Index
from attnfx.passes.match import softmax as N
from attnfx.passes.match.results import Match


def normalised(lifted: Expr, dimensions: Index) -> Iterator[tuple[N.Normalised, Expr]]:
    """Yield (the softmax of the weights, the key), for each dimension that may be the keys'."""
    for j in reversed(dimensions):
        try:
            yield N.normalise(lifted, j), j
        except N.NotNormalised:
            continue


def exponentials(lifted: Expr, final: Node, match: Match) -> Iterator[tuple[N.Normalised, Expr]]:
    """Yield (the softmax of the scores x, the key) if `final` is log(sum(exp(x))), for the weights of a match. t +
    log(sum(exp(x))) counts as log(sum(exp(x + t)))."""
    terms = lifted.args if lifted.op == "add" else (lifted,)
    sums = [t for t in terms if t.op == "log" and t.args[0].op == "rsum"]
    if len(sums) != 1:
        return
    (total,) = sums[0].args
    inside, count = total.args
    score = N.exponent(inside)
    if score is None:
        return
    j = A.var(f"keys_{final.name}", count)
    score = substitute(score, {A.var(str(total.value), count): j})
    if more := [t for t in terms if t is not sums[0]]:
        if not _never_empty(match):
            return  # subtracting a row maximum of -inf gives NaN
        score = _without_zeros(A.add(score, *more))
    yield N.Normalised(score, A.PROB, safe=match.spec.safe), j


def _never_empty(match: Match) -> bool:
    """Return whether each row provably has a score other than -inf."""
    return not any(c.kind == "f" for c in match.spec.captures) and match.every_row_live


def _without_zeros(score: Expr) -> Expr:
    """Remove the row maxima that cancelled in sums and left 0 * maximum."""

    def cancelled(e: Expr) -> bool:
        return e.op == "mul" and e.args[0] is A.const(0.0) and e.args[1].op == "rmax"

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        return A.add(*(a for a in args if not cancelled(a))) if old.op == "add" and any(map(cancelled, args)) else None

    return rebuild(score, change)
