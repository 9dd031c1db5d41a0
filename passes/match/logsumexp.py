"""Recognize a softmax in a lifted value: its weights, or the logarithm of the sum of its exponentials."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.exponentials import ZERO, Term, addends, summed, without_zeros
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
    logs = [t for t in addends(lifted) if t.op == "log" and t.args[0].op == "rsum"]
    found = summed(Term(ZERO, logs[0].args[0])) if len(logs) == 1 else None
    if found is None:
        return
    variable, score = found
    j = A.var(f"keys_{final.name}", variable.args[0])
    score = substitute(score, {variable: j})
    if more := [t for t in addends(lifted) if t is not logs[0]]:
        if not _never_empty(match):
            return  # subtracting a row maximum of -inf gives NaN
        score = without_zeros(A.add(score, *more))
    yield N.Normalised(score, A.PROB, safe=match.spec.safe), j


def _never_empty(match: Match) -> bool:
    """Return whether each row provably has a score other than -inf."""
    return not any(c.kind == "f" for c in match.spec.captures) and match.every_row_live
