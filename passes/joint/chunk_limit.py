"""What the chunked tier computes in a graph that is rewritten already: the size of its chunks, and whether it draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from attnfx.passes.fx.nodes import argument, op_name
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
    return any(isinstance(_argument(n, "seed"), Node) for graph in graphs for n in _calls(graph))


def _limit(graph: Graph, elements: int) -> set[str]:
    """The names of the nodes that changed."""
    changed = set()
    for n in _calls(graph):
        others = str(_argument(n, "tier")).split(",")[1:]
        n.update_arg(_position(n, "tier"), ",".join([f"{TIER}:{elements}", *(t for t in others if t != TIER)]))
        changed.add(n.name)
    return changed


def _calls(graph: Graph) -> Iterator[Node]:
    """Each call whose first tier is the chunked one."""
    for n in graph.nodes:
        if n.op == "call_function" and op_name(n) in OPERATORS:
            if str(_argument(n, "tier")).partition(",")[0].partition(":")[0] == TIER:
                yield n


def _position(n: Node, name: str) -> int:
    """Where the operator's schema has an argument."""
    return [a.name for a in n.target._schema.arguments].index(name)  # type: ignore[union-attr]


def _argument(n: Node, name: str) -> Any:
    return argument(n, _position(n, name), name)
