"""Merge a hand-written online softmax over chunks of keys into one softmax over all keys.

    for k, v in chunks:  s = q @ k.mT;  n = maximum(m, s.amax(-1, keepdim=True))
                         p = exp(s - n);  c = exp(m - n);  out = out * c + p @ v;  l = l * c + p.sum(-1, keepdim=True)
    out / l     becomes     softmax(cat(s), -1) @ cat(v)

The proof shows that a result is the sum of exp(e_c[i, j]) * v_c[j] over all chunks c and their keys j, divided by the
sum of exp(e_c[i, j]). Each e_c must be the score s_c plus one value of the row. With a fill of -inf, each row must keep
the first key: a row without a live key in its first chunk becomes NaN and stays NaN. Needs `meta["val"]`; changes the
graph in place; promises the same results up to rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.exponentials import Term, exponent, split_shift, summed, terms, without_zeros
from attnfx.ir.expr import FLOAT, Expr, walk
from attnfx.passes.fx.analysis import descendants, written
from attnfx.passes.fx.cleanup import clean
from attnfx.passes.fx.nodes import dims, is_tensor, op_name, slot_node, take_place, value
from attnfx.passes.lift.access import variables
from attnfx.passes.lift.contraction import Contraction, contraction
from attnfx.passes.lift.emitter import Emitter
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.products import batched, skip
from attnfx.passes.lift.tables import Index

aten = torch.ops.aten
LAST = ("div", "add", "mul")  # the last operator of a combination
EXPONENTIALS = ("exp", "exp2")
CASTS = ("to", "_to_copy", "type_as")
MOST = 64  # chunks of one softmax


@dataclass(frozen=True)
class Chunk:
    """A chunk of keys.

    product   the contraction of the weights, on the left, with the values
    weights   the weights before they are cast: exp of an expression that contains the node `scores`
    score     the lifted scores, over the index of the product's left operand
    shift     the row maxima that are subtracted from the score in the result
    exponent  of the weights in the result, over the variable `key`
    """

    product: Contraction
    weights: Node
    scores: Node
    score: Expr
    shift: tuple[Expr, ...]
    exponent: Expr

    @property
    def form(self) -> tuple[object, ...]:
        """Return the properties that all chunks share: the shift, and how the product reads its operands."""
        c = self.product
        places = [None if x is c.reduced else x for x in (*c.left_index, *c.right_index)]
        return self.shift, len(c.left_index), *places, value(c.left).dtype


def run(graph: Graph) -> int:
    """Merge each combination of chunks of keys into one softmax; return how many were merged."""
    changed = 0
    while any(_gathered(graph, n) for n in _candidates(graph.gm)):
        changed += 1
        clean(graph.gm)
        graph.changed()
    return changed


def _of_exponentials(n: Node) -> bool:
    """Return whether a node is a product with an operand that is an exponential, or a cast of one."""
    if n.op != "call_function" or not batched(n):
        return False
    return any(op_name(skip(x, CASTS)) in EXPONENTIALS for x in n.all_input_nodes)


def _candidates(gm: GraphModule) -> list[Node]:
    """Return the nodes that may combine two or more products of exponentials, the last first."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and is_tensor(n)]
    products = descendants(filter(_of_exponentials, nodes), nodes)
    last = [n for n in reversed(nodes) if op_name(n) in LAST and len(products.get(n, ())) > 1]
    return [n for n in last if all(dims(n) == dims(p) for p in products[n])]


def _gathered(graph: Graph, n: Node) -> bool:
    """Replace a node by one softmax with its values, if it combines chunks of keys; return whether it does."""
    facts = graph.facts
    chunks = _proved(graph.lifter, n)
    nodes = [x for c in chunks for x in (c.product.left, c.weights, c.product.node)]
    if not chunks or written(facts, nodes) or len({facts.regions[x] for x in (n, *nodes)}) > 1:
        return False
    chunks.sort(key=lambda c: c.product.node)
    if not _finite(chunks[0]):
        return False
    emit = graph.emitter(n)
    made = _softmax(emit, chunks)
    if dims(made) != dims(n):
        return False
    if value(made).dtype != value(n).dtype:
        made = emit.call(aten.to.dtype, made, value(n).dtype)
    take_place(made, n)
    return True


