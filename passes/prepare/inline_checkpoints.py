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

import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from attnfx.passes.fx.copies import copied, inlined
from attnfx.passes.fx.nodes import MARKS, POLICY, REGION, op_name
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.tables import VIEWS


def run(graph: Graph) -> int:
    """Inline the plain checkpointed regions of a Dynamo graph, in a new module; return how many there were."""
    count = sum(_body(graph.gm, n) is not None for n in graph.gm.graph.nodes)
    if count:
        graph.gm, _ = copied(graph.gm)
        regions = itertools.count(1)
        for n in list(graph.gm.graph.nodes):
            _inline(graph.gm, n, regions)
        graph.gm.delete_all_unused_submodules()
        graph.gm.recompile()
    return count


def _inline(gm: GraphModule, n: Node, regions: Iterator[int]) -> None:
    """Put the nodes of a region, if the node is one, and of the regions in it in the node's place."""
    body = _body(gm, n)
    if body is None:
        return
    region, learns = next(regions), torch.is_grad_enabled()
    results, made = inlined(gm, n, body, n.args[1:])
    for x in list(n.users):
        x.replace_all_uses_with(results[x.args[1]], propagate_meta=False)
        gm.graph.erase_node(x)
    gm.graph.erase_node(n)
    for x in made:
        if learns:
            x.meta.update({REGION: region, POLICY: CheckpointPolicy.PREFER_RECOMPUTE})
        _inline(gm, x, regions)


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
