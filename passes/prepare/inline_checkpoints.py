"""Inline checkpointed regions: put their nodes into the graph itself, marked for recomputation.

Dynamo makes one higher-order operator of each `torch.utils.checkpoint` call. AOTAutograd later inlines its body and
marks each node for the partitioner. This pass does the same before the search, so that a loop over checkpointed chunks
is seen whole. `unmark` drops the marks of regions that are nothing but attention by then: its backward pass recomputes
anyway, so running the forward pass again would be wasted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from operator import attrgetter, getitem
from typing import Any

import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from attnfx.passes.fx.nodes import MARKS, POLICY, REGION, op_name
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.tables import VIEWS


def run(graph: Graph) -> int:
    """Inline the plain checkpointed regions of a Dynamo graph, in a new module; return how many there were."""
    gm = graph.gm
    found = sum(_body(gm, n) is not None for n in gm.graph.nodes)
    if found:
        made, held = FxGraph(), {}
        made.output(_copied(gm, made, {}, held, {}, itertools.count(1)))
        graph.gm = GraphModule(held, made)
        graph.gm.meta.update(gm.meta)
    return found


def _body(gm: GraphModule, n: Node) -> GraphModule | None:
    """Return the body of a region that recomputes everything, if its results are read one by one; else None."""
    if n.op != "call_function" or n.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    body = attrgetter(str(n.args[0].target))(gm) if isinstance(n.args[0], Node) else None
    if not isinstance(body, GraphModule) or "_checkpoint_context_fn" in body.meta:
        return None  # a policy chooses the saved values
    results, given = body.graph.output_node().args[0], [x for x in body.graph.nodes if x.op == "placeholder"]
    if len(given) != len(n.args) - 1 or not isinstance(results, tuple) or not all(isinstance(x, Node) for x in results):
        return None
    return body if all(u.target is getitem for u in n.users) else None


def _copied(
    gm: GraphModule, graph: FxGraph, values: dict[Node, Any], held: dict[str, Any], marks: dict[str, Any],
    regions: Iterator[int],
) -> Any:  # fmt: skip
    """Copy all nodes but the output, and return the output's arguments over the copies. `values` has the placeholders
    of a body, `held` collects the attributes of a module that the copies read."""
    for n in gm.graph.nodes:
        if n in values:
            continue
        if n.op == "output":
            return torch.fx.map_arg(n.args[0], values.__getitem__)
        if body := _body(gm, n):
            given = (x for x in body.graph.nodes if x.op == "placeholder")
            inner = dict(zip(given, (values.get(x, x) for x in n.args[1:]), strict=True))
            mark = {REGION: next(regions), POLICY: CheckpointPolicy.PREFER_RECOMPUTE} if torch.is_grad_enabled() else {}
            results = _copied(body, graph, inner, held, mark, regions)
            values.update((u, results[u.args[1]]) for u in n.users)
            continue
        values[n] = graph.node_copy(n, values.__getitem__)
        values[n].meta.update(marks)
        if n.op in ("get_attr", "call_module"):
            name, module = str(n.target), attrgetter(str(n.target))(gm)
            while held.setdefault(name, module) is not module:
                name += "_"
            values[n].target = name
    raise AssertionError("a graph without an output")


def unmark(gm: GraphModule) -> None:
    """Drop the marks of regions that hold only operators of attnfx and views. Changes the graph in place."""
    regions: dict[int, list[Node]] = {}
    for n in gm.graph.nodes:
        if REGION in n.meta:
            regions.setdefault(n.meta[REGION], []).append(n)
    for nodes in regions.values():
        if all(op_name(n).startswith(("attnfx::", "sym_")) or op_name(n) in (*VIEWS, "getitem") for n in nodes):
            for n, mark in itertools.product(nodes, MARKS):
                n.meta.pop(mark, None)
