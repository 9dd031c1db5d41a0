"""Lift reductions and softmax: each binds a variable named after its node."""

from __future__ import annotations

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import FLOAT, Expr, node
from attnfx.passes.fx.nodes import Opaque, argument, axis, dims, op_name, shape
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.tables import REDUCTIONS, Index, rule
from attnfx.passes.lift.views import source


def bound(at: Node) -> str:
    return f"r_{at.name}"


def body(lifter: Lifter, at: Node, index: Index, dim: int) -> tuple[Expr, Expr, Expr]:
    """Return (expression, extent, variable) with the reduced index bound. `index` lacks the reduced dimension."""
    x = source(at)
    extent = dims(x)[dim]
    variable = A.var(bound(at), extent)
    return A.to_float(lifter.lift(x, (*index[:dim], variable, *index[dim:]))), extent, variable


@rule(REDUCTIONS, "softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax")
def _softmax(lifter: Lifter, at: Node, index: Index) -> Expr:
    dim = axis(at)
    inside, extent, _ = body(lifter, at, index[:dim] + index[dim + 1 :], dim)
    name = op_name(at)
    made = softmax(bound(at), extent, inside, index[dim], safe=name == "_safe_softmax")
    return A.unary("log", made) if "log" in name else made


def softmax(name: str, extent: Expr, inside: Expr, at: Expr, safe: bool = False) -> Expr:
    """Return the softmax of `inside` over the variable `name`, read at position `at`."""
    return node("softmax", FLOAT, (inside, extent, at), (name, safe))


def _one_dim(at: Node) -> tuple[int, bool]:
    """Return (reduced dimension, whether it is kept); other forms are opaque."""
    over = argument(at, 1, "dim")
    rank = len(shape(source(at)))
    if isinstance(over, list | tuple):
        if len(over) != 1:
            raise Opaque
        over = over[0]
    if not isinstance(over, int):
        raise Opaque
    return over % rank, bool(argument(at, 2, "keepdim", False))


def _without(index: Index, dim: int, kept: bool) -> Index:
    return (*index[:dim], *index[dim + 1 :]) if kept else index


@rule(REDUCTIONS, "sum", "mean")
def _sum(lifter: Lifter, at: Node, index: Index) -> Expr:
    dim, kept = _one_dim(at)
    inside, extent, _ = body(lifter, at, _without(index, dim, kept), dim)
    total = A.reduction("rsum", bound(at), extent, inside)
    return total if op_name(at) == "sum" else A.div(total, A.to_float(extent))


@rule(REDUCTIONS, "amax")
def reduce_max(lifter: Lifter, at: Node, index: Index) -> Expr:
    """Lift a maximum over one dimension or several, as a maximum of maxima."""
    x = source(at)
    rank, over = len(shape(x)), argument(at, 1, "dim")
    over = [over] if isinstance(over, int) else over or range(rank)
    if not isinstance(over, list | tuple | range) or not all(isinstance(d, int) for d in over) or not rank:
        raise Opaque
    reduced = sorted(d % rank for d in over)
    variables = {d: A.var(bound(at) + (f"_{d}" if len(reduced) > 1 else ""), dims(x)[d]) for d in reduced}
    kept = list(index)
    if argument(at, 2, "keepdim", False):
        kept = [e for d, e in enumerate(index) if d not in variables]
    for d in reduced:
        kept.insert(d, variables[d])
    made = A.to_float(lifter.lift(x, tuple(kept)))
    for v in variables.values():
        made = A.reduction("rmax", str(v.value), v.args[0], made)
    return made


@rule(REDUCTIONS, "getitem")
def _values_of_max(lifter: Lifter, at: Node, index: Index) -> Expr:
    parent = source(at)
    if at.args[1] != 0 or op_name(parent) != "max" or len(parent.args) < 2:
        raise Opaque
    return reduce_max(lifter, parent, index)


@rule(REDUCTIONS, "logsumexp")
def _logsumexp(lifter: Lifter, at: Node, index: Index) -> Expr:
    dim, kept = _one_dim(at)
    inside, extent, _ = body(lifter, at, _without(index, dim, kept), dim)
    return A.unary("log", A.reduction("rsum", bound(at), extent, A.unary("exp", inside)))
