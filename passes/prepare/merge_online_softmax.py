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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.exponentials import exponent, outside
from attnfx.ir.expr import Expr, walk
from attnfx.passes.fx.analysis import written
from attnfx.passes.fx.cleanup import clean
from attnfx.passes.fx.nodes import dims, is_tensor, op_name, slot_node, take_place, value
from attnfx.passes.lift.access import variables
from attnfx.passes.lift.contraction import Contraction, contraction
from attnfx.passes.lift.emitter import Emitter
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.products import batched
from attnfx.passes.lift.tables import Index

aten = torch.ops.aten
LAST = ("div", "add", "mul")  # the last operator of a combination
EXPONENTIALS = ("exp", "exp2")
CASTS = ("to", "_to_copy", "type_as")
MOST = 64  # chunks of one softmax
ZERO = A.const(0.0)
Core = Callable[[Expr], bool]


class NotOnline(Exception):
    """The result is not an online softmax."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of keys: the `product` of the node `read` with `values`. `weights` is `read` before it is cast: exp of an
    expression that contains the node `scores`."""

    product: Contraction
    read: Node
    weights: Node
    values: Node
    scores: Node

    @property
    def index(self) -> Index:
        """Return the index at which the product reads the weights."""
        return self.product.left_index if self.read is self.product.left else self.product.right_index

    @property
    def values_index(self) -> Index:
        return self.product.right_index if self.read is self.product.left else self.product.left_index

    @property
    def form(self) -> tuple[object, ...]:
        """Return the properties that all chunks share: how the product reads its operands."""
        places = [None if x is self.product.reduced else x for x in (*self.index, *self.values_index)]
        return len(self.index), *places, value(self.read).dtype


@dataclass(frozen=True)
class Term:
    """The value exp(`exponent`) * `core` / `over`."""

    exponent: Expr
    core: Expr
    over: Expr | None


def run(graph: Graph) -> int:
    """Merge each combination of chunks of keys into one softmax; return how many were merged."""
    gm, changed = graph.gm, 0
    known = {n for n in gm.graph.nodes if _of_exponentials(n) is not None}
    while len(known) > 1:
        found = next((m for n in reversed(_after(gm, known)) if (m := _gathered(graph, n)) is not None), None)
        if found is None:
            break
        changed += 1
        clean(gm)
        graph.changed()
        known = {n for n in gm.graph.nodes if _of_exponentials(n) is not None}
    return changed


def _of_exponentials(n: Node) -> Node | None:
    """Return the operand of a product that is an exponential, or a cast of one; else None."""
    if n.op != "call_function" or not batched(n) or op_name(n) == "baddbmm":
        return None
    return next((x for x in n.all_input_nodes if op_name(_uncast(x)) in EXPONENTIALS), None)


def _uncast(x: Node) -> Node:
    while op_name(x) in CASTS and isinstance(x.args[0], Node):
        x = x.args[0]
    return x


def _after(gm: GraphModule, products: set[Node]) -> list[Node]:
    """Return the nodes that may combine two or more of the products, in order."""
    reached: dict[Node, frozenset[Node]] = {p: frozenset([p]) for p in products}
    out = []
    for n in gm.graph.nodes:
        if n.op != "call_function" or n in reached or not is_tensor(n):
            continue
        below = frozenset().union(*(reached.get(a, frozenset()) for a in n.all_input_nodes))
        if below:
            reached[n] = below
            if len(below) > 1 and op_name(n) in LAST and all(dims(n) == dims(p) for p in below):
                out.append(n)
    return out


def _gathered(graph: Graph, n: Node) -> Node | None:
    facts, lifter, out = graph.facts, graph.lifter, variables(n)
    try:
        terms = _terms(_lifted(lifter, n, out))
        both = sorted(((_chunk(t, out), t) for t in terms), key=lambda x: facts.position[x[0].product.node])
        chunks = [c for c, _ in both]
        _prove(lifter, [t for _, t in both], chunks)
    except NotOnline:
        return None
    nodes = [x for c in chunks for x in (c.read, c.weights, c.product.node)]
    if written(facts, nodes) or len({facts.regions[x] for x in (n, *nodes)}) > 1:
        return None
    made = _softmax(graph.emitter(n), chunks)
    if dims(made) != dims(n):
        return None
    if value(made).dtype != value(n).dtype:
        made = graph.emitter(n).call(aten.to.dtype, made, value(n).dtype)
    take_place(made, n)
    return made


