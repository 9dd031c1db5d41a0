"""Join parts of one result where they are computed, instead of where they are read.

    cat([f(x_0), f(x_1), ..])   becomes   f(cat([x_0, x_1, ..]))

A loop over chunks ends in a `cat` of the chunks, or writes each into its place of an empty tensor. `run` turns such
writes into a `cat`, and moves a `cat` back through operators that are applied to all parts alike (a transpose, a
reshape, a linear layer), up to the products that compute the parts. Each such operator f must keep the joined rows
apart. Needs `meta["val"]`; changes the graph in place; promises the same results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.analysis import storage, written_operands
from attnfx.passes.fx.nodes import STACK, Opaque, dims, is_tensor, op_name, parts, take_place, value
from attnfx.passes.lift.access import variables
from attnfx.passes.lift.emitter import Emitter, like
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.products import batched, of_products
from attnfx.passes.lift.row_rules import Along, Made, NotSeparable, split
from attnfx.passes.lift.tables import VIEWS
from attnfx.passes.prepare.functionalize import EMPTY
from attnfx.spec.rows import Ref

aten = torch.ops.aten


def run(graph: Graph) -> int:
    """Move joins of parts back to the products that the parts come from; return how many were made or moved."""
    nodes = list(graph.gm.graph.nodes)
    changed = sum(_written_in_parts(graph, n) for n in nodes if op_name(n) in EMPTY)
    if changed:
        graph.changed()
    regions = graph.facts.regions
    for n in list(graph.gm.graph.nodes):
        found = parts(n)
        at: Node | None = n if found is not None and of_products(found[0]) else None
        while at is not None and (found := parts(at)) is not None:
            if any(regions[x] != regions[n] for x in found[0]):
                break  # a linear layer's result depends on the autocast region, its gradient on the no_grad region
            at = _moved_back(graph, at)
            if at is not None:
                graph.changed()
                changed += 1
    return changed


# -- writes into parts of an empty tensor ---------------------------------------------------------
@dataclass(frozen=True)
class Write:
    """A write of `source` into a part of an empty tensor, by the node `copy` through `views`.

    places   dimension -> (where the part begins, its size), for each dimension that is cut
    single   the dimensions in which the part is one element long, and which the source lacks
    """

    copy: Node
    source: Node
    views: list[Node]
    places: dict[int, tuple[Expr, Expr]]
    single: frozenset[int]


def _written_in_parts(graph: Graph, base: Node) -> bool:
    gm, facts = graph.gm, graph.facts
    held = value(base)
    if not isinstance(held, torch.Tensor) or held.layout != torch.strided or not held.is_contiguous():
        return False
    family = [n for n in gm.graph.nodes if storage(n) == storage(base)]
    writes = [w for w in (_write(base, n) for n in family) if w is not None]
    if len(writes) < 2 or not of_products([w.source for w in writes]):
        return False
    if len({(*w.places, w.single, facts.regions[w.copy]) for w in writes}) != 1:
        return False
    last, views = writes[-1].copy, {n for w in writes for n in w.views}
    ours = {base, *views, *(w.copy for w in writes)}
    if any(n not in ours and n < last for n in (*family, *base.users)):
        return False
    if any(u not in ours for n in views for u in n.users):
        return False  # a view that is read elsewhere would stay empty
    after = last.next
    emit = Emitter(gm, after)
    emit.kept = {k: v for k, v in last.meta.items() if k in STACK}
    made = _joined(emit, base, writes, sorted(writes[0].places))
    if made is None:
        while last.next is not after:
            gm.graph.erase_node(after.prev)
        return False
    for w in writes:
        gm.graph.erase_node(w.copy)
    base.replace_all_uses_with(made, delete_user_cb=lambda u: u not in views, propagate_meta=False)
    return True


def _joined(emit: Emitter, base: Node, writes: list[Write], along: list[int]) -> Node | None:
    """Emit the tensor that the writes make up, joined along the first of these dimensions last. Return None if they
    leave out a part of the base or cover it twice."""
    if not along:
        return writes[0].source if len(writes) == 1 else None
    dim, *inner = along
    groups: dict[Expr, list[Write]] = {}
    for w in writes:
        groups.setdefault(w.places[dim][0], []).append(w)
    end, found = A.ZERO, []
    for start in sorted(groups, key=lambda e: e.value if e.op == "const" else 0):  # type: ignore[arg-type,return-value]
        sizes = {w.places[dim][1] for w in groups[start]}
        part = _joined(emit, base, groups[start], inner)
        if start is not end or len(sizes) != 1 or part is None:
            return None
        end = A.add(end, sizes.pop())
        found.append(part)
    if end is not dims(base)[dim]:
        return None
    single = writes[0].single
    gone = sum(d < dim for d in single)  # the outer levels add these later
    return emit.call(aten.stack.default if dim in single else aten.cat.default, found, dim - gone)


def _write(base: Node, copy: Node) -> Write | None:
    """Return the write into a part of the base that a node makes through slices, or None."""
    if op_name(copy) != "copy_" or copy.users or not is_tensor(copy.args[1]):
        return None
    at, source = copy.args[:2]
    kinds = [(dims(x), value(x).dtype, value(x).device) for x in (at, source)]  # type: ignore[arg-type]
    own = index = variables(at)  # type: ignore[arg-type]
    views: list[Node] = []
    while at is not base and isinstance(at, Node) and op_name(at) in ("slice", "select"):
        views.append(at)
        try:
            at, index = VIEWS[op_name(at)](at, index)
        except Opaque:
            return None
    if at is not base or kinds[0] != kinds[1]:
        return None
    places, single = {}, set()
    for d, (e, whole) in enumerate(zip(index, dims(base), strict=True)):
        along = next((v for v in own if v.value in e.free), None)
        start, size = (e, A.ONE) if along is None else (A.sub(e, along), along.args[0])
        if start.free:
            return None  # a slice with a step
        if along is None:
            single.add(d)
        if along is None or size is not whole:
            places[d] = start, size
    return Write(copy, source, views, places, frozenset(single)) if places else None  # type: ignore[arg-type]


# -- a join moved back ----------------------------------------------------------------------------
def _moved_back(graph: Graph, at: Node) -> Node | None:
    """Move the join before the last operator of each part; return the new join, or None if it has to stay."""
    found = parts(at)
    assert found is not None
    operands, dim = found
    if any(batched(x) or written_operands(x) for x in operands):
        return None
    try:
        calls = [split(x, dim, dims(x)[dim]) for x in operands]
    except NotSeparable:
        return None
    first = calls[0]
    sources = [_source(made, first) for made in calls]
    if any(x is None for x in sources):
        return None
    before, row = [x.node for x in sources if x is not None], sources[0].dim  # type: ignore[union-attr]
    if len(set(before)) != len(before) or any(len(x.users) != 1 for x in before):
        return None
    if len({dims(x)[:row] + dims(x)[row + 1 :] for x in before}) != 1:
        return None  # the parts have several shapes
    if any(dims(x)[row] is not dims(p)[dim] for x, p in zip(before, operands, strict=True)):
        return None
    packet, _, overload = first.op.partition(".")
    target = getattr(getattr(aten, packet), overload)
    emit = graph.emitter(at)
    joined = emit.call(aten.cat.default, before, row)
    rows = emit.size(dims(at)[dim])

    def given(x: Any) -> Any:
        return joined if isinstance(x, Along) else rows if isinstance(x, Ref) else x

    made = emit.call(target, *map_aggregate(first.args, given), **map_aggregate(dict(first.kwargs), given))  # type: ignore[misc,arg-type]
    made = like(emit, made, at)
    take_place(made, at)
    at.graph.erase_node(at)
    for x in operands:
        x.graph.erase_node(x)
    return joined


def _source(made: Made, like: Made) -> Along | None:
    """Return the only operand with rows of a call, if the call is the same as `like` in all other respects."""
    given = tree_leaves((made.args, dict(made.kwargs)))
    alongs = [x for x in given if isinstance(x, Along)]
    if len(alongs) != 1 or "." not in made.op or any(isinstance(x, Ref) and x.kind != "rows" for x in given):
        return None

    def dim(x: Any) -> Any:
        return x.dim if isinstance(x, Along) else x

    mine, theirs = (map_aggregate((x.op, x.args, dict(x.kwargs)), dim) for x in (made, like))
    return alongs[0] if mine == theirs else None
