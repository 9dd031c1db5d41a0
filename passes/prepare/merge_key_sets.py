"""Merge attention over several sets of keys, with a product for each, into one product over all of them.

    w = softmax(cat([q @ k1.mT, q @ k2.mT], -1));   w[..., :n] @ v1 + w[..., n:] @ v2
        becomes   softmax(q @ cat([k1, k2], -2).mT, -1) @ cat([v1, v2], -2)

Products of one query with several sets of keys that meet in one softmax become slices of one product. A sum of products
of slices of one tensor with several sets of values becomes one product. Both are einsums over operands that are brought
to common axes and concatenated. Needs `meta["val"]`; changes the graph in place; promises the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr, walk
from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import Facts, written
from attnfx.passes.fx.nodes import CATS, argument, dims, is_tensor, op_name, take_place, value
from attnfx.passes.lift.access import variables
from attnfx.passes.lift.emitter import CannotEmit
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.parts import Term, common, joined, product, terms, united
from attnfx.passes.lift.products import batched, comes_from, reaches_softmax
from attnfx.passes.lift.tables import POINTWISE, VIEWS

aten = torch.ops.aten
LARGEST = 96  # nodes from a part of the scores back to its product and other operands


def run(graph: Graph) -> int:
    """Merge the products of several sets of keys, or of values, into one; return how many became part of another."""
    changed = 0
    for n in list(graph.gm.graph.nodes):
        if n.op != "call_function" or not is_tensor(n):
            continue
        if op_name(n) in CATS and reaches_softmax(n):
            how = _scores
        elif op_name(n) == "add" and _of_products(n):
            how = _values
        else:
            continue
        made = how(graph, n)
        if made:
            graph.grew()
            changed += made
    return changed


def _of_products(n: Node) -> bool:
    alone = (isinstance(x, Node) and batched(x) for x in n.args)
    return len(n.args) == 2 and not n.kwargs and all(alone)


# -- products of one query with several sets of keys ----------------------------------------------
def _scores(graph: Graph, at: Node) -> int:
    facts, lifter = graph.facts, graph.lifter
    given: list[Node] = list(at.args[0])  # type: ignore[arg-type]
    dim = argument(at, 1, "dim", 0)
    if not isinstance(dim, int) or len(given) < 2 or any(len(dims(x)) != len(dims(at)) for x in given):
        return 0
    found: list[tuple[int, Term, Expr]] = []
    chains = [_chain(x, facts) for x in given]
    for n, part in enumerate(given):
        options = _of_part(lifter, part, dim % len(dims(at))) if chains[n] else []
        known = next((x for x in options if not found or _alike(lifter, found[0][1:], x)), None)
        if known is not None:
            found.append((n, *known))
    if len(found) < 2:
        return 0
    _, first, axis = found[0]
    along = [own for _, _, own in found]
    total = joined(along)
    out = tuple(total if v is axis else v for v in variables(first.node))
    keys = [t.right.at({t.reduced: first.reduced}) for _, t, _ in found]
    emit = graph.emitter(at)
    try:
        made = product(emit, [[first.left], keys], along, total, first.reduced, out)
    except CannotEmit:
        return 0
    start: Expr = A.ZERO
    for n, term, own in found:
        end = A.add(start, own.args[0])
        piece = emit.call(aten.slice.Tensor, made, out.index(total), emit.size(start), emit.size(end))
        given[n], start = _copied(graph, chains[n], {term.node: piece}, at)[given[n]], end
    at.args = (given, *at.args[1:])
    return len(found) - 1


def _copied(graph: Graph, nodes: Sequence[Node], made: dict[Node, Node], at: Node) -> dict[Node, Node]:
    """Copy before `at` each node that is not in `made`, with operands from `made`; return `made` with the copies."""
    for n in nodes:
        if n not in made:
            with at.graph.inserting_before(at):
                made[n] = at.graph.node_copy(n, lambda x: made.get(x, x))
            graph.made.append(made[n])
    return made


def _chain(part: Node, facts: Facts) -> list[Node]:
    """Return the one product that a part comes from, then the pointwise operators and views up to the part, in order.
    Empty if there is more or less than one product, or if one of these nodes is written in place."""

    def before(n: Node) -> list[Node]:
        known = not batched(n) and (op_name(n) in POINTWISE or op_name(n) in VIEWS)
        return list(filter(is_tensor, n.all_input_nodes)) if known else []

    found = list(islice(reach([part], before), LARGEST + 1))
    products = list(filter(batched, found))
    if len(found) > LARGEST or len(products) != 1:
        return []
    between = [n for n in found if facts.descends(n, products[0])]
    if len({facts.regions[n] for n in between}) != 1 or written(facts, between):
        return []
    return sorted(between)


def _of_part(lifter: Lifter, part: Node, dim: int) -> list[tuple[Term, Expr]]:
    """Return the product of a part, with the queries on the left, and the variable of its keys. A set of one key may be
    along any dimension of size 1: return each reading, the last dimension first. Empty if there is no product."""
    at = tuple(A.var(f"p{d}", n) for d, n in enumerate(dims(part)))
    for e in walk(lifter.lift(part, at)):
        if e.op != "load" or not isinstance(e.value, Node) or not batched(e.value):
            continue
        places = [d for d, x in enumerate(e.args) if at[dim].free & x.free]
        if at[dim].args[0] is A.ONE:
            places = [d for d, n in enumerate(dims(e.value)) if n is A.ONE and e.args[d] is A.ZERO][::-1]
        elif len(places) != 1 or e.args[places[0]] is not at[dim]:
            continue
        here = variables(e.value)
        return [(t, here[d]) for d in places for t in terms(e.value, here) if here[d].value in t.alone[1]]
    return []


def _alike(lifter: Lifter, one: tuple[Term, Expr], other: tuple[Term, Expr]) -> bool:
    """Return whether two products differ in their set of keys alone."""
    (first, _), (second, _) = one, other
    mine, theirs = (
        [None if v is own else v for v in variables(t.node)] + [value(t.node).dtype, t.reduced.args[0]]
        for t, own in (one, other)
    )
    if mine != theirs:
        return False
    read = common(lifter, [first.left, second.left.at({second.reduced: first.reduced})])
    return read is not None and read[0].index == read[1].index


# -- several parts of the weights with the values of each -----------------------------------------
def _values(graph: Graph, at: Node) -> int:
    facts, lifter = graph.facts, graph.lifter
    left, right = at.args
    assert isinstance(left, Node) and isinstance(right, Node)
    if left is right or written(facts, [left, right]) or len({facts.regions[n] for n in (at, left, right)}) != 1:
        return 0
    if dims(left) != dims(right) or len({value(n).dtype for n in (at, left, right)}) != 1:
        return 0
    out = variables(left)
    pairs = [(x, y) for x in terms(left, out) for y in terms(right, out)]
    for one, other in (*pairs, *((y, x) for x, y in pairs)):
        along = [one.reduced, other.reduced]
        total = joined(along)
        whole = united(lifter, [one.left, other.left], along, total)
        if whole is None or not comes_from(whole.node, lambda n: "softmax" in op_name(n)):
            continue
        try:
            made = product(graph.emitter(at), [[whole], [one.right, other.right]], along, total, total, out)
        except CannotEmit:
            continue
        take_place(made, at)
        return 1
    return 0
