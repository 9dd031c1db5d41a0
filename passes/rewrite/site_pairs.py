"""Cut a rewritten site out of its graph twice, before and after, as two graph modules that can be compared.

The prepared graph, run on real inputs, computes the values that the sites are compared on. The sites are rewritten in a
copy of it, in which the replaced nodes remain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from attnfx.passes.fx.analysis import Facts, cone, written_operands
from attnfx.passes.fx.dropout import DROPOUTS
from attnfx.passes.fx.nodes import op_name, value
from attnfx.report.records import Site


@dataclass(frozen=True)
class Pair:
    """One site twice: `original` and `rewritten` take the same inputs and return the same results.

    name      the path of its graph and the name of the site's last node
    site      the report's record of the site
    inputs    the nodes of the original graph that hold the inputs
    taught    for each input, whether it may require a gradient
    results   the attention's last node, then sums of its weights and other values read from them
    at        the node of the original graph at which all inputs are available
    """

    name: str
    site: Site
    original: GraphModule
    rewritten: GraphModule
    inputs: tuple[str, ...]
    taught: tuple[bool, ...]
    results: tuple[str, ...]
    at: str


@dataclass(frozen=True)
class Trial:
    """A graph before any rewriting, the sites to compare on its values, and the trials of the bodies of higher-order
    operators in it, by the attribute that holds each body."""

    gm: GraphModule
    pairs: list[Pair]
    bodies: dict[str, Trial] = field(default_factory=dict)

    def all_pairs(self) -> list[Pair]:
        return [*self.pairs, *(p for inner in self.bodies.values() for p in inner.all_pairs())]


def pair(
    facts: Facts, names: Mapping[Node, str], path: str, site: Site, final: Node, replaced: Sequence[tuple[Node, Node]]
) -> Pair:  # fmt: skip
    """Cut out a site that was rewritten in a copy of its graph. `replaced` are (old, new) nodes of the copy; the old
    nodes must still be in it, with the operands that they had. `facts` are the facts of the copy before any rewriting.
    `names` maps each node that was then in it to its name in the original graph."""
    ends = [old for old, _ in replaced]
    sources, new = cone([n for _, n in replaced], lambda n: n in names)
    stop = set(sources)
    # a random or in-place operator is not run again: its result is an input, as are the new nodes' operands
    inputs, old = cone(
        ends, lambda n: n in stop or (n not in ends and (_outside(n) or n in facts.written)) or _placed(n)
    )
    inputs = list(dict.fromkeys([*sources, *inputs]))
    at = max((*inputs, min(ends, key=facts.position.__getitem__)), key=facts.position.__getitem__)
    learns = facts.regions[final][0] is not False
    return Pair(
        f"{path}{names[final]}",
        site,
        _module(inputs, old, ends),
        _module(inputs, new, [n for _, n in replaced]),
        tuple(names[n] for n in inputs),
        tuple(learns and n in facts.differentiable and _floating(n) for n in inputs),
        tuple(n.name for n in ends),
        names[at],
    )


def _placed(n: Node) -> bool:
    return n.op in ("placeholder", "get_attr")


def _outside(n: Node) -> bool:
    """Return whether a node is not computed again: it is random, writes in place, or holds a graph of its own."""
    if n.op != "call_function":
        return n.op != "call_method"
    tags = getattr(n.target, "tags", ())
    draws = torch.Tag.nondeterministic_seeded in tags and op_name(n) not in DROPOUTS
    return draws or isinstance(n.target, HigherOrderOperator) or bool(written_operands(n))


def _floating(n: Node) -> bool:
    held = value(n)
    return isinstance(held, torch.Tensor) and held.dtype.is_floating_point


def _module(inputs: list[Node], nodes: list[Node], ends: list[Node]) -> GraphModule:
    graph, copies = Graph(), {}
    for n in inputs:
        copies[n] = graph.placeholder(n.name)
        copies[n].meta = {"val": value(n)}
    for n in nodes:
        copies[n] = graph.node_copy(n, lambda a: copies[a])
    graph.output(tuple(copies[n] for n in ends))
    return GraphModule(torch.nn.Module(), graph)


def weight(gm: GraphModule, number: Any) -> tuple[int, int]:
    """Return (elements of all computed values, elements of the largest). `number` resolves symbolic sizes."""
    sizes = [0]
    for n in gm.graph.nodes:
        held = value(n)
        if n.op == "call_function" and isinstance(held, torch.Tensor):
            elements = 1
            for extent in held.shape:
                elements *= number(extent)
            sizes.append(elements)
    return sum(sizes), max(sizes)
