"""A joint graph to its forward and backward graphs, with some of the saved values computed again instead.

What is saved and what is recomputed is said to PyTorch's min-cut partitioner by marks on nodes, which it honours;
where nothing is marked it decides as it always does. A random operator is never marked to be computed again: what it
gave is saved, or the seed that it was made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

from attnfx.passes.fx.nodes import op_name

SEEDS = frozenset(["prims::inductor_seed", "prims::inductor_seeds", "prims::inductor_lookup_seed"])


def is_random(n: Node) -> bool:
    """Whether it would give something else when it is run again."""
    if op_name(n) in SEEDS:
        return True
    return isinstance(n.target, OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags


def forward_nodes(joint: GraphModule) -> dict[str, Node]:
    """The nodes that do not depend on a gradient of the outputs, by name, in order."""
    later: set[Node] = set()
    out = {}
    for n in joint.graph.nodes:
        tangent = n.op == "placeholder" and "tangents" in str(n.target)
        if n.op == "output" or tangent or any(x in later for x in n.all_input_nodes):
            later.add(n)
        else:
            out[n.name] = n
    return out


def mark(joint: GraphModule, saved: Iterable[str], again: Iterable[str]) -> None:
    """Mark a joint graph's forward nodes: these values are saved, these are computed again."""
    nodes, kept, redone = forward_nodes(joint), set(saved), set(again)
    for name, n in nodes.items():
        if n.op != "call_function":
            continue
        if name in kept or is_random(n):
            n.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif name in redone:
            n.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def copied(graph: Graph) -> Graph:
    """A copy with the names and the meta of the original."""
    made, old = Graph(), graph.output_node()
    values: dict[Node, Node] = {}
    made.graph_copy(graph, values)
    new = made.output(map_arg(old.args[0], lambda n: values[n]))
    new.meta.update(old.meta)
    for before, after in values.items():
        after.meta = dict(before.meta)
        if hasattr(before, "_dynamo_source"):  # by which a compiler tells parameters from other inputs
            after._dynamo_source = before._dynamo_source  # type: ignore[attr-defined]
    return made


def partition(joint: GraphModule, arguments: Mapping[str, Any], saved: Iterable[str] = (),
              again: Iterable[str] = ()) -> tuple[GraphModule, GraphModule]:  # fmt: skip
    """The forward and backward graphs of a copy of `joint`; `arguments` are those a partitioner is called with."""
    made = GraphModule(joint, copied(joint.graph))
    made.meta.update(joint.meta)
    if again:
        mark(made, saved, again)
    given = dict(arguments)
    return min_cut_rematerialization_partition(made, given.pop("joint_inputs"), **given)
