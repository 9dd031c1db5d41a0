"""From a contraction with a normalised weight to a spec: the matcher.

`find(gm)` looks at each contraction whose one operand descends from a softmax (or an exponential, or a gate),
lifts that operand, and gives a `Match` or a `Refusal` for it. The graph is not changed.

    out[.., i, .., e] = sum_j  W(.., i, j) * V(.., j, e)        W = weight(normalise_j(score))
    score holds one load of another contraction, sum_d Q(.., i, d) * K(.., j, d)

Axes: i is the row that only the query has, j and d are contracted, e only the value has. The others are batch axes:
those that key or value depend on come first (the last of them is the key head), those that only the query has are
grouped heads. Grouped heads are never expanded: the walk through key and value undoes the expansion.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr, substitute, walk
from attnfx.mask import rows_live
from attnfx.passes import normalise as N
from attnfx.passes.contraction import PRODUCTS, Contraction, contraction, slot_node
from attnfx.passes.facts import Facts
from attnfx.passes.graphs import dims, is_tensor, op_name, refusal, shape, spanned, value
from attnfx.passes.layout import radix
from attnfx.passes.lift import INDEXING, POINTWISE, VIEWS, Index, Lifter, LookedUp, Opaque, broadcast
from attnfx.passes.reading import Operand, Parts, Reader, Reading, Refused, batch_and_heads, extent, free, of_batch
from attnfx.report import Refusal
from attnfx.spec import AttentionSpec, fill_of

GATES = ("sigmoid", "relu", "softplus", "gelu", "silu", "erf")
ANCHORS = ("softmax", "_softmax", "_safe_softmax", "log_softmax", "exp", "exp2", *GATES)
NORMS = ("linear", "layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "mm", "addmm", "attention")
SDPA = ("scaled_dot_product_attention",)
PROVED = ("masked_rows",)  # codes of refusals that only an attention gets
DISTANCES = ("cdist", "_cdist_forward")
SORTING = ("sort", "topk", "argsort")
NEAR = 5  # nodes in which a number for each row must meet the scores again
REDUCING = ("sum", "amax", "max", "logsumexp", "mean")


@dataclass(eq=False)
class Match:
    """A site found: everything that the rewriter needs. `final` is the node that the operator replaces.

    kv_axes and group_axes are the batch axes; row, column, width, value_width the variables i, j, d, e. `out_index`
    gives, for each dimension of `final`, its index over the axes.
    """

    final: Node
    spec: AttentionSpec
    query: Operand
    key: Operand
    value: Operand
    captures: list[Node]
    sizes: list[str]
    kv_axes: list[Expr]
    group_axes: list[Expr]
    row: Expr
    column: Expr
    width: Expr
    value_width: Expr
    out_index: Index
    draw: object = None  # which of the graph's random draws the dropout is
    reductions: list[Reduction] = field(default_factory=list)
    anchors: list[Node] = field(default_factory=list)
    training: bool = False  # some operand may take a gradient
    chunks: int = 1  # of how many chunks of queries it was made (passes/loops.py)
    steps: int = 1  # of how many steps of a loop over heads or batch elements (passes/rolls.py)

    @property
    def axes(self) -> list[Expr]:
        return [*self.kv_axes, *self.group_axes]

    @property
    def letters(self) -> dict[str, list[Expr]]:
        """What the operator's b, h, i and j are made of."""
        batch, heads = batch_and_heads(self.kv_axes, self.group_axes)
        return {"b": batch, "h": heads, "i": [self.row], "j": [self.column]}


@dataclass(frozen=True)
class Reduction:
    """What is read of the weights of a match beside the attention, which an operator computes again.

    `kind` is "sum" (a mean where `count` is given, the number that it is over), "rows" (those from `start` on, as many
    as the axis i has), or what is asked along the axis `over`, of the keys of each row or of the rows of each key:
    "max" or "argmax". "logsumexp" is what the attention's operator gives beside its output, and differentiates.
    `spec`, `captures` and `sizes` describe the weights that are added up, over b, h, i, j of the match; `axes` what
    these are made of; `kept` gives, for each dimension that is left, its index over the axes.
    """

    final: Node
    spec: AttentionSpec
    captures: list[Node]
    sizes: list[str]
    axes: dict[str, list[Expr]]
    kept: Index
    count: Expr | None = None
    kind: str = "sum"
    start: int = 0
    over: str = "j"


