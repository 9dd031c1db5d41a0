"""Read parts as one: operands that are parts of one tensor, and products whose operands come in parts along an axis.

Part n has the variable `along[n]` for its own piece of the axis. The pieces follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.lift.access import UNIT, Access, Operand, accesses, free
from attnfx.passes.lift.contraction import contraction
from attnfx.passes.lift.emitter import CannotEmit, Emitter
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.tables import Index

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """The sum over `reduced` of left[..] * right[..]: the value of the product `node` at an index."""

    node: Node
    left: Access
    right: Access
    reduced: Expr

    @property
    def alone(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the variables that the left operand has and the right one lacks, and the other way round."""
        left, right = free(self.left.index), free(self.right.index)
        return left - right, right - left


def terms(slot: object, index: Index, factor: Expr = UNIT) -> list[Term]:
    """Return the term of `factor` * slot[index] twice, with each operand on the left; empty if it is not a product."""
    c = contraction(slot, index)
    if c is None:
        return []
    left, right = Access(c.left, c.left_index), Access(c.right, c.right_index)
    return [Term(c.node, replace(x, factor=factor), y, c.reduced) for x, y in ((left, right), (right, left))]


def common(lifter: Lifter, found: Sequence[Access | Operand]) -> list[Access] | None:
    """Return the operands as read at the nearest node that all of them come from by one factor, or None."""
    ways = [{(x.node, x.factor, x.upcast): x for x in accesses(lifter, at.node, at.index)} for at in found]
    return next(([way[at] for way in ways] for at in ways[0] if all(at in way for way in ways)), None)


def joined(along: Sequence[Expr]) -> Expr:
    """Return a variable that runs over all pieces of an axis."""
    return A.var("joined", A.add(*(own.args[0] for own in along)))


def united(lifter: Lifter, parts: Sequence[Access], along: Sequence[Expr], axis: Expr) -> Access | None:
    """Return one operand over `axis` that reads all parts if they follow one another in one tensor, else None."""
    found = common(lifter, parts)
    if found is None or found[0].factor is not UNIT or found[0].upcast:
        return None
    start, read = A.ZERO, []
    for x, own in zip(found, along, strict=True):
        read.append(x.at({own: A.sub(axis, start)}))
        start = A.add(start, own.args[0])
    return read[0] if len({x.index for x in read}) == 1 else None


def product(
    emit: Emitter, sides: Sequence[Sequence[Access]], along: Sequence[Expr], axis: Expr, reduced: Expr, out: Index
) -> Node:
    """Emit the sum over `reduced` of two operands, at `out`. An operand in parts is concatenated along `axis`, which is
    a variable of `out` or `reduced`; one without parts is over `axis` itself. Raises CannotEmit, also if no
    dimension of the other operand is missing in all parts: they would be expanded along its rows."""
    every = [*out, reduced] if reduced not in out else [*out]
    spans = []
    for side in sides:
        names = frozenset().union(*(free(x.index) for x in side))
        spans.append([v for v in every if v.value in names or (v is axis and len(side) > 1)])
    for whole, side in ((spans[0], sides[1]), (spans[1], sides[0])):
        rows = [{v for v in whole if v.value not in free(x.index) and v is not axis} for x in side]
        if all(rows) and not frozenset.intersection(*map(frozenset, rows)):
            raise CannotEmit("the parts would be expanded along the rows of the other operand")
    missing = [v for v in out if v not in spans[0] and v not in spans[1]]
    if any(v.args[0] is not A.ONE for v in missing):
        raise CannotEmit("a dimension is in none of the operands")
    spans[1] = [v for v in every if v in spans[1] or v in missing]
    operands = []
    for side, span in zip(sides, spans, strict=True):
        made = []
        for x, own in zip(side, along if len(side) > 1 else [axis], strict=True):
            axes = [own if v is axis else v for v in span]
            part = emit.shaped(emit.operand(Operand(x.node, x.index), axes), axes, [a.args[0] for a in axes])
            made.append(part if x.factor is UNIT else emit.call(aten.mul.Scalar, part, x.factor.value))
        operands.append(emit.call(aten.cat.default, made, span.index(axis)) if len(made) > 1 else made[0])
    letters = dict(zip(every, ascii_lowercase, strict=False))
    left, right, result = ("".join(letters[v] for v in span) for span in (*spans, out))
    return emit.call(aten.einsum.default, f"{left},{right}->{result}", operands)
