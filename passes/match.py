"""From a contraction with a normalised weight to a spec: the matcher.

`find(gm)` looks at each contraction whose one operand descends from a softmax (or an exponential, or a sigmoid),
lifts that operand, and gives a `Match` or a `Refusal` for it. The graph is not changed.

    out[.., i, .., e] = sum_j  W(.., i, j) * V(.., j, e)        W = weight(normalise_j(score))
    score holds one load of another contraction, sum_d Q(.., i, d) * K(.., j, d)

Axes: i is the row that only the query has, j and d are contracted, e only the value has. The others are batch axes:
those that key or value depend on come first (the last of them is the key head), those that only the query has are
grouped heads. Grouped heads are never expanded: the walk through key and value undoes the expansion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnfx import spec as S
from attnfx.ir import algebra as A
from attnfx.ir.expr import FLOAT, Expr, rebuild, substitute, walk
from attnfx.passes import normalise as N
from attnfx.passes.contraction import PRODUCTS, Contraction, Product, contraction, slot_node
from attnfx.passes.facts import Facts
from attnfx.passes.graphs import dims, is_tensor, kind_of, op_name, shape, value
from attnfx.passes.layout import Access, Split, accesses, apply_splits, best, program_splits, radix, split_axes
from attnfx.passes.lift import INDEXING, POINTWISE, VIEWS, Index, Lifter, Opaque, broadcast
from attnfx.report import Refusal
from attnfx.spec import AttentionSpec, Capture

ANCHORS = ("softmax", "_softmax", "_safe_softmax", "log_softmax", "exp", "exp2", "sigmoid")
NORMS = ("linear", "layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "mm", "addmm", "attention")
SDPA = ("scaled_dot_product_attention",)
REDUCING = ("sum", "amax", "max", "logsumexp", "mean")


@dataclass(frozen=True)
class Operand:
    """A node, read through `index` over the axes; what `layout` turns into (B, heads, rows, width)."""

    node: Node
    index: Index


@dataclass
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
    anchors: list[Node] = field(default_factory=list)
    training: bool = False  # some operand may take a gradient

    @property
    def axes(self) -> list[Expr]:
        return [*self.kv_axes, *self.group_axes]


@dataclass(frozen=True)
class Parts:
    """An attention as it was read off the graph: indices over the dimensions of `final`, nothing chosen yet.

    `pairs` are the operands (node, index) for query, key and value; `found.score` is a program over `dot`; `product` is
    the node of the scores, None where the graph has none.
    """

    final: Node
    out: Index
    row: Expr
    column: Expr
    width: Expr
    value_width: Expr
    pairs: tuple[tuple[Node, Index], ...]
    found: N.Normalised
    product: Node | None = None


class Refused(Exception):
    def __init__(self, code: str, message: str, nodes: Iterable[Node] = (), hint: str = ""):
        super().__init__(message)
        self.refusal = Refusal(code, message, tuple(n.name for n in nodes), hint)


@dataclass
class Finding:
    """One attention-like place: a match, or why not."""

    final: Node
    match: Match | None = None
    refusal: Refusal | None = None
    anchors: list[Node] = field(default_factory=list)


class Finder:
    """The state of one search: the lifter's memo and positions of nodes."""

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self.facts = Facts(gm)
        self.lifter = Lifter(self.facts.written, self.facts.frozen)
        self.weights = self._spread(n for n in gm.graph.nodes if op_name(n) in ANCHORS)
        self.scores = self._spread((n for n in gm.graph.nodes if batched(n)), unknown=True)

    def _spread(self, seeds: Iterable[Node], unknown: bool = False) -> dict[Node, list[Node]]:
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

    def find(self) -> list[Finding]:
        findings: list[Finding] = []
        for n in self.gm.graph.nodes:
            if n.op != "call_function":
                continue
            name = op_name(n)
            if name in SDPA:
                findings.append(self._attempt(n, self._library_call, [n]))
            elif batched(n):
                seeds = [s for a in n.all_input_nodes for s in self.weights.get(a, ()) if self._from_scores(s)]
                if seeds:
                    found = self._attempt(n, self._written_out, list(dict.fromkeys(seeds)))
                    # a gate or an exponential between two products is no attention until it is proved to be one
                    if found.match is not None or any("softmax" in op_name(s) for s in seeds):
                        findings.append(found)
        return findings

    def _from_scores(self, anchor: Node) -> bool:
        return any(a in self.scores for a in anchor.all_input_nodes)

    def _attempt(self, n: Node, how: Callable[[Node], Match], anchors: list[Node]) -> Finding:
        try:
            match = how(n)
            match.anchors = anchors
            return Finding(match.final, match=match, anchors=anchors)
        except Refused as r:
            return Finding(n, refusal=r.refusal, anchors=anchors)
        except (Opaque, N.NotNormalised) as problem:
            code = getattr(problem, "code", "not_lifted")
            message = getattr(problem, "message", "the weights have no index form")
            return Finding(n, refusal=Refusal(code, message, (n.name,)), anchors=anchors)

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
                if not any(self._from_scores(w) for w in self.weights.get(weights, ())):
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
        for load, dot in self._products(final, found.score, j):
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
        if j.value in _free(left[1]):
            left, right = right, left
        in_values = _free(values_at)
        in_weights = _free(left[1]) | _free(right[1]) | found.score.free | found.weight.free
        width = [v for v in out if v.value in in_values and v.value not in in_weights]
        if len(width) != 1:
            raise Refused("values", "the values have no width of their own", [values])
        row = self._row(dot, load, left, right, out, in_values)
        rounded = A.half(A.DOT) if value(dot.node).dtype == torch.float16 else A.DOT
        found = replace(found, score=substitute(found.score, {load: rounded}))
        pairs = (left, right, (values, values_at))
        return self._build(Parts(final, out, row, j, dot.reduced, width[0], pairs, found, dot.node))

    def _row(self, dot: Contraction, load: Expr, left: tuple[Node, Index], right: tuple[Node, Index], out: Index,
             in_values: frozenset[str]) -> Expr:  # fmt: skip
        """The query's row: the last dimension of the scores that the query has alone."""
        alone = [
            v for v in out if v.value in _free(left[1]) and v.value not in _free(right[1]) and v.value not in in_values
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

    def _products(self, final: Node, score: Expr, j: Expr) -> list[tuple[Expr, Contraction]]:
        """The loads of contractions in which one operand alone runs over the keys: nearest plain ones first."""
        found: list[tuple[Expr, Contraction]] = []
        for e in walk(score):
            if e.op != "load" or not (j.value in e.free or j.args[0] is A.ONE):
                continue
            node = slot_node(e.value)
            c = contraction(node, e.args) if batched(node) else None
            if c is None or not all(value(x).dtype.is_floating_point for x in (c.left, c.right)):
                continue
            if j.args[0] is A.ONE or (j.value in _free(c.left_index)) != (j.value in _free(c.right_index)):
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
        found = N.Normalised(score, A.PROB, (), float(p), True)
        return self._build(Parts(at, out, row, j, d, e, tuple(pairs), found))

    # -- both ---------------------------------------------------------------------------------
    def _build(self, parts: Parts) -> Match:
        """Choose where the operands are read, split the batch axes as they need it, and write the spec."""
        batch = [v for v in parts.out if v not in (parts.value_width, parts.row) and v.args[0] is not A.ONE]
        query, key, val, splits = self._operands(parts, frozenset(str(v.value) for v in batch))
        found = parts.found
        score = substitute(found.score, {A.DOT: A.mul(query.factor, key.factor, A.DOT)})
        found = replace(found, score=score, weight=A.mul(val.factor, found.weight))
        programs = [apply_splits(p, splits) for p in (found.score, found.weight, *found.extra)]
        splits = [*splits, *program_splits(programs, frozenset(str(v.value) for v in split_axes(batch, splits)))]
        operands = [Operand(x.node, tuple(apply_splits(i, splits) for i in x.index)) for x in (query, key, val)]
        axes = split_axes(batch, splits)
        in_kv = _free(operands[1].index) | _free(operands[2].index)
        kv_axes = [a for a in axes if a.value in in_kv]
        group_axes = [a for a in axes if a.value not in in_kv]
        if not kv_axes and len(shape(key.node)) < 3:
            message = "the keys are one matrix, as a router's gate or a codebook is"
            raise Refused("shared_keys", message, [parts.final])
        programs = self._rename(found, splits, kv_axes, group_axes, parts.row, parts.column)
        spec, captures, sizes = self._spec(parts, programs, found, query.node)
        taught = any(x.node in self.facts.differentiable for x in operands) or any(c.grad for c in spec.captures)
        out = tuple(apply_splits(v, splits) for v in parts.out)
        return Match(
            parts.final, spec, operands[0], operands[1], operands[2], captures, sizes, kv_axes, group_axes, parts.row,
            parts.column, parts.width, parts.value_width, out, training=taught,
        )  # fmt: skip

    def _operands(self, parts: Parts, batch: frozenset[str]) -> tuple[Access, Access, Access, list[Split]]:
        """The best readings of query, key and value; upcasts are undone only where all three agree on a dtype."""
        lists = [accesses(self.lifter, *pair) for pair in parts.pairs]
        for upcast in (True, False):
            chosen = [best(candidates, batch, upcast) for candidates in lists]
            for c, (node, _) in zip(chosen, parts.pairs, strict=True):
                if c is None:
                    raise Refused("layout", "an operand is gathered in a way that views cannot express", [node])
            found = [c for c in chosen if c is not None]
            if len({value(a.node).dtype for a, _ in found}) == 1:
                break
        for access, _ in found:
            self._unchanged(access.node, parts.final)
        return found[0][0], found[1][0], found[2][0], _merge([splits for _, splits in found])

    def _rename(self, found: N.Normalised, splits: list[Split], kv: list[Expr], group: list[Expr],
                row: Expr, j: Expr) -> list[Expr]:  # fmt: skip
        """The programs over the canonical variables b, h, i, j. (B, H) is (all key axes but the last, the rest)."""
        by: dict[Expr, Expr] = {row: S.I, j: S.J}
        if row.args[0] is A.ONE:
            by[row] = A.ZERO
        _unflatten(by, kv[:-1] if len(kv) > 1 else kv, S.B)
        heads = [*(kv[-1:] if len(kv) > 1 else []), *group]
        _unflatten(by, heads, S.H)
        lengths = {x.args[0]: A.size(name) for x, name in ((j, "S"), (row, "T")) if x.args[0].op == "size"}
        out = []
        for program in (found.score, found.weight, *found.extra):
            program = self._load_reductions(program)
            out.append(substitute(substitute(apply_splits(program, splits), by), lengths))
        return out

    def _load_reductions(self, program: Expr) -> Expr:
        """A reduction that is no part of the normaliser is computed by the graph, and loaded."""

        def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
            place = self.lifter.reductions.get(old)
            return self.lifter.load(*place) if place is not None else None

        return rebuild(program, change)

    def _spec(
        self, parts: Parts, programs: list[Expr], found: N.Normalised, query: Node
    ) -> tuple[AttentionSpec, list[Node], list[str]]:
        """The canonical spec, the nodes behind its captures and the names of its symbolic sizes, in order."""
        score, weight, *extra = programs
        if found.normaliser == "none":
            score, weight = A.DOT, substitute(weight, {A.PROB: substitute(score, {A.DOT: A.PROB})})
        slots: dict[object, Capture] = {}
        for e in (e for program in (score, weight, *extra) for e in walk(program)):
            if e.op in ("rsum", "rmax", "softmax", "dropout"):
                hint = "Only the chunked tier over whole rows could run it."
                raise Refused("reduction", "a row of scores is reduced to change the scores", [parts.final], hint)
            stray = sorted(e.free - set(S.AXES))
            if stray:
                message = f"the score depends on an index that is no axis of the attention ({stray[0]})"
                raise Refused("axes", message, [parts.final])
            if e.op == "load":
                slots[e.value] = self._capture(e.value, parts, programs)
        for program in extra:
            if "j" in program.free or any(e.op == "dot" for e in walk(program)):
                raise Refused("extra", "an added column of the softmax depends on the keys", [parts.final])
        dtype = str(value(parts.final).dtype).removeprefix("torch.")
        compute = "float64" if value(query).dtype == torch.float64 else "float32"
        draft = AttentionSpec(
            score,
            found.normaliser,
            tuple(extra),
            weight,
            found.dropout,
            found.safe,
            compute,
            dtype,
            tuple(slots.items()),  # type: ignore[arg-type]
        )
        return S.canonical(draft)  # type: ignore[return-value]

    def _capture(self, slot: object, parts: Parts, programs: list[Expr]) -> Capture:
        """What the program loads, where loading it is sound."""
        at = slot_node(slot)
        if isinstance(slot, Product) or (parts.product is not None and self.facts.descends(at, parts.product)):
            message = f"the scores pass through {op_name(at)}, which no score program expresses"
            raise Refused("score_used", message, [at], "It may need a whole row of scores.")
        held = value(at)
        if not isinstance(held, torch.Tensor):
            return Capture(FLOAT, 0, False)  # a symbolic number
        if held.dtype.is_complex:
            raise Refused("dtype", f"{at.name} is complex", [at])
        self._unchanged(at, parts.final)
        kind = kind_of(held.dtype)
        taught = kind == FLOAT and at in self.facts.differentiable and _differentiable(at, programs)
        return Capture(kind, held.dim(), taught)

    def _unchanged(self, base: Node, final: Node) -> None:
        if self.facts.changed_before(base, final):
            raise Refused("mutated", f"{base.name} is changed in place between its use and the attention", [base])


def batched(n: Node) -> bool:
    """Whether a node is a product of two batches of matrices: what scores and weighted values are. A product with one
    matrix (a linear layer, a router's gate) is not."""
    if n.op != "call_function" or op_name(n) not in PRODUCTS or not is_tensor(n):
        return False
    operands = [x for x in n.all_input_nodes if is_tensor(x)]
    operands = operands[-2:] if op_name(n) == "baddbmm" else operands
    return all(len(shape(x)) > 2 for x in operands)


def _free(index: Index) -> frozenset[str]:
    return frozenset().union(*(x.free for x in index))


def _plain(c: Contraction) -> bool:
    """Whether plain indices, split or merged, read both operands: no gathers."""
    return all(
        radix(x) is not None or any(e.op in ("floordiv", "mod") for e in walk(x))
        for x in (*c.left_index, *c.right_index)
    )


def _merge(lists: list[list[Split]]) -> list[Split]:
    out: list[Split] = []
    for splits in lists:
        for split in splits:
            if split in out:
                continue
            if any(set(split) & set(s) for s in out):
                raise Refused("layout", "query, key and value split a batch dimension in different ways")
            out.append(split)
    return out


def _unflatten(by: dict[Expr, Expr], axes: list[Expr], flat: Expr) -> None:
    """Express the axes through one variable that flattens them, the last fastest."""
    rest = flat
    for n, a in enumerate(reversed(axes)):
        extent = a.args[0]
        by[a] = rest if n == len(axes) - 1 else A.mod(rest, extent)
        rest = A.floordiv(rest, extent)


def _differentiable(node: Node, programs: list[Expr]) -> bool:
    """Whether some load of the node is reached without passing a detach."""
    for program in programs:
        stack = [program]
        seen: set[Expr] = set()
        while stack:
            e = stack.pop()
            if e in seen or e.op == "detach" or (e.kind != FLOAT and e.op != "where"):
                continue
            seen.add(e)
            if e.op == "load" and e.value is node:
                return True
            stack.extend(e.args)
    return False


__all__ = ["Finder", "Finding", "Match", "Operand"]
