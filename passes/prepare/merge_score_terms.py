"""Merge scores that are a sum of products of queries with keys into one product over all their widths.

    q1 @ k1.mT * a + q2 @ k2.mT * b   becomes   cat([q1 * a, q2 * b], -1) @ cat([k1, k2], -1).mT

Such sums score content and position apart, or the rotated part of a head and the rest. Each product must have the rows
on one side and the keys on the other: a table that is read at i - j has both on one side. Needs `meta["val"]`; changes
the graph in place; promises the same results up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.analysis import written
from attnfx.passes.fx.nodes import dims, is_tensor, op_name, slot_node, take_place, value
from attnfx.passes.lift.access import Operand, free, variables
from attnfx.passes.lift.contraction import contraction
from attnfx.passes.lift.emitter import CannotEmit, Emitter
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.products import batched, reaches_softmax

aten = torch.ops.aten
SUMS = ("add", "sub", "baddbmm")


@dataclass(frozen=True)
class Term:
    """The value `factor` * sum over `reduced` of query[..] * key[..]."""

    query: Operand
    key: Operand
    reduced: Expr
    factor: float


def run(graph: Graph) -> int:
    """Merge each sum of products into one product of wider operands; return how many were merged."""
    return sum(_merged(graph, n) for n in list(graph.gm.graph.nodes) if op_name(n) in SUMS and is_tensor(n))


def _merged(graph: Graph, n: Node) -> bool:
    made = _united(graph, n) if len(dims(n)) > 2 and reaches_softmax(n) else None
    if made is not None:
        take_place(made, n)
        graph.changed()
    return made is not None


def _united(graph: Graph, at: Node) -> Node | None:
    facts, out = graph.facts, variables(at)
    found = _terms(graph.lifter.lift(at, out), at)
    if len(found) < 2 or written(facts, [at, *(node for _, node, _ in found)]):
        return None
    if len({facts.regions[x] for x in (at, *(node for _, node, _ in found))}) != 1:
        return None
    ways = [_sides(factor, load, node) for factor, node, load in found]
    for rows, columns in _partitions(ways[0], out):
        terms = [t for way in ways if (t := next((t for t in way if _parted(t, rows, columns)), None)) is not None]
        if len(terms) == len(ways) and _as_large(terms):
            try:
                return _einsum(graph.emitter(at), terms, out)
            except CannotEmit:
                return None
    return None


def _terms(e: Expr, at: Node) -> list[tuple[float, Node, Expr]]:
    """Return (factor, product, load of it) for each term of a sum of products; empty for any other sum."""
    while e.op == "half":
        e = e.args[0]
    out = []
    for term in e.args if e.op == "add" else ():
        factors = [f.args[0] if f.op == "half" else f for f in (term.args if term.op == "mul" else (term,))]
        loads = [f for f in factors if f.op == "load"]
        if len(loads) != 1 or any(f.op != "const" for f in factors if f not in loads):
            return []
        node = slot_node(loads[0].value)
        if not batched(node) or value(node).dtype != value(at).dtype:
            return []
        factor = 1.0
        for f in factors:
            factor *= float(f.value) if f.op == "const" else 1.0  # type: ignore[arg-type]
        out.append((factor, node, loads[0]))
    return out


def _sides(factor: float, load: Expr, node: Node) -> list[Term]:
    c = contraction(node, load.args)
    if c is None:
        return []
    left, right = Operand(c.left, c.left_index), Operand(c.right, c.right_index)
    return [Term(left, right, c.reduced, factor), Term(right, left, c.reduced, factor)]


def _partitions(way: list[Term], out: tuple[Expr, ...]) -> list[tuple[Expr, Expr]]:
    """Return the variables that may be the rows' and the keys': on each side alone, the last ones first."""
    found = []
    for t in way:
        alone = [v for v in out if v.value in free(t.query.index) - free(t.key.index)]
        others = [v for v in out if v.value in free(t.key.index) - free(t.query.index)]
        found += [(r, c) for r in reversed(alone) for c in reversed(others)]
    return found


def _parted(t: Term, row: Expr, column: Expr) -> bool:
    query, key = free(t.query.index), free(t.key.index)
    return row.value in query - key and column.value in key - query


def _as_large(terms: list[Term]) -> bool:
    """Return whether each merged operand has the axes of one of its parts: otherwise it would be larger than all of
    them, as a table of positions that is copied for each row of the queries."""
    queries, keys = ([free(getattr(t, side).index) - {t.reduced.value} for t in terms] for side in ("query", "key"))
    return frozenset().union(*queries) in queries and frozenset().union(*keys) in keys


def _einsum(emit: Emitter, terms: list[Term], out: tuple[Expr, ...]) -> Node:
    letters = {v: ascii_lowercase[n] for n, v in enumerate(out)}
    width = ascii_lowercase[len(out)]
    sides, spelt = [], []
    for name in ("query", "key"):
        some = frozenset().union(*(free(getattr(t, name).index) for t in terms))
        shared = [v for v in out if v.value in some]
        wide = []
        for t in terms:
            axes = [*shared, t.reduced]
            made = emit.shaped(emit.operand(getattr(t, name), axes), axes, [a.args[0] for a in axes])
            wide.append(emit.call(aten.mul.Scalar, made, t.factor) if name == "query" and t.factor != 1 else made)
        sides.append(emit.call(aten.cat.default, wide, len(shared)))
        spelt.append("".join(letters[v] for v in shared) + width)
    there = [v for v in out if letters[v] in "".join(spelt)]
    if any(v not in there and v.args[0] is not A.ONE for v in out):
        raise CannotEmit("a dimension is in none of the operands")
    made = emit.call(aten.einsum.default, f"{spelt[0]},{spelt[1]}->{''.join(letters[v] for v in there)}", sides)
    for d, v in enumerate(out):
        if v not in there:
            made = emit.call(aten.unsqueeze.default, made, d)
    return made