@dataclass(eq=False)
class Finding:
    """One attention-like place: a match, or why not. One that is `loose` is an attention only where its rows prove to
    be apart: operators that are not understood stand between its weights and the values."""

    final: Node
    match: Match | None = None
    refusal: Refusal | None = None
    anchors: list[Node] = field(default_factory=list)
    loose: bool = False


class Finder:
    """The state of one search: the lifter's memo and positions of nodes. `doubtful` are places with an exponential or a
    gate between two products that did not prove to be an attention; `near` the softmaxes of what is shaped as a product
    of two batches of matrices that it comes from, by whatever operators. `tables` are as `find_tables` gives them."""

    def __init__(self, gm: GraphModule, tables: Mapping[Node, LookedUp] | None = None):
        self.gm = gm
        self.doubtful: list[Finding] = []
        self.near: frozenset[Node] = frozenset()
        self.facts = Facts(gm)
        self.lifter = Lifter(self.facts.written, self.facts.frozen, tables)
        self.reader = Reader(self.facts, self.lifter)
        self.weights = self.descendants(n for n in gm.graph.nodes if op_name(n) in ANCHORS)
        self.scores = self.descendants((n for n in gm.graph.nodes if batched(n)), unknown=True)
        self.met = self._met()

    def descendants(self, seeds: Iterable[Node], unknown: bool = False) -> dict[Node, list[Node]]:
        """Nodes that descend from a seed through pointwise and view operators: node -> nearest seeds. `unknown` passes
        operators that are not understood too, where they keep the shape, so that the refusal can name them."""
        out: dict[Node, list[Node]] = {}
        seeds = set(seeds)
        for n in self.gm.graph.nodes:
            if n.op != "call_function":
                continue
            name = op_name(n)
            if n in seeds:
                out[n] = [n]
            elif name in POINTWISE or name in VIEWS or name in INDEXING or name in REDUCING:
                found = [s for a in n.all_input_nodes for s in out.get(a, ())]
                if found:
                    out[n] = list(dict.fromkeys(found))[:8]
            elif unknown and is_tensor(n) and name not in NORMS:
                found = [s for a in n.all_input_nodes if is_tensor(a) and dims(a) == dims(n) for s in out.get(a, ())]
                if found:
                    out[n] = list(dict.fromkeys(found))[:8]
        return out

    def _met(self) -> frozenset[Node]:
        """Softmaxes of what some nodes are made of at which rows of two batches meet without a product."""
        met: set[Node] = set()
        for n in self.gm.graph.nodes:
            if meeting(n) or (not batched(n) and any(a in met for a in n.all_input_nodes)):
                met.add(n)
        return frozenset(n for n in met if "softmax" in op_name(n) and not self.from_scores(n))

    def _loosely(self, seeds: Iterable[Node]) -> dict[Node, dict[Node, int]]:
        """Nodes that descend from a seed through any operators but products, where its last two dimensions are kept or
        soon come back (a threshold for each row): node -> seeds, and how many nodes ago these were kept."""
        out: dict[Node, dict[Node, int]] = {n: {n: 0} for n in seeds}
        for n in self.gm.graph.nodes:
            if n.op != "call_function" or n in out or batched(n) or op_name(n) == "sym_size":
                continue
            found: dict[Node, int] = {}
            for a in n.all_input_nodes:
                for s, far in out.get(a, {}).items():
                    kept = not is_tensor(n) or not _plane(s) - Counter(dims(n))
                    found[s] = min(found.get(s, NEAR), 0 if kept else far + 1)
            found = {s: far for s, far in found.items() if far < NEAR}
            if found:
                out[n] = dict(list(found.items())[:8])
        return out

    def loose(self) -> dict[Node, list[Node]]:
        """Products that weights reach in whatever way: node -> the operators that may have normalised these."""
        if not any("softmax" in op_name(n) or op_name(n) in SORTING for n in self.gm.graph.nodes):
            return {}
        scores = self._loosely(n for n in self.gm.graph.nodes if batched(n))
        seeds = [
            n
            for n in self.gm.graph.nodes
            if ("softmax" in op_name(n) or op_name(n) in SORTING) and any(a in scores for a in n.all_input_nodes)
        ]
        self.near = frozenset(n for n in seeds if any(0 in scores.get(a, {}).values() for a in n.all_input_nodes))
        weights = self._loosely(seeds)
        found = {
            n: [s for a in n.all_input_nodes for s in weights.get(a, ())] for n in self.gm.graph.nodes if batched(n)
        }
        return {n: list(dict.fromkeys(s)) for n, s in found.items() if s}

    def find(self) -> list[Finding]:
        findings: list[Finding] = []
        loose = self.loose()
        for n in self.gm.graph.nodes:
            if n.op != "call_function":
                continue
            name = op_name(n)
            if name in SDPA:
                findings.append(self._attempt(n, self._library_call, [n]))
            elif batched(n):
                seeds = [s for a in n.all_input_nodes for s in self.weights.get(a, ()) if self.from_scores(s)]
                if seeds:
                    found = self._attempt(n, self._written_out, list(dict.fromkeys(seeds)))
                    # a gate or an exponential between two products is no attention until it is proved to be one
                    proved = found.match is not None and not _layers(found.match)
                    proved |= found.refusal is not None and found.refusal.code in PROVED
                    if proved or any("softmax" in op_name(s) for s in seeds):
                        findings.append(found)
                        continue
                    if found.refusal is not None and found.refusal.code == "normaliser":
                        # exponentials over something like their sum (a small number is added): loosely an attention
                        findings.append(Finding(n, refusal=found.refusal, anchors=found.anchors, loose=True))
                        continue
                    self.doubtful.append(found)
                met = [s for a in n.all_input_nodes for s in self.weights.get(a, ()) if s in self.met]
                if n in loose:
                    message = "operators that no score program expresses stand between the weights and the values"
                    why = refusal("not_lifted", message, n, *loose[n])
                    findings.append(Finding(n, refusal=why, anchors=loose[n], loose=True))
                elif met and not seeds:
                    message = "queries and keys meet in no product"
                    findings.append(
                        Finding(n, refusal=refusal("no_product", message, n, *met), anchors=met, loose=True)
                    )
        return findings

    def from_scores(self, anchor: Node) -> bool:
        return any(a in self.scores for a in anchor.all_input_nodes)

    def _attempt(self, n: Node, how: Callable[[Node], Match], anchors: list[Node]) -> Finding:
        try:
            match = how(n)
            match.anchors = anchors
            return Finding(match.final, match=match, anchors=anchors)
        except Refused as r:
            products = [s for x in anchors for a in x.all_input_nodes for s in self.scores.get(a, ())]
            odd = [s for s in products if value(s).is_complex()]
            if odd and r.refusal.code == "no_product":
                return Finding(n, refusal=refusal("dtype", "the scores are complex", *odd), anchors=anchors)
            return Finding(n, refusal=r.refusal, anchors=anchors)
        except (Opaque, N.NotNormalised) as problem:
            code = getattr(problem, "code", "not_lifted")
            message = getattr(problem, "message", "the weights have no index form")
            return Finding(n, refusal=refusal(code, message, *anchors, n), anchors=anchors)

    # -- attention written out ----------------------------------------------------------------
    def _written_out(self, final: Node) -> Match:
        problem: Exception | None = None
        for last, path, divisor in self._endings(final):
            out = tuple(A.var(f"o{d}", n) for d, n in enumerate(dims(last)))
            index: Index = out
            for view in reversed(path):
                _, index = VIEWS[op_name(view)](view, index)
            c = contraction(final, index)
            if c is None:
                message = (
                    f"the product {op_name(final)} of the weights with the values is of a form that is not understood"
                )
                raise Refused("contraction", message, [final])
            for weights, at, values, values_at in (
                (c.left, c.left_index, c.right, c.right_index),
                (c.right, c.right_index, c.left, c.left_index),
            ):
                if not any(self.from_scores(w) for w in self.weights.get(weights, ())):
                    continue
                try:
                    weight = self.lifter.lift(weights, at)
                    if divisor is not None:
                        below = self.lifter.lift(divisor, broadcast(divisor, out))
                        weight = A.mul(weight, A.unary("recip", below))
                    found = N.normalise(weight, c.reduced)
                    if divisor is not None and found.normaliser != "softmax":
                        message = "the values are divided by something else than the sum of the weights"
                        raise Refused("normaliser", message, [last])
                    return self._assemble(last, out, c.reduced, found, values, values_at)
                except (Opaque, N.NotNormalised, Refused) as p:
                    # of several readings, the one that got further tells the reason
                    problem = p if problem is None or not isinstance(problem, Refused) else problem
        raise problem or Refused("contraction", "the weights reach the values through an unknown operator", [final])

    def _endings(self, final: Node) -> list[tuple[Node, list[Node], Node | None]]:
        """Where the attention may end: at the product itself, or, (exp(s) @ v) / sum(exp(s)), at a division of it or of
        a view of it. Each as (last node, views up to it, divisor)."""
        out: list[tuple[Node, list[Node], Node | None]] = [(final, [], None)]
        at, path = final, []
        while len(at.users) == 1 and len(path) < 8:
            user = next(iter(at.users))
            if op_name(user) in VIEWS and user.args[0] is at:
                path.append(user)
                at = user
                continue
            if op_name(user) == "div" and len(user.args) == 2 and user.args[0] is at and is_tensor(user.args[1]):
                if dims(user) == dims(at):
                    out.append((user, path, user.args[1]))  # type: ignore[arg-type]
            break
        return out

    def _assemble(self, final: Node, out: Index, j: Expr, found: N.Normalised, values: Node, values_at: Index) -> Match:
        """Try the products that the score loads, the likeliest first: the others may be biases (relative positions)."""
        problem: Refused | None = None
        for load, dot in self.products(final, found.score, j):
            try:
                return self._with_product(final, out, j, found, values, values_at, load, dot)
            except Refused as p:
                problem = problem or p
        assert problem is not None
        raise problem

    def _with_product(self, final: Node, out: Index, j: Expr, found: N.Normalised, values: Node, values_at: Index,
                      load: Expr, dot: Contraction) -> Match:  # fmt: skip
        """The match in which `load` is the product of queries and keys."""
        if self.facts.regions[dot.node] != self.facts.regions[final]:
            message = "the attention crosses the border of an autocast or a no_grad region"
            raise Refused("region", message, [dot.node, final])
        left, right = (dot.left, dot.left_index), (dot.right, dot.right_index)
        if j.value in free(left[1]):
            left, right = right, left
        in_values = free(values_at)
        in_weights = free(left[1]) | free(right[1]) | found.score.free | found.weight.free
        width = [v for v in out if v.value in in_values and v.value not in in_weights]
        if len(width) != 1:
            raise Refused("values", "the values have no width of their own", [values])
        row = self.row(dot, load, left, right, out, in_values)
        pairs = (left, right, (values, values_at))
        found = over_dot(found, load, dot)
        return self._match(Parts(final, out, row, j, dot.reduced, width[0], pairs, found, dot.node))

    def row(self, dot: Contraction, load: Expr, left: tuple[Node, Index], right: tuple[Node, Index], out: Index,
             in_values: frozenset[str]) -> Expr:  # fmt: skip
        """The query's row: the last dimension of the scores that the query has alone."""
        alone = [
            v for v in out if v.value in free(left[1]) and v.value not in free(right[1]) and v.value not in in_values
        ]
        if not alone:  # a single query, or one per batch element
            ones = [v for v in out if v.args[0] is A.ONE]
            if ones:
                return ones[-1]
            raise Refused("rows", "the scores have no row that the query has alone", [dot.node])
        order = {v: n for n, v in enumerate(out)}
        for x in reversed(load.args):
            inside = [v for v in alone if v.value in x.free]
            if inside:
                return max(inside, key=lambda v: order[v])
        return alone[-1]

    def products(self, final: Node, score: Expr, j: Expr) -> list[tuple[Expr, Contraction]]:
        """The loads of contractions in which one operand alone runs over the keys: nearest plain ones first."""
        found: list[tuple[Expr, Contraction]] = []
        for e in walk(score):
            if e.op != "load" or not (j.value in e.free or j.args[0] is A.ONE):
                continue
            node = slot_node(e.value)
            c = contraction(node, e.args) if batched(node) else None
            if c is None or not all(value(x).dtype.is_floating_point for x in (c.left, c.right)):
                continue
            if j.args[0] is A.ONE or (j.value in free(c.left_index)) != (j.value in free(c.right_index)):
                found.append((e, c))
        if not found:
            message = "no product of queries with keys reaches the softmax through operators that are understood"
            raise Refused("no_product", message, [final])
        return sorted(found, key=lambda pair: (not _plain(pair[1]), -self.facts.position[pair[1].node]))

    # -- the library's own operator -----------------------------------------------------------
    def _library_call(self, at: Node) -> Match:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given: dict[str, Any] = dict(zip(names, at.args, strict=False)) | dict(at.kwargs)
        nodes = [given[n] for n in names[:3]]
        p, mask, scale = given.get("dropout_p", 0.0), given.get("attn_mask"), given.get("scale")
        if not isinstance(p, int | float) or not 0 <= p < 1:
            raise Refused("dropout", "the dropout probability is no number in [0, 1)", [at])
        out = tuple(A.var(f"o{d}", n) for d, n in enumerate(dims(at)))
        if len(out) < 3:
            raise Refused("unbatched", "an attention without a batch dimension", [at])
        *heads, row, e = out
        j, d = (A.var(name, n) for name, n in zip(("k_j", "k_d"), dims(nodes[1])[-2:], strict=True))
        pairs = []
        for x, last in zip(nodes, ((row, d), (j, d), (j, e)), strict=True):
            inner = list(heads)
            if given.get("enable_gqa", False) and dims(x)[-3] is not dims(nodes[0])[-3]:
                inner[-1] = A.floordiv(heads[-1], A.floordiv(dims(nodes[0])[-3], dims(x)[-3]))
            pairs.append((x, broadcast(x, (*inner, *last))))
        if scale is None:
            factor = A.unary("recip", A.unary("sqrt", A.to_float(d.args[0])))
        else:
            factor = A.to_float(self.lifter.operand(scale, ()))
        score = A.mul(factor, A.DOT)
        if given.get("is_causal", False):
            score = A.where(A.le(j, row), score, A.const(float("-inf")))
        if mask is not None:
            m = self.lifter.lift(mask, broadcast(mask, (*heads, row, j)))
            score = A.where(m, score, A.const(float("-inf"))) if m.kind == "b" else A.add(score, m)
        found = N.Normalised(score, A.PROB, dropout=float(p), safe=True)
        return self._match(Parts(at, out, row, j, d, e, tuple(pairs), found))

    def _match(self, parts: Parts) -> Match:
        read = self.reader.read(parts)
        query, key, val = read.operands
        taught = any(x.node in self.facts.differentiable for x in read.operands)
        taught = taught or any(c.grad for c in read.spec.captures)
        if not taught or _rows_live(read, parts):  # where a fill was added or put in its place is the same
            read = replace(read, spec=replace(read.spec, score=A.in_place(read.spec.score)))
        if parts.found.by_log and fill_of(read.spec.score) not in (None, -math.inf) and not _rows_live(read, parts):
            message = "the weights are exp(score - log(sum)), which are 1 each where a finite fill masks a whole row"
            hint = "Write softmax, or fill with -inf."
            raise Refused("masked_rows", message, [parts.final], hint)
        assert parts.value_width is not None
        return Match(
            parts.final, read.spec, query, key, val, read.captures, read.sizes, read.kv_axes, read.group_axes,
            parts.row, parts.column, parts.width, parts.value_width, read.out, parts.found.draw,
            training=taught,
        )  # fmt: skip


