"""Merge attention over several sets of keys, with a product for each, into one product over all of them.

    w = softmax(cat([q @ k1.mT, q @ k2.mT], -1));   w[..., :n] @ v1 + w[..., n:] @ v2
        becomes   softmax(q @ cat([k1, k2], -2).mT, -1) @ cat([v1, v2], -2)

Products of one query with several sets of keys that meet in one softmax become slices of one product. A sum of products
of slices of one tensor with several sets of values becomes one product. Both are einsums over operands that are brought
to common axes and concatenated. Needs `meta["val"]`; changes the graph in place; promises the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import Expr, walk
from attnfx.passes.fx.analysis import Facts, written
from attnfx.passes.fx.nodes import CATS, dims, is_tensor, op_name, take_place, value
from attnfx.passes.lift.access import UNIT, Operand, accesses, free, variables
from attnfx.passes.lift.contraction import contraction
from attnfx.passes.lift.emitter import CannotEmit, Emitter
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.products import NEAR, batched, reaches_softmax
from attnfx.passes.lift.tables import POINTWISE, VIEWS, Index

aten = torch.ops.aten


@dataclass(frozen=True)
class Half:
    """One product, the sum over `reduced` of common[..] * own[..], at an index over variables of its dimensions.

    common   the operand that the products share: the queries, or a part of the weights
    own      the operand that each product has alone: a set of keys, or of values
    axis     the variable that runs over the set
    """

    product: Node
    common: Operand
    own: Operand
    reduced: Expr
    axis: Expr


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
            graph.changed()
            changed += made
    return changed


def _of_products(n: Node) -> bool:
    return len(n.args) == 2 and not n.kwargs and all(isinstance(x, Node) and batched(x) for x in n.args)


def _comes_from_softmax(n: Node) -> bool:
    for _ in range(NEAR):
        if "softmax" in op_name(n):
            return True
        source = n.args[0] if n.op == "call_function" and n.args else None
        if not isinstance(source, Node):
            return False
        n = source
    return False


def _halves(n: Node, at: Index, axis: Expr | None) -> Iterator[Half]:
    """Yield a product as common and own operand. `axis` runs over the set; None stands for the reduced variable."""
    c = contraction(n, at)
    if c is None:
        return
    left, right = Operand(c.left, c.left_index), Operand(c.right, c.right_index)
    for common, own in ((left, right), (right, left)):
        if axis is None:
            yield Half(n, common, own, c.reduced, c.reduced)
        elif axis.free & free(own.index) and not axis.free & free(common.index):
            yield Half(n, common, own, c.reduced, axis)


def _einsum(emit: Emitter, common: Operand, summed: Expr, halves: Sequence[Half], out: Index, axis: Expr) -> Node:
    """Emit the product of `common` with all sets, joined along `axis`, which is a variable of `out` or `summed`."""
    # a dimension of size 1 may be in neither operand, and then belongs to the sets
    of_sets = frozenset().union(*(free(h.own.index) for h in halves))
    shared = [v for v in out if v is not axis and (v.value in of_sets or v.value not in free(common.index))]
    rest = [axis] if axis is summed else [axis, summed]
    sets = []
    for h in halves:
        axes = [*shared, h.axis] if axis is summed else [*shared, h.axis, h.reduced]
        sets.append(emit.shaped(emit.operand(h.own, axes), axes, [a.args[0] for a in axes]))
    joined = emit.call(aten.cat.default, sets, len(shared))
    axes = [v for v in (*out, summed) if v.value in free(common.index)]
    letters = {v: ascii_lowercase[n] for n, v in enumerate(dict.fromkeys((*out, summed)))}
    terms = ["".join(letters[v] for v in vs) for vs in (axes, [*shared, *rest], out)]
    return emit.call(aten.einsum.default, f"{terms[0]},{terms[1]}->{terms[2]}", [emit.operand(common, axes), joined])


# -- products of one query with several sets of keys ----------------------------------------------
def _scores(graph: Graph, at: Node) -> int:
    facts, lifter = graph.facts, graph.lifter
    given: list[Node] = list(at.args[0])  # type: ignore[arg-type]
    dim = at.args[1] if len(at.args) > 1 else at.kwargs.get("dim", 0)
    if not isinstance(dim, int) or len(given) < 2 or any(len(dims(x)) != len(dims(at)) for x in given):
        return 0
    found: list[tuple[int, Half]] = []
    chains = [_chain(x, facts) for x in given]
    for n, part in enumerate(given):
        half = _half_of_part(lifter, part, dim % len(dims(at))) if chains[n] else None
        if half is not None and (not found or _alike(lifter, found[0][1], half)):
            found.append((n, half))
    if len(found) < 2:
        return 0
    first, emit = found[0][1], graph.emitter(at)
    total = A.var(str(first.axis.value), A.add(*(h.axis.args[0] for _, h in found)))
    out = tuple(total if v is first.axis else v for v in variables(first.product))
    try:
        product = _einsum(emit, first.common, first.reduced, [h for _, h in found], out, total)
    except CannotEmit:
        return 0
    start: Expr = A.ZERO
    for n, half in found:
        end = A.add(start, half.axis.args[0])
        piece = emit.call(aten.slice.Tensor, product, out.index(total), emit.size(start), emit.size(end))
        given[n], start = _copied(chains[n], {half.product: piece}, at)[given[n]], end
    at.args = (given, *at.args[1:])
    return len(found) - 1


def _copied(nodes: Sequence[Node], made: dict[Node, Node], at: Node) -> dict[Node, Node]:
    """Copy before `at` each node that is not in `made`, with operands from `made`; return `made` with the copies."""
    for n in nodes:
        if n not in made:
            with at.graph.inserting_before(at):
                made[n] = at.graph.node_copy(n, lambda x: made.get(x, x))
    return made


def _chain(part: Node, facts: Facts) -> list[Node]:
    """Return the one product that a part comes from, then the pointwise operators and views up to the part, in order.
    Empty if there is more or less than one product, or if one of these nodes is written in place."""
    found, stack, products = {part}, [part], set()
    while stack:
        n = stack.pop()
        if n.op == "call_function" and batched(n):
            products.add(n)
        elif n.op == "call_function" and (op_name(n) in POINTWISE or op_name(n) in VIEWS):
            fresh = [a for a in n.all_input_nodes if a not in found and is_tensor(a)]
            found.update(fresh)
            stack += fresh
        if len(found) > 8 * NEAR:
            return []
    if len(products) != 1:
        return []
    (product,) = products
    between = [n for n in found if facts.descends(n, product)]
    if len({facts.regions[n] for n in between}) != 1 or written(facts, between):
        return []
    return sorted(between, key=facts.position.__getitem__)


def _half_of_part(lifter: Lifter, part: Node, dim: int) -> Half | None:
    """Return the product of a part as a half whose own operand is the part's keys, or None."""
    at = tuple(A.var(f"p{d}", n) for d, n in enumerate(dims(part)))
    for e in walk(lifter.lift(part, at)):
        if e.op != "load" or not isinstance(e.value, Node) or not batched(e.value):
            continue
        places = [d for d, x in enumerate(e.args) if at[dim].free & x.free]
        if len(places) == 1 and e.args[places[0]] is at[dim]:
            here = variables(e.value)
            return next(_halves(e.value, here, here[places[0]]), None)
    return None