# -- the proof ------------------------------------------------------------------------------------
def _proved(lifter: Lifter, n: Node) -> list[Chunk]:
    """Return the chunks of keys that a node combines. Their weights are proved to be shares of the sum of all
    exponentials, and treated alike in all chunks. Return none without a proof."""
    out = variables(n)
    found = terms(_lifted(lifter, n, out), _product) or []
    over = found[0].over if 2 <= len(found) <= MOST else None
    if over is None or any(t.over is not over for t in found):
        return []
    chunks = [c for t in found if (c := _chunk(lifter, t, out)) is not None]
    below = terms(over, lambda e: e.op == "rsum") or []
    sums = [s for t in below if (s := summed(t)) is not None]
    if not len(chunks) == len(found) == len(sums) == len(below) or len({c.form for c in chunks}) > 1:
        return []
    if Counter(c.exponent for c in chunks) != Counter(_over_key(inside, variable) for variable, inside in sums):
        return []
    return chunks


def _lifted(lifter: Lifter, n: Node, at: Index) -> Expr:
    """Lift a node without its roundings to float16."""
    return rebuild(lifter.lift(n, at), lambda old, args: args[0] if old.op == "half" else None)


def _product(e: Expr) -> bool:
    return e.op == "load" and isinstance(e.value, Node) and _of_exponentials(e.value)


def _over_key(e: Expr, variable: Expr) -> Expr:
    return without_zeros(substitute(e, {variable: A.var("key", variable.args[0])}))


def _chunk(lifter: Lifter, t: Term, out: Index) -> Chunk | None:
    """Return the chunk whose product with the values is the core of a term, or None."""
    load = t.core
    if load is None or not _product(load) or load.args != tuple(A.ZERO if v.args[0] is A.ONE else v for v in out):
        return None
    c = contraction(load.value, out)  # type: ignore[arg-type]
    if c is None or c.left is c.right:
        return None
    c = c if op_name(skip(c.left, CASTS)) in EXPONENTIALS else c.turned
    weights = skip(c.left, CASTS)
    inside = weights.args[0]
    scores = inside.args[0] if op_name(inside) == "sub" and len(inside.args) == 2 else inside  # type: ignore[union-attr,arg-type]
    if not is_tensor(scores) or dims(scores) != dims(weights):  # type: ignore[arg-type]
        return None
    power = exponent(_lifted(lifter, weights, c.left_index))
    if power is None or c.reduced not in c.left_index or c.reduced not in c.right_index:
        return None
    whole, score = without_zeros(A.add(power, t.exponent)), _lifted(lifter, scores, c.left_index)  # type: ignore[arg-type]
    rest, shift = split_shift(whole, c.reduced)
    return Chunk(c, weights, scores, score, shift, _over_key(whole, c.reduced)) if rest is score else None  # type: ignore[arg-type]


def _finite(first: Chunk) -> bool:
    """Return whether each row's first score is proved to be finite."""
    score = substitute(first.score, {first.product.reduced: A.ZERO})
    minus_infinity = any(e.op == "const" and e.value == -math.inf for e in walk(score))
    return not minus_infinity and all(
        batched(slot_node(e.value)) for e in walk(score) if e.op == "load" and e.kind == FLOAT
    )


# -- one softmax ----------------------------------------------------------------------------------
def _softmax(emit: Emitter, chunks: list[Chunk]) -> Node:
    first = chunks[0].product
    key, row = first.left_index.index(first.reduced), first.right_index.index(first.reduced)
    scores = emit.call(aten.cat.default, [c.scores for c in chunks], key)
    weights = emit.call(aten.softmax.int, scores, key)
    if value(weights).dtype != value(first.left).dtype:
        weights = emit.call(aten.to.dtype, weights, value(first.left).dtype)
    values = emit.call(aten.cat.default, [c.product.right for c in chunks], row)
    by = {first.left: weights, first.right: values}
    return emit.call(first.node.target, *torch.fx.map_arg(first.node.args, lambda x: by.get(x, x)), **first.node.kwargs)  # type: ignore[arg-type]
