"""Partition a joint graph into forward and backward graphs, with chosen values recomputed instead of saved.

Marks on nodes tell PyTorch's min-cut partitioner which values to save and which to recompute. Without marks it decides
as usual. A random operator is never marked for recomputation: its result is saved, or the seed that the result was
computed from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import is_random
from attnfx.passes.fx.copies import copied
from attnfx.passes.fx.nodes import op_name


def redraws(n: Node) -> bool:
    """Return whether the node would return another result if it ran again."""
    return is_random(n.target) or op_name(n) == "prims::inductor_lookup_seed"


def forward_nodes(joint: GraphModule) -> dict[str, Node]:
    """Return the nodes that do not depend on a gradient of the outputs, by name, in graph order."""
    nodes = joint.graph.nodes
    starts = (n for n in nodes if n.op == "output" or (n.op == "placeholder" and "tangents" in str(n.target)))
    later = set(reach(starts, lambda n: n.users))
    return {n.name: n for n in nodes if n not in later}


def mark(joint: GraphModule, saved: Collection[str], again: Collection[str]) -> None:
    """Mark a joint graph's forward nodes: save the values `saved`, and recompute the values `again`."""
    for name, n in forward_nodes(joint).items():
        if n.op != "call_function":
            continue
        if name in saved or redraws(n):
            n.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif name in again:
            n.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def partition(joint: GraphModule, arguments: Mapping[str, Any]) -> tuple[GraphModule, GraphModule]:
    """Return the forward and backward graphs of a copy of `joint`. `arguments` are a partitioner's arguments."""
    given = dict(arguments)
    return min_cut_rematerialization_partition(copied(joint)[0], given.pop("joint_inputs"), **given)