def _lifted(lifter: Lifter, n: Node, at: tuple[Expr, ...]) -> Expr:
    """Lift a node without its roundings to float16."""
    return rebuild(lifter.lift(n, at), lambda old, args: args[0] if old.op == "half" else None)


# -- a combination as a sum of terms --------------------------------------------------------------
def _terms(e: Expr) -> list[Term]:
    """Return the terms of a combination. Raises NotOnline if there are fewer than two, or too many."""
    found = [_term(factors) for factors in _expanded(e, _product)]
    terms = [t for t in found if t is not None]
    if not 2 <= len(terms) <= MOST or len({t.over for t in terms}) > 1:
        raise NotOnline
    return terms


def _expanded(e: Expr, core: Core) -> list[list[Expr]]:
    """Return the factors of each term. A sum is multiplied out only if it holds a possible core of a term."""
    if e.op == "add":
        return [t for a in e.args for t in _expanded(a, core)]
    if e.op == "mul":
        out: list[list[Expr]] = [[]]
        for a in e.args:
            inner = _expanded(a, core) if _holds(a, core) else [[a]]
            out = [[*x, *y] for x in out for y in inner]
            if len(out) > 4 * MOST:
                raise NotOnline
        return out
    if e.op == "rsum" and e.args[1].op == "const" and any(map(core, outside(e.args[0]))):
        over = A.var(str(e.value), e.args[1])  # a sum over chunks that were stacked
        parts = (substitute(e.args[0], {over: A.const(c)}) for c in range(int(e.args[1].value)))  # type: ignore[call-overload]
        return [t for part in parts for t in _expanded(part, core)]
    return [[e]]


def _product(e: Expr) -> bool:
    return e.op == "load" and isinstance(e.value, Node) and _of_exponentials(e.value) is not None


def _sum(e: Expr) -> bool:
    return e.op == "rsum"


def _holds(e: Expr, core: Core) -> bool:
    if e.op == "rsum":
        return core(e) or any(map(core, outside(e.args[0])))
    return core(e) or (e.op in ("add", "mul") and any(_holds(a, core) for a in e.args))


def _term(factors: list[Expr]) -> Term | None:
    """Return the term that the factors multiply to, or None for zero."""
    if ZERO in factors:
        return None
    left = list(factors)
    for f in factors:  # x / x
        if f.op == "recip" and f.args[0] in left:
            left.remove(f)
            left.remove(f.args[0])
    powers = [exponent(f) for f in left]
    rest = [f for f, p in zip(left, powers, strict=True) if p is None]
    over = [f.args[0] for f in rest if f.op == "recip"]
    core = [f for f in rest if f.op != "recip"]
    if len(core) != 1 or len(over) > 1:
        raise NotOnline
    total = A.add(ZERO, *(p for p in powers if p is not None))
    return Term(total, core[0], over[0] if over else None)


# -- the proof ------------------------------------------------------------------------------------
def _chunk(t: Term, out: tuple[Expr, ...]) -> Chunk:
    load = t.core
    if load.op != "load" or not isinstance(load.value, Node) or not is_tensor(load.value):
        raise NotOnline
    if tuple(load.args) != tuple(A.ZERO if v.args[0] is A.ONE else v for v in out):
        raise NotOnline
    c, read = contraction(load.value, out), _of_exponentials(load.value)
    if c is None or read not in (c.left, c.right) or c.left is c.right or not is_tensor(read):
        raise NotOnline
    assert read is not None
    weights = _uncast(read)
    inside = weights.args[0]
    scores = inside.args[0] if op_name(inside) == "sub" and len(inside.args) == 2 else inside  # type: ignore[union-attr,arg-type]
    if not is_tensor(scores) or dims(scores) != dims(weights):  # type: ignore[arg-type]
        raise NotOnline
    made = Chunk(c, read, weights, c.right if read is c.left else c.left, scores)  # type: ignore[arg-type]
    if c.reduced not in made.index or c.reduced not in made.values_index:
        raise NotOnline
    return made


