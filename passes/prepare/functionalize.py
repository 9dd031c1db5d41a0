"""Functionalize in-place operators near a normalizer: scores, weights and masks that are edited in place.

    scores.masked_fill_(mask, c); scores.softmax(-1)   becomes   masked_fill(scores, mask, c).softmax(-1)

A write is rewritten only if this is certain to be right. The written memory must be allocated by an operator of this
graph, not by an input or a parameter. After the write, nothing may read a view of it that was taken before. Gradients,
strides and random draws must stay as they were. A write through slices (`scores[:, :, 1:] += bias`) or reshapes is put
back into their base. All other mutation stays. Needs `meta["val"]`; changes the graph in place; promises the same
results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from attnfx.passes.fx.analysis import Facts, is_random, storage, written_operands
from attnfx.passes.fx.nodes import argument, dims, memory_order, op_name, shares_memory, value
from attnfx.passes.lift.emitter import CannotEmit, Emitter
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.products import near_normalizer, of_products

aten = torch.ops.aten
# Allocations that are written part by part: passes/prepare/hoist_concat.py joins the parts.
EMPTY = ("empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros")
SCATTERS = {
    "slice": aten.slice_scatter.default, "select": aten.select_scatter.default,
    "diagonal": aten.diagonal_scatter.default,
}  # fmt: skip
RESHAPES = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")
STORAGE = ("resize", "resize_as", "set")  # operators that change a tensor's memory


def _pure(node: Node) -> Any:
    """Return the out-of-place overload with the same arguments, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._overloadpacket.__name__
    name = {"__iand__": "bitwise_and", "__ior__": "bitwise_or"}.get(name, name.removesuffix("_"))
    packet = getattr(aten, name, None)
    if packet is None or name in STORAGE:
        return None
    kinds = [str(a.type) for a in target._schema.arguments]
    overloads = (getattr(packet, x) for x in packet.overloads())
    pure = next((x for x in overloads if [str(a.type) for a in x._schema.arguments] == kinds), None)
    if pure is None:
        return None
    random = is_random(pure) and not name.endswith("dropout")
    return None if pure._schema.is_mutable or random else pure


def run(graph: Graph) -> int:
    """Rewrite each write that can be made out of place; return how many were rewritten."""
    gm = graph.gm
    nodes = list(gm.graph.nodes)
    writes = [n for n in nodes if len(w := written_operands(n)) == 1 and n.args[0] is w[0]]
    if not writes:
        return 0
    facts, near = graph.facts, near_normalizer(nodes)
    families = {key: list(found) for key, found in facts.families.items()}
    changed = 0
    for node in writes:
        target: Node = node.args[0]  # type: ignore[assignment]
        key = storage(target)
        if key is None or not _fresh(families[key]) or near.isdisjoint(families[key]):
            continue
        views = _views(target)
        base = op_name(views[-1].args[0]) if views else ""  # type: ignore[arg-type]
        source = node.args[1] if op_name(node) == "copy_" else None
        if base in EMPTY and ("zeros" not in base or (isinstance(source, Node) and of_products([source]))):
            continue
        # aliases from before the write that are read after it, besides the tensors that get a new value below
        renewed = [target, *(v.args[0] for v in views)]
        aliases = [n for n in families[key] if n is not node and n not in renewed]
        stale = any(n < node and any(node < u for u in n.users) for n in aliases)
        if stale or not _same_gradients(facts, node, views):
            continue
        before = node.prev
        try:
            fresh = _computed(graph.emitter(node), node, views)
        except CannotEmit:
            fresh = None
        if fresh is None:
            while node.prev is not before:
                gm.graph.erase_node(node.prev)
            continue
        learned = facts.differentiable.intersection((*fresh, *node.all_input_nodes))
        for old, current in fresh.items():
            for user in list(old.users):
                if node < user:
                    user.replace_input_with(old, current)
        node.replace_all_uses_with(fresh[target], propagate_meta=False)
        gm.graph.erase_node(node)
        families[key] = [n for n in families[key] if n is not node]
        for n in dict.fromkeys(fresh.values()):
            families[key].append(n)
            if learned:
                facts.differentiable.add(n)
        changed += 1
    return changed