def _alike(lifter: Lifter, one: Half, other: Half) -> bool:
    """Return whether two products differ in their set of keys alone."""
    mine, theirs = (
        [None if v is h.axis else v for v in variables(h.product)] + [value(h.product).dtype, h.reduced.args[0]]
        for h in (one, other)
    )
    if mine != theirs:
        return False
    there = {other.reduced: one.reduced}
    ways = [list(accesses(lifter, h.common.node, h.common.index)) for h in (one, other)]
    same = [(x.node, x.index, x.factor) for x in ways[0]]
    moved = [(x.node, tuple(substitute(e, there) for e in x.index), x.factor) for x in ways[1]]
    return any(x in same for x in moved)


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
    pairs = [(x, y) for x in _halves(left, out, None) for y in _halves(right, out, None)]
    for one, other in (*pairs, *((y, x) for x, y in pairs)):
        total = A.var("united", A.add(one.reduced.args[0], other.reduced.args[0]))
        whole = _continued(lifter, one, other, total)
        if whole is None or not _comes_from_softmax(whole.node):
            continue
        try:
            made = _einsum(graph.emitter(at), whole, total, [one, other], out, total)
        except CannotEmit:
            continue
        take_place(made, at)
        return 1
    return 0


def _continued(lifter: Lifter, one: Half, other: Half, total: Expr) -> Operand | None:
    """Return the weights of both, at `total`, if `other` begins where `one` ends in the same tensor; else None."""
    theirs = [(x.node, x.index, x.factor) for x in accesses(lifter, other.common.node, other.common.index)]
    for x in accesses(lifter, one.common.node, one.common.index):
        moved = {one.reduced: A.add(other.reduced, one.reduced.args[0])}
        if (x.node, tuple(substitute(e, moved) for e in x.index), x.factor) in theirs and x.factor is UNIT:
            return Operand(x.node, tuple(substitute(e, {one.reduced: total}) for e in x.index))
    return None
