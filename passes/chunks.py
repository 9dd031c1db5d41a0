"""The size of the chunks that the chunked tier computes in, in a graph that is rewritten already."""

from __future__ import annotations

from torch.fx import Graph, GraphModule

from attnfx.passes.graphs import op_name
from attnfx.passes.liveness import attention_workspace
from attnfx.passes.recompute import copied

OPERATORS = ("attnfx::attention", "attnfx::attention_backward")
TIER = "chunked"


def limit(gm: GraphModule, elements: int) -> None:
    """Let the chunked tier compute no more than `elements` scores at once, wherever it is the one that was chosen."""
    for module in gm.modules():
        if isinstance(module, GraphModule) and _limit(module.graph, elements):
            module.recompile()


def workspaces(gm: GraphModule, elements: int, cpu: bool) -> dict[str, int]:
    """The bytes that each call of the chunked tier would then take while it runs, by the node's name."""
    graph = copied(gm.graph)
    changed = _limit(graph, elements)
    return {n.name: attention_workspace(n, cpu) for n in graph.nodes if n.name in changed}


def _limit(graph: Graph, elements: int) -> set[str]:
    """The names of the nodes that changed."""
    changed = set()
    for n in graph.nodes:
        if n.op != "call_function" or op_name(n) not in OPERATORS:
            continue
        at = [k for k, a in enumerate(n.args) if isinstance(a, str)]
        first, *others = str(n.args[at[1]]).split(",") if len(at) == 2 else [""]
        if first.partition(":")[0] == TIER:
            n.update_arg(at[1], ",".join([f"{TIER}:{elements}", *(t for t in others if t != TIER)]))
            changed.add(n.name)
    return changed


__all__ = ["limit", "workspaces"]
