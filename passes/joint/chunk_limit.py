"""Limit the chunks of the chunked tier in a rewritten graph, and find out whether this tier applies dropout."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from attnfx.passes.fx.nodes import arguments, op_name, set_argument
from attnfx.passes.joint.read_graph import attention_workspace

OPERATORS = ("attnfx::attention", "attnfx::attention_backward")
TIER = "chunked"


def limit(gm: GraphModule, elements: int) -> None:
    """Limit the chunked tier to `elements` scores at once, in each call that this tier was chosen for."""
    for module in gm.modules():
        if isinstance(module, GraphModule) and (calls := list(_calls(module.graph))):
            for n in calls:
                others = [t for t in _tiers(n)[1:] if t != TIER]
                set_argument(n, "tier", ",".join([f"{TIER}:{elements}", *others]))
            module.recompile()


def workspaces(gm: GraphModule, elements: int, cpu: bool) -> dict[str, int]:
    """Return the bytes that each call of the chunked tier would take under this limit, by the node's name."""
    return {n.name: attention_workspace(n, cpu, chunk=elements) for n in _calls(gm.graph)}


def draws(gm: GraphModule) -> bool:
    """Return whether the chunked tier applies dropout: it reads the seed on the host, which CUDA graphs cannot
    capture."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, GraphModule))
    return any(isinstance(arguments(n)["seed"], Node) for graph in graphs for n in _calls(graph))


def _calls(graph: Graph) -> Iterator[Node]:
    """Yield each call whose first tier is the chunked one."""
    for n in graph.nodes:
        if n.op == "call_function" and op_name(n) in OPERATORS and _tiers(n)[0].partition(":")[0] == TIER:
            yield n


def _tiers(n: Node) -> list[str]:
    return str(arguments(n)["tier"]).split(",")
