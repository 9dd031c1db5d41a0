"""Replace a no_grad region between the products of an attention by detaches of the values that it reads.

    with torch.no_grad(): w = s.softmax(-1)        becomes        w = s.detach().softmax(-1)

Applies to regions of pure ATen operators that read or return values near a normalizer, without a product or a layer in
between. An attention that is within a region as a whole stays there. Needs `meta["val"]`; changes the graph in place;
promises the same results and gradients.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from attnfx.passes.fx.analysis import Facts, storage
from attnfx.passes.fx.nodes import op_name
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.products import near_normalizer

SET_GRAD = torch._C._set_grad_enabled


def run(graph: Graph) -> int:
    """Replace each such region; return how many were replaced."""
    switches = graph.gm.graph.find_nodes(op="call_function", target=SET_GRAD)
    regions = [(n, *_until_switch(n)) for n in switches if n.args[0] is False]
    regions = [(enter, nodes, leave) for enter, nodes, leave in regions if leave.target is SET_GRAD and leave.args[0]]
    if not regions:
        return 0
    facts, near = graph.facts, near_normalizer(list(graph.gm.graph.nodes))
    changed = 0
    for enter, nodes, leave in regions:
        outer = facts.regions.get(enter.prev, (None, None))[0]
        inside = set(nodes)
        leaving = [n for n in nodes if any(u not in inside for u in n.users)]
        if outer is False or near.isdisjoint(leaving) or not all(_plain(facts, n) for n in nodes):
            continue
        read = dict.fromkeys(
            x for n in nodes for x in n.all_input_nodes if x not in inside and x in facts.differentiable
        )
        memory = {storage(x) for x in read}
        aliases = [n for n in nodes if storage(n) in memory or "dropout" in op_name(n)]
        if any(u not in inside for n in aliases for u in n.users):
            continue  # contiguous() or dropout(p=0) may return its operand itself; a view keeps requires_grad
        emit = graph.emitter(enter)
        for x in read:
            detached = emit.call(torch.ops.aten.detach.default, x)
            for n in nodes:
                n.replace_input_with(x, detached)
        graph.gm.graph.erase_node(enter)
        graph.gm.graph.erase_node(leave)
        changed += 1
    return changed


def _until_switch(enter: Node) -> tuple[list[Node], Node]:
    """Return the nodes after `enter` up to the next switch of the grad mode or the end, and that node."""
    nodes, at = [], enter.next
    while at.op != "output" and at.target is not SET_GRAD:
        nodes.append(at)
        at = at.next
    return nodes, at


def _plain(facts: Facts, n: Node) -> bool:
    """Return whether a node is a constant, or an ATen operator that is pure."""
    if n.op == "get_attr":
        return n not in facts.differentiable
    known = isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "aten"
    return known and n not in facts.written
