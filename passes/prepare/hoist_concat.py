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

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.analysis import storage, written_operands
from attnfx.passes.fx.nodes import STACK, dims, is_tensor, op_name, parts, size_expr, take_place, value
from attnfx.passes.lift.emitter import Emitter, like
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.products import batched, of_products
from attnfx.passes.lift.row_rules import Along, Made, NotSeparable, split
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
    """A write of `source` into a part of an empty tensor, by the node `copy`. The part begins at `starts[d]` along some
    dimensions d. It is one element long along the dimensions `single`, which the source lacks."""

    copy: Node
    source: Node
    starts: dict[int, Expr]
    single: frozenset[int]


def _written_in_parts(graph: Graph, base: Node) -> bool:
    gm, facts = graph.gm, graph.facts
    held = value(base)
    if not isinstance(held, torch.Tensor) or held.layout != torch.strided or not held.is_contiguous():
        return False
    family = [n for n in gm.graph.nodes if storage(n) == storage(base)]
    writes = [w for w in (_write(base, n) for n in family) if w is not None]
    copies = {w.copy for w in writes}
    if len(writes) < 2 or not of_products([w.source for w in writes]):
        return False
    last = max(copies, key=facts.position.__getitem__)
    views = {n for w in writes for n in _path(base, w.copy)}
    if any(n not in views and n not in copies and n is not base and facts.position[n] <= facts.position[last]
           for n in family):  # fmt: skip
        return False
    if any(u not in views and facts.position[u] < facts.position[last] for u in base.users):
        return False
    if any(u not in views and u not in copies for n in views for u in n.users):
        return False  # a view that is read elsewhere would stay empty
    if len({(*w.starts, w.single) for w in writes}) != 1 or len({facts.regions[w.copy] for w in writes}) != 1:
        return False
    if any((value(w.source).dtype, value(w.source).device) != (held.dtype, held.device) for w in writes):
        return False
    if any(dims(w.source) != dims(w.copy.args[0]) for w in writes):  # type: ignore[arg-type]
        return False
    emit = Emitter(gm, last.next)
    emit.kept = {k: v for k, v in last.meta.items() if k in STACK}
    order = _in_order(base, writes, sorted(writes[0].starts))
    if order is None:
        return False
    made = _joined(emit, order, sorted(writes[0].starts), writes[0].single)
    for w in writes:
        gm.graph.erase_node(w.copy)
    base.replace_all_uses_with(made, delete_user_cb=lambda u: u not in views, propagate_meta=False)
    return True


Nested = list  # of writes, or of such lists: one level per dimension


def _in_order(base: Node, writes: list[Write], along: list[int]) -> Nested | None:
    """Return the writes nested by their starts, the first dimension outermost; None if they leave out a part of the
    base or cover it twice."""
    dim, *inner = along
    groups: dict[Expr, list[Write]] = {}
    for w in writes:
        groups.setdefault(w.starts[dim], []).append(w)
    at, out = A.ZERO, []
    for start in sorted(groups, key=lambda e: e.value if e.op == "const" else 0):  # type: ignore[arg-type,return-value]
        found = {_extent(w, dim) for w in groups[start]}
        if start is not at or len(found) != 1 or (not inner and len(groups[start]) != 1):
            return None
        out.append(_in_order(base, groups[start], inner) if inner else groups[start][0])
        at = A.add(at, found.pop())
    return out if at is dims(base)[dim] and all(x is not None for x in out) else None


def _extent(w: Write, dim: int) -> Expr:
    return A.ONE if dim in w.single else dims(w.source)[dim - sum(d < dim for d in w.single)]


def _joined(emit: Emitter, order: Nested, along: list[int], single: frozenset[int]) -> Node:
    dim, *inner = along
    found = [_joined(emit, x, inner, single) if inner else x.source for x in order]
    gone = sum(d < dim for d in single)  # the outer levels add these later
    return emit.call(aten.stack.default if dim in single else aten.cat.default, found, dim - gone)


def _path(base: Node, at: Node) -> list[Node]:
    """Return the views between a tensor and a write to it."""
    out = []
    while (at := at.args[0]) is not base and isinstance(at, Node) and op_name(at) in ("slice", "select"):  # type: ignore[assignment]
        out.append(at)
    return out if at is base else []


def _write(base: Node, copy: Node) -> Write | None:
    """Return the write into a part of the base that a node makes through slices, or None."""
    if op_name(copy) != "copy_" or copy.users or not is_tensor(copy.args[1]):
        return None
    path = _path(base, copy)
    if not path:
        return None
    starts: dict[int, Expr] = {}
    dimensions, single = list(range(len(dims(base)))), set()
    for view in reversed(path):
        named = ("self", "dim", "index") if op_name(view) == "select" else ("self", "dim", "start", "end", "step")
        given = dict(zip(named, view.args)) | dict(view.kwargs)
        dim, start = given.get("dim", 0), given.get(named[2])
        held = value(start) if start is not None else 0
        if given.get("step", 1) != 1 or not isinstance(dim, int) or not isinstance(held, int | torch.SymInt):
            return None
        d = dimensions[dim % len(dimensions)]
        if op_name(view) == "slice" and dims(view) == dims(view.args[0]):  # type: ignore[arg-type]
            continue
        if d in starts or (isinstance(held, int) and held < 0):
            return None
        starts[d] = size_expr(held)
        if op_name(view) == "select":
            dimensions.remove(d)
            single.add(d)
    return Write(copy, copy.args[1], starts, frozenset(single)) if starts else None  # type: ignore[arg-type]


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
    if len(set(before)) != len(before) or any(
        len(x.users) != 1 or len(dims(x)) != len(dims(before[0])) for x in before
    ):
        return None
    if any(dims(x)[row] is not dims(p)[dim] for x, p in zip(before, operands, strict=True)):
        return None
    others = [dims(x)[:row] + dims(x)[row + 1 :] for x in before]
    if any(x != others[0] for x in others):
        return None  # the parts have several shapes
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
    alongs: list[Along] = []
    plain = True

    def visit(x: Any) -> Any:
        nonlocal plain
        if isinstance(x, Along):
            alongs.append(x)
            return x.dim
        plain &= not isinstance(x, Ref) or x.kind == "rows"
        return x

    mine = map_aggregate((made.op, made.args, dict(made.kwargs)), visit)
    count = len(alongs)
    theirs = map_aggregate((like.op, like.args, dict(like.kwargs)), visit)
    if count != 1 or not plain or mine != theirs or "." not in made.op:
        return None
    return alongs[0]
