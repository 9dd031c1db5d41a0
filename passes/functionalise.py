"""In-place operators on values that the graph made itself become out-of-place ones.

Only where it is certain: the written tensor lives in memory that an operator of this graph allocated (no input, no
parameter), and after the write nobody reads a view of that memory that was taken before. What is written through
slices (`scores[:, :, 1:] += bias`) is put back into what they were taken of. All other mutation stays exactly as it
was. Needs `meta["val"]`; changes the graph in place; promises the same results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnfx.passes.facts import storage, written_operands
from attnfx.passes.graphs import dims, fake_mode, op_name, value

aten = torch.ops.aten
# What is allocated to be written part by part: passes/joins.py joins the parts.
EMPTY = ("empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros")
SCATTERS = {"slice": aten.slice_scatter.default, "select": aten.select_scatter.default}


def _pure(node: Node) -> Any:
    """The out-of-place overload with the same arguments, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._overloadpacket.__name__
    name = {"__iand__": "bitwise_and", "__ior__": "bitwise_or"}.get(name, name.removesuffix("_"))
    packet = getattr(aten, name, None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    pure = getattr(packet, target._overloadname)
    return None if pure._schema.is_mutable else pure


def functionalise(gm: GraphModule) -> int:
    """Rewrites what it can; gives how many operators changed."""
    position = {n: p for p, n in enumerate(gm.graph.nodes)}
    families: dict[int, list[Node]] = {}
    for n in gm.graph.nodes:
        key = storage(n)
        if key is not None:
            families.setdefault(key, []).append(n)
    changed = 0
    for node in list(gm.graph.nodes):
        written = written_operands(node)
        if len(written) != 1 or node.args[0] is not written[0]:
            continue
        target = written[0]
        key = storage(target)
        pure = _pure(node)
        if key is None or pure is None or not _fresh(families[key]):
            continue
        views = _views(target)
        if views and op_name(views[-1].args[0]) in EMPTY:  # type: ignore[arg-type]
            continue
        # every other alias that is read after the write: the written tensor itself, or what comes from the result
        renewed = {target, *(v.args[0] for v in views)}
        aliases = [n for n in families[key] if n is not node and n not in renewed]
        stale = [
            n for n in aliases if position[n] < position[node] and any(position[u] > position[node] for u in n.users)
        ]
        if stale:
            continue
        before, after = value(target), value(node)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(pure, node.args, node.kwargs)
        new.meta = dict(node.meta)
        plain = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with fake_mode(plain, node.meta.get("val")):
            new.meta["val"] = pure(*plain[0], **plain[1])  # type: ignore[operator,index]
        made = new
        if new.meta["val"].dtype != before.dtype:  # type: ignore[union-attr]
            with gm.graph.inserting_before(node):
                made = gm.graph.call_function(aten.to.dtype, (new, before.dtype))  # type: ignore[union-attr]
            made.meta = {**node.meta, "val": new.meta["val"].to(before.dtype)}  # type: ignore[union-attr]
        if tuple(made.meta["val"].shape) != tuple(after.shape):  # type: ignore[union-attr]
            gm.graph.erase_node(made)
            continue
        fresh = {target: made}
        for view in views:
            fresh[view.args[0]] = _put_back(gm, node, view, fresh[view])  # type: ignore[index]
        for old, current in fresh.items():
            for user in list(old.users):
                if position.get(user, -1) > position[node]:
                    user.replace_input_with(old, current)
        node.replace_all_uses_with(made, propagate_meta=False)
        gm.graph.erase_node(node)
        families[key] = [n for n in families[key] if n is not node]
        for n in {new, *fresh.values()}:
            position[n] = position[node]
            families.setdefault(storage(n) or 0, []).append(n)
        changed += 1
    if changed:
        gm.recompile()
    return changed


def _views(target: Node) -> list[Node]:
    """The slices through which something is written, the last first; empty where it is no slice."""
    out: list[Node] = []
    while op_name(target) in SCATTERS:
        out.append(target)
        target = target.args[0]  # type: ignore[assignment]
    return out


def _put_back(gm: GraphModule, at: Node, view: Node, part: Node) -> Node:
    """What a slice was taken of, with `part` in its place."""
    source = view.args[0]
    assert isinstance(source, Node)
    if op_name(view) == "slice" and dims(view) == dims(source):
        return part
    target, args = SCATTERS[op_name(view)], (source, part, *view.args[1:])
    with gm.graph.inserting_before(at):
        made = gm.graph.call_function(target, args, view.kwargs)
    plain = torch.fx.map_arg((args, view.kwargs), lambda n: n.meta["val"])
    with fake_mode(plain, at.meta.get("val")):
        made.meta = {**at.meta, "val": target(*plain[0], **plain[1])}  # type: ignore[index]
    return made


def _fresh(family: list[Node]) -> bool:
    """Whether the memory was allocated by an operator of this graph."""
    first = family[0]
    if any(n.op in ("placeholder", "get_attr") for n in family) or first.op != "call_function":
        return False
    schema = getattr(first.target, "_schema", None)
    return schema is not None and not any(r.alias_info is not None for r in schema.returns)
