"""Convert a joint graph of AOTAutograd to records, and find the operations that must not run again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from attnfx.memory.partition import Joint
from attnfx.passes.fx.analysis import written_operands
from attnfx.passes.fx.copies import copied
from attnfx.passes.joint.mark_recompute import redraws
from attnfx.passes.joint.read_graph import read


def joint_records(joint: GraphModule, arguments: Mapping[str, Any], cpu: bool) -> tuple[Joint, frozenset[str]]:
    """Return the records of a joint graph, and the names of operations that would return another result if run again.
    `arguments` are a partitioner's arguments besides the graph. The graph is not changed."""
    made, _ = copied(joint)
    made.graph.eliminate_dead_code()
    made.graph = fx_graph_cse(made.graph)  # as the partitioner does first
    records = read(made, cpu)
    held = {r.name for op in records.ops for r in op.results}
    outputs = tree_leaves(made.graph.output_node().args[0])[: arguments["num_fwd_outputs"]]
    callers = sum(isinstance(o, Node) and o.name in held for o in outputs)
    arriving = {n.name for n in made.graph.nodes if n.op == "placeholder" and "tangents" in str(n.target)}
    changed = _changed(made.graph)
    fixed = {n.name for n in made.graph.nodes if redraws(n) or not changed.isdisjoint(n.all_input_nodes)}
    return Joint(records, callers, frozenset(arriving)), frozenset(fixed)


def _changed(graph: Graph) -> set[Node]:
    """Return the inputs that the step writes to: after the forward pass they hold other values."""
    output = graph.output_node()
    told = {getattr(d, "mutated_input", None) for d in tree_leaves(output.meta.get("desc", []))} - {None}
    inputs = {n for n in graph.nodes if n.op == "placeholder"}
    written = {x for n in graph.nodes for x in written_operands(n)}
    return (inputs & written) | {n for n in inputs if n.meta.get("desc") in told}