def _same_gradients(facts: Facts, node: Node, views: list[Node]) -> bool:
    """Return whether the overwritten value keeps the gradient that it had."""
    target: Node = node.args[0]  # type: ignore[assignment]
    base: Node = views[-1].args[0] if views else target  # type: ignore[assignment]
    taught = base not in facts.regions or base in facts.differentiable
    if taught and facts.regions[node][0] is False:
        return False  # autograd does not record a write under no_grad: the target keeps its history
    if not taught or op_name(node) != "copy_" or not all(map(_whole, views)):
        return True
    # the overwritten value has a gradient of zeros; out of place, it would be None
    source: Node = node.args[1]  # type: ignore[assignment]
    return base in facts.regions and source in facts.regions and facts.descends(source, base)


def _computed(emit: Emitter, node: Node, views: list[Node]) -> dict[Node, Node] | None:
    """Map the written tensor and the bases of its views to their values after the write, computed out of place. Return
    None if an operator for that is missing or returns other strides."""
    parts = [v for v in views if not _whole(v)]
    out = _copied(emit, node, clone=not parts) if op_name(node) == "copy_" else _called(emit, node)
    if out is None or not (parts or shares_memory(out, node)):
        return None
    fresh: dict[Node, Node] = {node.args[0]: out}  # type: ignore[dict-item]
    for view in views:
        base: Node = view.args[0]  # type: ignore[assignment]
        part = fresh[view]
        if view in parts:
            part = emit.call(SCATTERS[op_name(view)], base, part, *view.args[1:], **view.kwargs)
        elif dims(view) != dims(base):
            part = emit.call(aten.reshape.default, part, [emit.size(n) for n in dims(base)])
        if part is not fresh[view] and not shares_memory(part, base):
            return None
        fresh[base] = part
        if view not in parts and dims(view) != dims(base):  # later writes go through the view into the base, too
            fresh[view] = emit.call(view.target, part, *view.args[1:], **view.kwargs)
    return fresh


def _whole(view: Node) -> bool:
    """Return whether a slice or another view takes all of its operand."""
    return op_name(view) in RESHAPES or (op_name(view) == "slice" and dims(view) == dims(view.args[0]))  # type: ignore[arg-type]


def _called(emit: Emitter, node: Node) -> Node | None:
    if op_name(node) == "fill_diagonal_" and value(node).ndim == 2 and argument(node, 2, "wrap") is not True:
        x, fill = node.args[:2]
        part = emit.call(aten.fill.Scalar, emit.call(aten.diagonal.default, x), fill)
        return emit.call(aten.diagonal_scatter.default, x, part)
    pure = _pure(node)
    if pure is None:
        return None
    out = emit.call(pure, *node.args, **node.kwargs)
    if value(out).stride() != value(node).stride() and (order := memory_order(node)):
        out = emit.call(aten.contiguous.default, emit.call(aten.permute.default, out, order))
        out = emit.call(aten.permute.default, out, [order.index(d) for d in range(len(order))])
    to = value(node).dtype
    return out if value(out).dtype == to else emit.call(aten.to.dtype, out, to)


def _copied(emit: Emitter, node: Node, clone: bool) -> Node | None:
    """Return a copy's source in the target's dtype and shape: autograd knows no pure overload of copy_."""
    target, source = node.args[:2]
    if not isinstance(source, Node) or value(source).device != value(target).device:
        return None
    out = source
    if value(source).dtype != value(target).dtype:
        out = emit.call(aten.to.dtype, out, value(target).dtype)
    if dims(out) != dims(target):  # type: ignore[arg-type]
        out = emit.call(aten.expand.default, out, [emit.size(n) for n in dims(target)])  # type: ignore[arg-type]
    return emit.call(aten.clone.default, out, memory_format=torch.contiguous_format) if clone else out


def _views(target: Node) -> list[Node]:
    """Return the slices and reshapes through which a tensor is written, the last first; empty if it is not a view."""
    out: list[Node] = []
    while op_name(target) in SCATTERS or (
        op_name(target) in RESHAPES and value(target).dtype == value(target.args[0]).dtype
    ):
        out.append(target)
        target = target.args[0]  # type: ignore[assignment]
    return out


def _fresh(family: list[Node]) -> bool:
    """Return whether an operator of this graph allocated the memory."""
    first = family[0]
    if any(n.op in ("placeholder", "get_attr") for n in family) or first.op != "call_function":
        return False
    schema = getattr(first.target, "_schema", None)
    return schema is not None and not any(r.alias_info is not None for r in schema.returns)