def _rows_live(read: Reading, parts: Parts) -> bool:
    """Whether every row provably has a live key; only said where the sizes are numbers."""
    sizes = {"B": read.kv_axes, "H": read.group_axes, "T": [parts.row], "S": [parts.column]}
    extents = {name: extent(axes) for name, axes in sizes.items()}
    if read.sizes or any(n.op != "const" for n in extents.values()) or {"b", "h"} & read.spec.score.free:
        return False
    return rows_live(read.spec, {name: int(n.value) for name, n in extents.items()})  # type: ignore[call-overload]


def over_dot(found: N.Normalised, load: Expr, dot: Contraction) -> N.Normalised:
    """With `dot` for the product that the score loads, which float16 rounds."""
    rounded = A.half(A.DOT) if value(dot.node).dtype == torch.float16 else A.DOT
    return replace(found, score=substitute(found.score, {load: rounded}))


def batched(n: Node) -> bool:
    """Whether a node is a product of two batches of matrices, or of one of each: what scores and weighted values are. A
    product with a matrix that is no part of a batch (a linear layer, a router's gate) is not."""
    if n.op != "call_function" or op_name(n) not in PRODUCTS or not is_tensor(n):
        return False
    operands = [x for x in n.all_input_nodes if is_tensor(x)]
    operands = operands[-2:] if op_name(n) == "baddbmm" else operands
    if all(len(shape(x)) == 2 for x in operands):
        return any(map(of_batch, operands)) and all(of_batch(x) or _computed(x) for x in operands)
    return all(len(shape(x)) > 2 for x in operands)


