"""Match a contraction with normalized weights, and build its spec.

`Finder(graph).find()` tries each contraction with an operand that descends from a softmax (or an exponential, or a
gate). It lifts that operand, and returns a `Match` or a `Refusal` for the site. The graph is not changed.

    out[.., i, .., e] = sum_j  W(.., i, j) * V(.., j, e)        W = weight(normalize_j(score))
    score holds one load of another contraction, sum_d Q(.., i, d) * K(.., j, d)

Axes: i is the row, which only the query has. j and d are contracted. e is only in the value. All other axes are batch
axes: first the axes that key or value depend on (the last of them is the key head), then the grouped heads, which only
the query has. Grouped heads are never expanded: the walk through key and value undoes the expansion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import Expr, walk
from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import seeds_of
from attnfx.passes.fx.nodes import (
    SDPA,
    Opaque,
    dims,
    is_tensor,
    label,
    op_name,
    refusal,
    shape_text,
    slot_node,
    value,
    where_in_source,
)
from attnfx.passes.lift.access import free, radix
from attnfx.passes.lift.contraction import Contraction, contraction
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import broadcast
from attnfx.passes.lift.products import batched, of_batch, of_one_matrix, parameter
from attnfx.passes.lift.reductions import bound as reduced_over
from attnfx.passes.lift.tables import INDEXING, POINTWISE, REDUCTIONS, VIEWS, Index
from attnfx.passes.match import softmax as N
from attnfx.passes.match.candidates import Descent, shared
from attnfx.passes.match.results import Finding, Match
from attnfx.passes.match.sdpa_call import library_call
from attnfx.passes.match.spec_builder import Parts, Reader, Refused
from attnfx.spec import fill_of

SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")
COMPARISONS = ("ge0", "eq0", "lt", "le", "eq")
PROVED = ("masked_rows",)  # refusal codes that only a proved attention gets


class Finder:
    """The state of one search: the lifter's memo and positions of nodes. `doubtful` are sites with an exponential or a
    gate between two products not proved to be an attention. `failed` are sites where the search itself raised."""

    def __init__(self, graph: Graph):
        self.gm = graph.gm
        self.doubtful: list[Finding] = []
        self.failed: dict[Node, Exception] = {}
        self.facts, self.lifter = graph.facts, graph.lifter
        self.reader = Reader(self.facts, self.lifter)
        self.descent = Descent(graph.gm, self.lifter)

    def find(self) -> list[Finding]:
        findings: list[Finding] = []
        for n in self.gm.graph.nodes:
            if n.op == "call_function" and op_name(n) in SDPA:
                findings.append(self._attempt(n, lambda at: self._match(library_call(self.lifter, at)), [n]))
            elif batched(n) or of_one_matrix(n):
                found = self._at_product(n) if batched(n) else self._at_shared_values(n)
                findings.extend([found] if found is not None else [])
        return findings

    def _at_product(self, n: Node) -> Finding | None:
        """Try a product as the end of an attention; return None if it does not look like one."""
        descent = self.descent
        weights = seeds_of(descent.weights, n)
        seeds = [s for s in weights if descent.from_scores(s)]
        if seeds:
            found = self._attempt(n, self._written_out, seeds)
            why = found.refusal
            # a gate or an exponential between two products is not an attention until proved
            proved = found.match is not None and not _layers(found.match)
            proved |= why is not None and why.code in PROVED
            if proved or any("softmax" in op_name(s) for s in seeds):
                return found
            # exponentials over nearly their sum (plus a small constant), or weights for each pair of rows
            nearly = why is not None and (why.code == "normaliser" or any(map(shared, seeds)))
            if nearly or (why is not None and descent.from_pairs(n, seeds)):
                return replace(found, loose=True)
            self.doubtful.append(found)
        met = [s for s in weights if s in descent.met]
        if anchors := descent.loose.get(n):
            odd = self._unsupported(n, anchors)
            what = f"the operator {label(odd[0])}" if odd else "an operator"
            message = f"{what} between the scores and the values cannot be computed for each score by itself"
            return Finding(n, refusal=refusal("not_lifted", message, *odd, n, *anchors), anchors=anchors, loose=True)
        if met and not seeds:
            message = "queries and keys are combined without a product"
            return Finding(n, refusal=refusal("no_product", message, n, *met), anchors=met, loose=True)
        return None

    def _at_shared_values(self, n: Node) -> Finding | None:
        """Try a product of weights with one matrix of values, which the whole batch shares; return None unless it is
        proved, because it may be a layer."""
        seeds = [
            s for s in seeds_of(self.descent.weights, n) if "softmax" in op_name(s) and self.descent.from_scores(s)
        ]
        found = self._attempt(n, self._written_out, seeds) if seeds else None
        return found if found is not None and found.match is not None else None

    def _attempt(self, n: Node, how: Callable[[Node], Match], anchors: list[Node]) -> Finding:
        try:
            match = how(n)
            match.anchors = anchors
            return Finding(match.final, match=match, anchors=anchors)
        except Refused as r:
            why = r.refusal
            odd = [s for s in seeds_of(self.descent.scores, *anchors) if value(s).is_complex()]
            if odd and why.code == "no_product":
                message = f"the scores are complex: {label(odd[0])} returns {value(odd[0]).dtype}"
                why = refusal("dtype", message, *odd)
        except (Opaque, N.NotNormalised) as problem:
            code = getattr(problem, "code", "not_lifted")
            message = getattr(problem, "message", "an operand of the attention is not a function of its indices")
            places = ", ".join(dict.fromkeys(filter(None, map(where_in_source, anchors))))
            why = refusal(code, message, *anchors, n, **{"places": places, **getattr(problem, "facts", {})})
        except Exception as problem:  # a failure at one site must not lose the others
            self.failed[n] = problem
            why = refusal("fault", "attnfx failed on this attention", *anchors, n)
        return Finding(n, refusal=why, anchors=anchors)

    def _unsupported(self, final: Node, anchors: list[Node]) -> list[Node]:
        """Return the operators between the scores that lead to the anchors and `final` that cannot be lifted."""
        made_of = self.descent.anyhow
        above = reach([final], lambda n: [a for a in n.all_input_nodes if not batched(a)])
        products = set(seeds_of(made_of, *anchors))
        found = (n for n in above if n is not final and not products.isdisjoint(made_of.get(n, ())))
        return sorted(n for n in found if not _lifted(op_name(n)))

    # -- decomposed attention -------------------------------------------------------------------
    def _written_out(self, final: Node) -> Match:
        problem: Exception | None = None
        for last, path, divisor in self._endings(final):
            out = tuple(A.var(f"o{d}", n) for d, n in enumerate(dims(last)))
            index: Index = out
            for view in reversed(path):
                _, index = VIEWS[op_name(view)](view, index)
            whole = contraction(final, index)
            if whole is None:
                message = f"{label(final)} is not a sum over the keys of weight times value"
                raise Refused("contraction", message, [final])
            for c in (whole, whole.turned):
                if not any(map(self.descent.from_scores, self.descent.weights.get(c.left, ()))):
                    continue
                try:
                    weight = self.lifter.lift(c.left, c.left_index)
                    if divisor is not None:
                        weight = A.mul(weight, A.unary("recip", self._divisor(divisor, final, out)))
                    found = N.normalise(weight, c.reduced)
                    if divisor is not None and found.normaliser != "softmax":
                        message = "the output is divided by something other than the sum of the weights"
                        raise Refused("normaliser", message, [last])
                    return self._assemble(last, out, c.reduced, found, c.right, c.right_index)
                except (Opaque, N.NotNormalised, Refused) as p:
                    # of several readings, report the one that got further
                    problem = p if problem is None or not isinstance(problem, Refused) else problem
        message = f"the weights reach {label(final)} through an unknown operator"
        raise problem or Refused("contraction", message, [final])

    def _endings(self, final: Node) -> list[tuple[Node, list[Node], Node | None]]:
        """Return the possible ends of the attention, each as (last node, views up to it, divisor): the product itself
        or, for (exp(s) @ v) / sum(exp(s)), a division of the product or of a view of it. A product with several readers
        may be divided by a part of itself, as by a column of ones."""
        out: list[tuple[Node, list[Node], Node | None]] = [(final, [], None)]
        splits = [u for u in final.users if op_name(u) in SPLITS]
        readers = [r for u in final.users for r in (u.users if u in splits else (u,))]
        if len(readers) > 1 and (final in self.facts.written or any(op_name(r) not in VIEWS for r in readers)):
            return out
        for user in readers:
            at, path = final, []
            while op_name(user) in VIEWS and user.args[0] in (at, *splits) and len(path) < 8:
                path.append(user)
                at = user
                if len(at.users) != 1:
                    break
                user = next(iter(at.users))
            if op_name(user) != "div" or len(user.args) != 2 or user.args[0] is not at or dims(user) != dims(at):
                continue
            divisor = user.args[1]
            if is_tensor(divisor) and (len(readers) == 1 or self.facts.descends(divisor, final)):  # type: ignore[arg-type]
                out.append((user, path, divisor))  # type: ignore[arg-type]
        return out

    def _divisor(self, divisor: Node, final: Node, out: Index) -> Expr:
        """Lift a divisor of the product. Where it reads the product along a column of values that are one, this is the
        sum of the weights."""

        def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
            c = contraction(final, args) if old.op == "load" and old.value is final else None
            if c is None or self.lifter.lift(c.right, c.right_index) is not A.const(1.0):
                return None
            j = A.var(f"ones_{final.name}", c.reduced.args[0])
            weights = self.lifter.lift(c.left, tuple(j if x is c.reduced else x for x in c.left_index))
            return A.reduction("rsum", str(j.value), j.args[0], weights)

        return rebuild(self.lifter.lift(divisor, broadcast(divisor, out)), change)

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
        """Return the match in which `load` is the product of queries and keys."""
        if self.facts.regions[dot.node] != self.facts.regions[final]:
            message = "the scores and the product with the values are in different autocast or no_grad regions"
            raise Refused("region", message, [dot.node, final])
        in_values = free(values_at)
        in_weights = free(dot.left_index) | free(dot.right_index) | found.score.free | found.weight.free
        width = [v for v in out if v.value in in_values and v.value not in in_weights]
        if not width and out[-1].args[0] is A.ONE:
            width = [out[-1]]  # values of width 1: an index into a dimension of size 1 is zero
        if len(width) != 1:
            message = f"the values have {len(width)} dimensions that the weights lack, and must have exactly one"
            shared = [size_of for size_of, x in zip(dims(values), values_at, strict=True) if x.free & in_weights]
            wide = [v.args[0] for v in width]
            wanted = shape_text([*shared, A.mul(*wide) if wide else A.ONE])
            raise Refused("values", message, [values], count=len(width), wanted=wanted)
        row = self.row(found.score, load, dot, j, out, in_values)
        pairs = ((dot.left, dot.left_index), (dot.right, dot.right_index), (values, values_at))
        found = over_dot(found, load, dot)
        return self._match(Parts(final, out, row, j, dot.reduced, width[0], pairs, found, dot.node))

    def row(self, score: Expr, load: Expr, dot: Contraction, j: Expr, out: Index, in_values: frozenset[str]) -> Expr:
        """Return the query's row: the last dimension of the scores that only the query has, if possible one that a mask
        compares with the keys."""
        query = free(dot.left_index) - free(dot.right_index)
        alone = [v for v in out if v.value in query and v.value not in in_values]
        bound = load.free.difference(str(v.value) for v in (*out, j))
        if not alone and bound and (over := [n for n in self.gm.graph.nodes if reduced_over(n) in bound]):
            message = "a sum, mean or maximum over the queries changes the scores before the softmax"
            raise Refused("reduction", message, [over[0], dot.node])
        if not alone:  # a single query, or one per batch element
            ones = [v for v in out if v.args[0] is A.ONE]
            if ones:
                return ones[-1]
            message = "every dimension of the scores also belongs to the keys or values: each query has its own keys"
            *before, last = dims(dot.left)
            queries, wanted = shape_text([*before, last]), shape_text([*before, A.ONE, last])
            raise Refused("rows", message, [dot.node], queries=queries, wanted=wanted)
        compared = frozenset().union(*(e.free for e in walk(score) if e.op in COMPARISONS and j.value in e.free))
        alone = [v for v in alone if v.value in compared] or alone
        order = {v: n for n, v in enumerate(out)}
        for x in reversed(load.args):
            inside = [v for v in alone if v.value in x.free]
            if inside:
                return max(inside, key=lambda v: order[v])
        return alone[-1]

    def products(self, final: Node, score: Expr, j: Expr) -> list[tuple[Expr, Contraction]]:
        """Return loads of contractions in which exactly one operand runs over the keys, on the right; the nearest plain
        ones first."""
        found: list[tuple[Expr, Contraction]] = []
        for e in walk(score):
            if e.op != "load" or not (j.value in e.free or j.args[0] is A.ONE):
                continue
            node = slot_node(e.value)
            c = (
                contraction(e.value, e.args)
                if node in self.descent.products and not self.facts.changed_after(node, before=final)
                else None
            )
            if c is None or not all(value(x).dtype.is_floating_point for x in (c.left, c.right)):
                continue
            if j.args[0] is A.ONE or (j.value in free(c.left_index)) != (j.value in free(c.right_index)):
                found.append((e, c.turned if j.value in free(c.left_index) else c))
        if not found:
            raise self._no_product(final, score)
        found.sort(key=lambda pair: pair[1].node, reverse=True)
        return sorted(found, key=lambda pair: not _plain(pair[1]))

    def _no_product(self, final: Node, score: Expr) -> Refused:
        """Return the refusal of scores that load no product of queries with keys; it names the obstacle if it can."""
        loads = [slot_node(e.value) for e in walk(score) if e.op == "load"]
        odd = next((n for n in loads if n in self.descent.scores), None)
        if odd is None:
            return Refused("no_product", "the softmax is not computed from a product of queries and keys", [final])
        integer = None
        if odd not in self.descent.products:
            message = f"{label(odd)} between the scores and the softmax cannot be computed for each score by itself"
            if (most := self.lifter.most(odd)) is not None:
                message = f"more than {most} operators lead from {label(odd)} to the weights"
        elif not value(odd).dtype.is_floating_point:
            integer = value(odd).dtype
            message = f"the product of queries and keys, {label(odd)}, has the dtype {value(odd).dtype}"
        else:
            message = f"{label(odd)} is not a product in which one operand alone has the dimension of the keys"
        return Refused("no_product", message, [odd, final], integer=integer, most=self.lifter.most(odd))

    def _match(self, parts: Parts) -> Match:
        read = self.reader.read(parts)
        assert parts.value_width is not None
        match = Match(
            **vars(read), final=parts.final, row=parts.row, column=parts.column, width=parts.width,
            value_width=parts.value_width, draw=parts.found.draw,
        )  # fmt: skip
        learns = (x.node in self.facts.differentiable for x in read.operands)
        match.training = any(learns) or any(c.grad for c in read.spec.captures)
        if not match.training or match.every_row_live:  # adding a fill then equals replacing the score by it
            match.spec = replace(match.spec, score=A.in_place(match.spec.score))
        if parts.found.by_log and fill_of(match.spec.score) not in (None, -math.inf) and not match.every_row_live:
            message = "in a fully masked row, the finite fill makes each weight exp(score - log(sum)) equal to 1"
            raise Refused("masked_rows", message, [parts.final], fill=f"{fill_of(match.spec.score):g}")
        return match


def _lifted(name: str) -> bool:
    return any(name in table for table in (POINTWISE, VIEWS, INDEXING, REDUCTIONS))


def over_dot(found: N.Normalised, load: Expr, dot: Contraction) -> N.Normalised:
    """Replace the load of the product in the score by `dot`, which float16 rounds."""
    rounded = A.half(A.DOT) if value(dot.node).dtype == torch.float16 else A.DOT
    return replace(found, score=substitute(found.score, {load: rounded}))


def _layers(match: Match) -> bool:
    """Return whether keys and values are both parameters or plain input matrices: linear layers, or experts."""
    return all(parameter(x.node) or (x.node.op == "placeholder" and not of_batch(x.node)) for x in match.operands[1:])


def _plain(c: Contraction) -> bool:
    """Return whether plain indices, split or merged, read both operands, without gathers."""
    return all(
        radix(x) is not None or any(e.op in ("floordiv", "mod") for e in walk(x))
        for x in (*c.left_index, *c.right_index)
    )
