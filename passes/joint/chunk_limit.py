"""What the chunked tier computes in a graph that is rewritten already: the size of its chunks, and whether it draws."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from attnfx.passes.fx.nodes import op_name
from attnfx.passes.joint.mark_recompute import copied
from attnfx.passes.joint.read_graph import attention_workspace

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


def draws(gm: GraphModule) -> bool:
    """Whether dropout is drawn by the chunked tier, which reads its seed on the host: no CUDA graph can be captured."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, GraphModule))
    return any(isinstance(n.args[at - 2], Node) for graph in graphs for n, at in _calls(graph))


def _limit(graph: Graph, elements: int) -> set[str]:
    """The names of the nodes that changed."""
    changed = set()
    for n, at in _calls(graph):
        others = str(n.args[at]).split(",")[1:]
        n.update_arg(at, ",".join([f"{TIER}:{elements}", *(t for t in others if t != TIER)]))
        changed.add(n.name)
    return changed


def _calls(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Each call whose first tier is the chunked one, and which argument says so; the seed stands two before it."""
    for n in graph.nodes:
        if n.op != "call_function" or op_name(n) not in OPERATORS:
            continue
        at = [k for k, a in enumerate(n.args) if isinstance(a, str)]
        if len(at) == 2 and str(n.args[at[1]]).partition(",")[0].partition(":")[0] == TIER:
            yield n, at[1]


__all__ = ["draws", "limit", "workspaces"]