def meeting(n: Node) -> bool:
    """Whether rows of two batches meet one by one in a node that is no product: by broadcasting, each operand with a
    dimension of its own (additive attention), or as distances."""
    if n.op != "call_function" or not is_tensor(n) or not value(n).is_floating_point():
        return False
    if op_name(n) in DISTANCES:
        return True
    x, y = operands = (*n.all_input_nodes, None, None)[:2]
    if op_name(n) not in POINTWISE or not all(is_tensor(a) and value(a).is_floating_point() for a in operands):
        return False
    left, right = (spanned(a, len(shape(n))) for a in (x, y))  # type: ignore[arg-type]
    return bool(left - right and right - left) and of_batch(x) and of_batch(y)  # type: ignore[arg-type]


def _computed(x: Node) -> bool:
    return x.op == "call_function" and op_name(x) not in VIEWS


def _layers(match: Match) -> bool:
    """Whether keys and values are both parameters: linear layers, one for each element of a batch (experts)."""
    return all(_parameter(x.node) for x in (match.key, match.value))


def _parameter(x: Node) -> bool:
    while op_name(x) in (*VIEWS, "to", "_to_copy") and isinstance(x.args[0], Node):
        x = x.args[0]
    return isinstance(x.meta.get("example_value", value(x)), torch.nn.Parameter)


def _plane(n: Node) -> Counter[Expr]:
    """The last two dimensions, of a tuple's source where it is one."""
    return Counter(dims(n if is_tensor(n) else n.all_input_nodes[0])[-2:])


def _plain(c: Contraction) -> bool:
    """Whether plain indices, split or merged, read both operands: no gathers."""
    return all(
        radix(x) is not None or any(e.op in ("floordiv", "mod") for e in walk(x))
        for x in (*c.left_index, *c.right_index)
    )


__all__ = ["Finder", "Finding", "Match", "Reduction", "batched", "meeting", "over_dot"]
