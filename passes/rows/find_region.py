"""Find the region between the products of queries with keys and an attention's output, to run it as a row program.

Used for an attention that a score program cannot describe. The walk goes back from the product with the values through
nodes that depend on its rows. It stops at operands that are not larger than the queries, and at operands that every row
reads whole. The region is accepted only if each of its operators keeps rows apart (`passes/lift/row_rules.py`), and if
none of its inputs is as large as the scores and computed from scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.ir.reach import postorder, reach
from attnfx.passes.fx.analysis import Facts, written_operands
from attnfx.passes.fx.nodes import dims, facts_of, is_tensor, label, number, op_name, refusal, value
from attnfx.passes.lift.access import free, variables
from attnfx.passes.lift.contraction import contracted
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.products import batched, meeting
from attnfx.passes.lift.row_rules import NONE, Along, NotSeparable, split
from attnfx.passes.match.results import Finding
from attnfx.passes.rows.live_keys import find_columns
from attnfx.passes.rows.region import Region
from attnfx.report.records import Refusal

NEVER = ("mutated", "region", "dtype")  # refusal codes that hold for every rewrite
LARGEST = 400  # nodes of one region
NEAR = 3  # most consecutive small nodes before the scores (indices of the best keys, a threshold)


def find_region(graph: Graph, finding: Finding, known: Iterable[Region] = ()) -> Region | Refusal:
    """Return the region of a refused finding, or a refusal. One of the `known` regions with this result is not searched
    for again: products of the same weights are computed together."""
    final = finding.final
    if finding.refusal is not None and finding.refusal.code in NEVER:
        return finding.refusal
    problem: NotSeparable | None = None
    for row, key in _candidates(graph.facts, finding):
        for region in known:
            if final in region.results and region.rows[final] == row and region.columns is key.args[0]:
                return replace(region, final=final)
        try:
            return _Walk(graph, final, row, key).region()
        except NotSeparable as p:
            problem = problem or p
    reason = str(problem) if problem else "the output lacks a dimension of the queries"
    culprits = [problem.node] if problem is not None and problem.node is not None else []
    facts: dict[str, object] = {"operator": None}  # the output itself is not to blame
    if problem is not None:
        facts = {**(facts_of(problem.cause) if problem.cause is not None else facts), **problem.facts}
    message = f"the rows (one for each query) cannot be computed separately: {reason}"
    return refusal("rows_mixed", message, *culprits, final, **facts)


def _candidates(facts: Facts, finding: Finding) -> list[tuple[int, Expr]]:
    """Return (dimension of the rows, variable of the keys) to try: the dimensions that only the weights have, the
    largest first, then the dimensions that the values have too, in which each row has its own values. At last, NONE:
    the final product sums over the rows, and its queries are their keys."""
    final = finding.final
    c = contracted(final)
    if c is None:
        return []
    weights = {x for x in final.all_input_nodes if any(facts.descends(x, a) for a in finding.anchors)}
    found = sorted(
        (v.value in free(other), -number(value(final).shape[d]), -d)
        for w, at, other in ((c.left, c.left_index, c.right_index), (c.right, c.right_index, c.left_index))
        for d, v in enumerate(variables(final))
        if w in weights and v.value in free(at) and dims(final)[d] is not A.ONE
    )
    # other rows and keys would draw other dropout than an attention that shares the weights
    turned = [(NONE, variables(final)[-d]) for own, _, d in found[:1] if not (own or facts.draws)]
    return [*((-d, c.reduced) for _, _, d in found), *turned]


class _Walk:
    def __init__(self, graph: Graph, final: Node, row: int, key: Expr):
        self.facts, self.lifter, self.final, self.key = graph.facts, graph.lifter, final, key
        self.product, self.columns = contracted(final), key.args[0]
        assert self.product is not None
        extent = self.product.reduced.args[0] if row == NONE else dims(final)[row]
        self.found = Region(final, extent, self.columns, {final: row})
        self.known: dict[Node, bool] = {}  # whether a node is computed from the scores
        self.own: list[Node] = []  # scores of keys that each row has of its own, which belong to the region
        self.problem: NotSeparable | None = None

    def region(self) -> Region:
        found = self.found
        found.scores = self._scores()
        if not found.scores:
            raise self.problem or NotSeparable("known operators do not lead to a product of queries and keys")
        self.known = dict.fromkeys(found.scores, True)
        self._collect([self.final])
        self._grow()
        self._check()
        found.narrowed = None if NONE in found.rows.values() else find_columns(self.lifter, found)
        return found

    def _computed(self, x: Node) -> bool:
        """Return whether a node is computed from the scores. Visits only the nodes between."""
        first = min(self.found.scores)
        unknown = postorder([x], lambda n: [a for a in n.all_input_nodes if a not in self.known and not a < first])
        for n in unknown if x not in self.known else ():
            sources = n.all_input_nodes if op_name(n) != "sym_size" else ()
            self.known[n] = any(self.known.get(a, False) for a in sources)
        return self.known[x]

    def _scores(self) -> list[Node]:
        """Return the products that the weights come from: one factor has the rows, and the keys come from the other.
        The walk follows the dimension of the keys, because another dimension may have the same size. Without such a
        product, the first one whose keys each row has of its own (keys plus edges)."""
        seen, out, own = {self.final}, [], []
        ends = self._operands(self.final, self.found.rows[self.final], None)
        stack = [(x, self._keys(x.node), 0) for x, _ in ends]
        while stack:
            x, key, far = stack.pop()
            far = 0 if self._has_keys(x, key) else far + 1
            if x.node in seen or far > NEAR:
                continue
            seen.add(x.node)
            if key == NONE and batched(x.node):
                continue  # queries that another attention computes
            operands = self._operands(x.node, x.dim, key)
            having = any(self._has_keys(*a) for a in operands)
            if (batched(x.node) or meeting(x.node)) and not far and not having:
                out.append(x.node)
            else:
                if not far and _within(x.node):
                    own.append(x.node)
                known = sorted(operands, key=lambda a: a[1] not in (None, NONE))  # visited first, from the end
                stack.extend((a, at, far) for a, at in known)
        if not out:
            self.own = [n for n in own if not any(n is not m and self.facts.descends(n, m) for m in own)]
        return out or self.own

    def _operands(self, n: Node, row: int, key: int | None) -> list[tuple[Along, int | None]]:
        """Return the operands that have the rows, each with the dimension of its keys, which lie along the dimension
        `key` of `n`: NONE if the operand lacks the keys, None if that is unknown. Empty if the walk ends here."""
        extent = self.found.extent
        if n.op != "call_function":
            return []
        try:
            made = split(n, row, extent)
        except NotSeparable as problem:
            self.problem = self.problem or problem
            return []
        rows = [x for x in made.operands() if x.dim != NONE]
        if key is None or key == NONE or not all(is_tensor(x) for x in (n, *(x.node for x in rows))):
            return [(x, None) for x in rows]  # a value without keys may be computed from one with keys
        try:
            made = split(n, row, extent, (key, dims(n)[key]))
        except NotSeparable:  # a softmax or a join of keys mixes keys, but keeps their dimension
            others = [(len(dims(x)), *dims(x)[:key], *dims(x)[key + 1 :]) for x in (n, *(x.node for x in rows))]
            return [(x, key if same == others[0] else None) for x, same in zip(rows, others[1:])]
        return [(x, x.keys) for x in made.operands() if x.dim != NONE]

    def _has_keys(self, x: Along, key: int | None) -> bool:
        return self.found.large(x.node, x.dim) if key is None else key != NONE

    def _keys(self, x: Node) -> int | None:
        """Return the dimension of the keys of an operand of the last product, or None."""
        c = self.product
        pairs = (c.left, c.left_index), (c.right, c.right_index)  # type: ignore[union-attr]
        return next((at.index(self.key) for node, at in pairs if node is x and self.key in at), None)

    def _grow(self) -> None:
        """Add values that readers compute row by row from large values, such as a row's maximum or its entropy. Readers
        of values that are not computed from scores, such as a mask, stay outside: their results may be inputs."""
        found, seen = self.found, set(self.found.calls)
        waiting = [n for n in found.calls if n is not self.final and self._computed(n)]
        while waiting:
            n = waiting.pop()
            for u in n.users if self.found.large(n, found.rows[n]) else ():
                if u not in seen:
                    seen.add(u)
                    waiting += self._taken(u)

    def _taken(self, n: Node) -> list[Node]:
        """Add a reader to the region if it keeps rows apart, and if all its operands computed from scores are inside
        already. Of an operator that returns a tuple, add the results. Return the added nodes."""
        found = self.found
        if n.op != "call_function" or written_operands(n) or op_name(n).startswith("sym_"):
            return []
        given = [n] if is_tensor(n) else [u for u in n.users if op_name(u) == "getitem" and u.users]
        for one in given[:1]:
            for d in [*(d for d, size in enumerate(dims(one)) if size is found.extent), NONE]:
                try:
                    read = split(n, d, found.extent).operands()
                except NotSeparable:
                    continue
                if all(found.rows.get(x.node) == x.dim != NONE for x in read if self._computed(x.node)):
                    before = set(found.calls)
                    self.known.update(dict.fromkeys((n, *given), True))
                    found.rows[one] = d
                    self._collect([one])
                    return [x for x in found.calls if x not in before]
        return []

    def _collect(self, stack: list[Node]) -> None:
        """Collect all nodes of the region that the nodes on the stack need, and the inputs."""
        found = self.found
        while stack:
            n = stack.pop()
            row = found.rows[n]
            try:
                made = split(n, row, found.extent)
            except NotSeparable:
                if self._computed(n):
                    raise
                del found.rows[n]
                self._read(n, row)
                continue
            found.calls[n] = made
            if op_name(n) == "getitem":  # the other results of the same operator
                for other in n.args[0].users:  # type: ignore[union-attr]
                    if other.users and other not in found.rows:
                        found.rows[other] = row
                        stack.append(other)
            if len(found.calls) > LARGEST:
                why = f"more than {LARGEST} operators are between the scores and the output"
                raise NotSeparable(why, most=LARGEST)
            for x in made.operands():
                if x.dim == NONE:
                    if self._computed(x.node):
                        raise NotSeparable(f"{label(n)} needs all rows of {label(x.node)}", n, x.node)
                    if is_tensor(x.node):
                        self._read(x.node, None)
                elif (n not in found.scores or n in self.own or self._computed(x.node)) and self._inside(x):
                    if x.node not in found.rows:
                        found.rows[x.node] = x.dim
                        stack.append(x.node)
                else:
                    self._read(x.node, x.dim)

    def _inside(self, x: Along) -> bool:
        """Return whether an operand belongs to the region: computed from scores, or as large as they are."""
        other = self.found.rows.get(x.node, x.dim) != x.dim
        if self._computed(x.node):
            if other:
                raise NotSeparable(f"the rows of {label(x.node)} are read along two dimensions", x.node)
            return True
        if x.node.op != "call_function" or op_name(x.node) == "getitem" or x.node in self.facts.written:
            return False
        return not other and self.found.large(x.node, x.dim)

    def _read(self, n: Node, dim: int | None) -> None:
        self.found.inputs[(n, dim)] = None

    def _check(self) -> None:
        found, facts = self.found, self.facts
        order = sorted(found.calls)
        found.calls = {n: found.calls[n] for n in order}
        region = facts.regions[self.final]
        for n in order:
            if facts.regions[n] != region:
                raise NotSeparable(f"{label(n)} is in another autocast or no_grad region", n)
        for n in [*order, *(n for n, _ in found.inputs)]:
            inside = n in found.calls and n is not self.final  # a result that is written later is copied
            if n in facts.written and (inside or (n not in found.calls and self._changed_since_read(n))):
                raise NotSeparable(f"{label(n)} is changed in place", n)
            held = value(n)
            if isinstance(held, torch.Tensor) and (held.is_complex() or held.layout != torch.strided):
                raise NotSeparable(f"{label(n)} is complex or sparse", n)
            if isinstance(held, torch.Tensor) and held.device != value(self.final).device and held.ndim:
                raise NotSeparable(f"{label(n)} is on another device", n)
        for n in order:
            outside = [u for u in n.users if u not in found.calls and op_name(u) != "sym_size" and _read_by(u)]
            # a value that is not computed from scores stays in the graph for other readers
            if n is self.final or (outside and self._computed(n)):
                if not is_tensor(n):
                    raise NotSeparable(f"the tuple that {label(n)} returns is read outside the attention", n)
                found.results.append(n)
        for n, d in found.inputs:
            queries = all(u in found.scores for u in n.users if u in found.calls)
            if d is not None and not queries and self.found.large(n, d) and self._made_of_a_product(n):
                raise self.problem or NotSeparable(
                    f"{label(n)} is as large as the scores and comes from another product", n
                )
        if not any(d is not None for _, d in found.inputs):
            raise NotSeparable("none of the inputs has rows")

    def _changed_since_read(self, n: Node) -> bool:
        """Return whether an input is written after the first node of the region that reads it."""
        readers = [u for u in n.users if u in self.found.calls]
        return self.facts.changed_after(n, after=min(readers))

    def _made_of_a_product(self, n: Node) -> bool:
        """Return whether a large operand comes from a product through other large ones: it would stay as large."""
        extents = {self.columns, self.found.extent}
        large = reach([n], lambda x: [a for a in x.all_input_nodes if is_tensor(a) and extents <= set(dims(a))])
        return any(map(batched, large))


def _read_by(n: Node) -> bool:
    return bool(n.users) or n.op == "output" or bool(written_operands(n))


def _within(n: Node) -> bool:
    """Return whether a node multiplies a tensor with one that has all of its dimensions: one key for each score."""
    c = contracted(n) if batched(n) else None
    return c is not None and (free(c.left_index) <= free(c.right_index) or free(c.right_index) <= free(c.left_index))
