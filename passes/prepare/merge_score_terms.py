"""Merge scores that are a sum of products of queries with keys into one product over all their widths.

    q1 @ k1.mT * a + q2 @ k2.mT * b   becomes   cat([q1 * a, q2 * b], -1) @ cat([k1, k2], -1).mT

Such sums score content and position apart, or the rotated part of a head and the rest. Each product must have the rows
on one side and the keys on the other: a table that is read at i - j has both on one side. Needs `meta["val"]`; changes
the graph in place; promises the same results up to rounding.
"""

from __future__ import annotations

import math

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.analysis import written
from attnfx.passes.fx.nodes import dims, is_tensor, op_name, slot_node, take_place, value
from attnfx.passes.lift.access import Access, free, variables
from attnfx.passes.lift.emitter import CannotEmit
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.parts import Term, joined, product, terms
from attnfx.passes.lift.products import batched, reaches_softmax

SUMS = ("add", "sub", "baddbmm", "addmm")


def run(graph: Graph) -> int:
    """Merge each sum of products into one product of wider operands; return how many were merged."""
    return sum(_merged(graph, n) for n in list(graph.gm.graph.nodes) if op_name(n) in SUMS and is_tensor(n))


def _merged(graph: Graph, n: Node) -> bool:
    made = _united(graph, n) if len(dims(n)) > 2 and reaches_softmax(n) else None
    if made is not None:
        take_place(made, n)
        graph.grew()
    return made is not None


def _united(graph: Graph, at: Node) -> Node | None:
    facts, out = graph.facts, variables(at)
    ways = _addends(graph.lifter.lift(at, out), at)
    nodes = [at, *(t.node for way in ways for t in way)]
    if len(ways) < 2 or not all(ways) or written(facts, nodes) or len({facts.regions[x] for x in nodes}) != 1:
        return None
    for row, column in _partitions(ways[0], out):
        found = [t for way in ways for t in way if row.value in t.alone[0] and column.value in t.alone[1]]
        sides, along = [[t.left for t in found], [t.right for t in found]], [t.reduced for t in found]
        if len(found) == len(ways) and all(_as_large(side, along) for side in sides):
            try:
                return product(graph.emitter(at), sides, along, whole := joined(along), whole, out)
            except CannotEmit:
                return None
    return None


def _addends(e: Expr, at: Node) -> list[list[Term]]:
    """Return the terms of each product of a sum, with either operand on the left; empty for any other sum."""
    while e.op == "half":
        e = e.args[0]
    out = []
    for addend in e.args if e.op == "add" else ():
        factors = [f.args[0] if f.op == "half" else f for f in (addend.args if addend.op == "mul" else (addend,))]
        loads = [f for f in factors if f.op == "load"]
        numbers = [float(f.value) for f in factors if f.op == "const"]  # type: ignore[arg-type]
        if len(loads) != 1 or len(numbers) != len(factors) - 1:
            return []
        node = slot_node(loads[0].value)
        if not batched(node) or value(node).dtype != value(at).dtype:
            return []
        out.append(terms(loads[0].value, loads[0].args, A.const(math.prod(numbers, start=1.0))))
    return out


def _partitions(way: list[Term], out: tuple[Expr, ...]) -> list[tuple[Expr, Expr]]:
    """Return the variables that may be the rows' and the keys': on each side alone, the last ones first."""
    alone = [[[v for v in reversed(out) if v.value in names] for names in t.alone] for t in way]
    return [(row, column) for rows, columns in alone for row in rows for column in columns]


def _as_large(side: list[Access], along: list[Expr]) -> bool:
    """Return whether a merged operand has the axes of one of its parts: otherwise it would be larger than all of them,
    as a table of positions that is copied for each row of the queries."""
    axes = [free(x.index) - {own.value} for x, own in zip(side, along, strict=True)]
    return frozenset().union(*axes) in axes