def _prove(lifter: Lifter, terms: list[Term], chunks: list[Chunk]) -> None:
    """Prove that the weights are shares of the sum of all exponentials, and treated alike in all chunks. Raises
    NotOnline otherwise. The chunks are in the order of the graph."""
    over = terms[0].over
    if over is None or len({c.form for c in chunks}) > 1:
        raise NotOnline
    below = [_term(factors) for factors in _expanded(over, _sum)]
    sums = [t for t in below if t is not None]
    if any(t.core.op != "rsum" or t.over is not None for t in sums) or len(sums) != len(chunks):
        raise NotOnline
    rest, shifts = list(sums), set()
    for t, c in zip(terms, chunks, strict=True):
        j, at = c.product.reduced, c.index
        inside = exponent(_lifted(lifter, c.weights, at))
        if inside is None:
            raise NotOnline
        whole = _plain(A.add(inside, t.exponent))
        mine = next((s for s in rest if _summed(s, j) is whole), None)
        if mine is None:
            raise NotOnline
        rest.remove(mine)
        shifts.add(_shift(whole, _lifted(lifter, c.scores, at)))
    if len(shifts) != 1 or any(c.product.reduced.value in s.free for s in shifts for c in chunks):
        raise NotOnline
    first = chunks[0]
    score = substitute(_lifted(lifter, first.scores, first.index), {first.product.reduced: A.ZERO})
    minus_infinity = any(e.op == "const" and e.value == -math.inf for e in walk(score))
    loads = [e for e in walk(score) if e.op == "load" and e.kind == "f" and not batched(slot_node(e.value))]
    if minus_infinity or loads:
        raise NotOnline


def _summed(t: Term, j: Expr) -> Expr | None:
    """Return the exponent that a term of the divisor sums up, at key j, or None."""
    body, extent = t.core.args
    inside = exponent(body)
    if inside is None or extent is not j.args[0]:
        return None
    return _plain(A.add(substitute(inside, {A.var(str(t.core.value), extent): j}), t.exponent))


def _shift(whole: Expr, score: Expr) -> Expr:
    """Return the value that was added to the score of a chunk; under a mask that drowns, at kept elements only."""
    while whole.op == "where" and score.op == "where" and whole.args[0] is score.args[0]:
        if not (A.drowning(whole.args[2]) and A.drowning(score.args[2])):
            break
        whole, score = whole.args[1], score.args[1]
    left = list(whole.args if whole.op == "add" else (whole,))
    for t in score.args if score.op == "add" else (score,):
        if t not in left:
            return _plain(A.sub(whole, score))
        left.remove(t)
    return _plain(A.add(ZERO, *left))


def _plain(e: Expr) -> Expr:
    """Remove terms that are zero times something: row maxima, which are finite here."""
    if e.op == "where":
        return A.where(e.args[0], _plain(e.args[1]), e.args[2])
    terms = e.args if e.op == "add" else (e,)
    return A.add(ZERO, *(t for t in terms if not (t.op == "mul" and ZERO in t.args)))


# -- one softmax ----------------------------------------------------------------------------------
def _softmax(emit: Emitter, chunks: list[Chunk]) -> Node:
    first = chunks[0]
    j, node = first.product.reduced, first.product.node
    key, row = first.index.index(j), first.values_index.index(j)
    scores = emit.call(aten.cat.default, [c.scores for c in chunks], key)
    weights = emit.call(aten.softmax.int, scores, key)
    if value(weights).dtype != value(first.read).dtype:
        weights = emit.call(aten.to.dtype, weights, value(first.read).dtype)
    values = emit.call(aten.cat.default, [c.values for c in chunks], row)
    by = {first.read: weights, first.values: values}
    return emit.call(node.target, *torch.fx.map_arg(node.args, lambda x: by.get(x, x)), **node.kwargs)  # type: ignore[arg-type]
