"""A rewritten site cut out of its graph twice, as it was and as it is now: two graph modules that can be compared.

A `Trial` copies the traced graph before anything is rewritten; the copy, run on real inputs, gives the numbers that the
sites are compared on. Each rewrite is told to it while the nodes that it replaces still stand in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from attnfx.passes.fx.analysis import Facts, written_operands
from attnfx.passes.fx.dropout import DROPOUTS
from attnfx.passes.fx.nodes import op_name, value
from attnfx.report.records import Site


@dataclass(frozen=True)
class Pair:
    """One site twice: `original` and `rewritten` take the same inputs and give the same results.

    name      what `Trial.keep` calls it
    inputs    the nodes of the trial's graph that hold the inputs
    taught    for each of them whether it may take a gradient
    results   what is given: the node that the attention ends with, then sums of its weights or what else is read
    at        the node of the trial's graph from which on all inputs are there
    """

    site: Site
    name: str
    original: GraphModule
    rewritten: GraphModule
    inputs: tuple[str, ...]
    taught: tuple[bool, ...]
    results: tuple[str, ...]
    at: str


@dataclass
class Trial:
    """What is asked of one graph, and what its rewriting gave.

    keep     names of sites that are to stay as they were, and what the report says of each
    path     where the graph stands: "" or, for a body of a higher-order operator, its name and a slash
    gm       the graph before rewriting
    pairs    the rewritten sites
    bodies   the trials of the bodies inside, by the attribute that holds the body
    """

    keep: Mapping[str, str] = field(default_factory=dict)
    path: str = ""
    gm: GraphModule | None = None
    pairs: list[Pair] = field(default_factory=list)
    bodies: dict[str, Trial] = field(default_factory=dict)

    def begin(self, traced: GraphModule) -> None:
        """Take the graph as it stands, before any rewriting."""
        self.pairs, self.bodies = [], {}
        graph, copies = Graph(), {}
        out = graph.graph_copy(traced.graph, copies)
        graph.output(out)
        self.gm = GraphModule(traced, graph)
        self._facts = Facts(traced)
        self._names = {old: new.name for old, new in copies.items()}

    def body(self, name: str) -> Trial:
        self.bodies[name] = Trial(self.keep, f"{self.path}{name}/")
        return self.bodies[name]

    def name(self, final: Node) -> str:
        """What `keep` calls the site that ends at a node; the same in every trace of one graph."""
        return f"{self.path}{final.name}"

    def all_pairs(self) -> list[Pair]:
        return [*self.pairs, *(p for inner in self.bodies.values() for p in inner.all_pairs())]

    def add(self, site: Site, final: Node, replaced: Sequence[tuple[Node, Node]]) -> None:
        """A rewritten site that ends at `final`: `replaced` are (old, new). The old ones must still stand, with the
        operands that they had."""
        known, facts = self._names, self._facts
        ends = [old for old, _ in replaced]
        sources, new = _cone([n for _, n in replaced], lambda n: n in known)
        stop = set(sources)
        # an operator that draws or writes is not run again: what it gave is an input, like all that the new nodes read
        inputs, old = _cone(
            ends, lambda n: n in stop or (n not in ends and (_outside(n) or n in facts.written)) or _placed(n)
        )
        inputs = list(dict.fromkeys([*sources, *inputs]))
        at = max((*inputs, min(ends, key=facts.position.__getitem__)), key=facts.position.__getitem__)
        learns = facts.regions[final][0] is not False
        pair = Pair(
            site,
            self.name(final),
            _module(inputs, old, ends),
            _module(inputs, new, [n for _, n in replaced]),
            tuple(known[n] for n in inputs),
            tuple(learns and n in facts.differentiable and _floating(n) for n in inputs),
            tuple(n.name for n in ends),
            known[at],
        )
        self.pairs.append(pair)


def _cone(ends: Sequence[Node], is_input: Any) -> tuple[list[Node], list[Node]]:
    """What the ends are computed from: (inputs, nodes between), each in the order of the graph."""
    seen, stack = set(ends), list(ends)
    inputs: set[Node] = set()
    while stack:
        n = stack.pop()
        if is_input(n):
            inputs.add(n)
            continue
        for a in n.all_input_nodes:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    graph = ends[0].graph
    return [n for n in graph.nodes if n in inputs], [n for n in graph.nodes if n in seen and n not in inputs]


def _placed(n: Node) -> bool:
    return n.op in ("placeholder", "get_attr")


def _outside(n: Node) -> bool:
    """Whether a node is not computed again: it draws, writes in place, or holds a graph of its own."""
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
    """Elements of all the values that a cut graph makes, and of its largest one. `number` gives a symbolic size."""
    sizes = [0]
    for n in gm.graph.nodes:
        held = value(n)
        if n.op == "call_function" and isinstance(held, torch.Tensor):
            elements = 1
            for extent in held.shape:
                elements *= number(extent)
            sizes.append(elements)
    return sum(sizes), max(sizes)


__all__ = ["Pair", "Trial", "weight"]
