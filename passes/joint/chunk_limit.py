"""Limit the chunks of the chunked tier in a rewritten graph, and find out whether this tier applies dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from attnfx.passes.fx.nodes import argument, op_name
from attnfx.passes.joint.read_graph import attention_workspace

OPERATORS = ("attnfx::attention", "attnfx::attention_backward")
TIER = "chunked"


def limit(gm: GraphModule, elements: int) -> None:
    """Limit the chunked tier to `elements` scores at once, in each call that this tier was chosen for."""
    for module in gm.modules():
        if isinstance(module, GraphModule) and (calls := list(_calls(module.graph))):
            for n in calls:
                others = str(_argument(n, "tier")).split(",")[1:]
                n.update_arg(_position(n, "tier"), ",".join([f"{TIER}:{elements}", *(t for t in others if t != TIER)]))
            module.recompile()


def workspaces(gm: GraphModule, elements: int, cpu: bool) -> dict[str, int]:
    """Return the bytes that each call of the chunked tier would take under this limit, by the node's name."""
    return {n.name: attention_workspace(n, cpu, chunk=elements) for n in _calls(gm.graph)}


def draws(gm: GraphModule) -> bool:
    """Return whether the chunked tier applies dropout: it reads the seed on the host, which CUDA graphs cannot
    capture."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, GraphModule))
    return any(isinstance(_argument(n, "seed"), Node) for graph in graphs for n in _calls(graph))


def _calls(graph: Graph) -> Iterator[Node]:
    """Yield each call whose first tier is the chunked one."""
    for n in graph.nodes:
        if n.op == "call_function" and op_name(n) in OPERATORS:
            if str(_argument(n, "tier")).partition(",")[0].partition(":")[0] == TIER:
                yield n


def _position(n: Node, name: str) -> int:
    """Return the position of an argument in the operator's schema."""
    return [a.name for a in n.target._schema.arguments].index(name)  # type: ignore[union-attr]


def _argument(n: Node, name: str) -> Any:
    return argument(n, _position(n, name), name)
