"""Wrap a graph module, and cache the analyses that the passes share."""

from __future__ import annotations

from functools import cached_property

from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from attnfx.passes.fx.analysis import Facts
from attnfx.passes.fx.copies import carried, copied
from attnfx.passes.lift.emitter import Carriers, Emitter, size_carriers
from attnfx.passes.lift.lifter import Lifter, LookedUp


class Graph:
    """A graph module with its facts, its lifter and its size carriers, each computed on first use.

    gm       the module: Dynamo's until the pass `trace` replaces it by an ATen graph
    dynamo   the module as Dynamo made it
    traced   whether `trace` has replaced it
    tables   products that are loaded as elements of smaller ones (the pass `table_lookups`)
    """

    def __init__(self, gm: GraphModule, traced: bool = False):
        self.gm = self.dynamo = gm
        self.traced = traced
        self.tables: dict[Node, LookedUp] = {}

    @cached_property
    def mode(self) -> FakeTensorMode:
        """Return the fake mode of the placeholders' example values, or a new one if they are not fakes."""
        held = [n.meta.get("example_value", n.meta.get("val")) for n in self.gm.graph.find_nodes(op="placeholder")]
        return detect_fake_mode(held) or FakeTensorMode(allow_non_fake_inputs=True)

    @cached_property
    def facts(self) -> Facts:
        return Facts(self.gm)

    @cached_property
    def lifter(self) -> Lifter:
        return Lifter(self.facts.written, self.facts.frozen, self.tables)

    @cached_property
    def carriers(self) -> Carriers:
        return size_carriers(self.gm)

    def changed(self, erased: bool = True) -> None:
        """Discard the cached analyses after a change. The size carriers stay valid if no node was erased."""
        for name in ("facts", "lifter", *(["carriers"] if erased else [])):
            self.__dict__.pop(name, None)

    def copy(self) -> tuple[Graph, dict[Node, Node]]:
        """Return a copy, and a map from each node to its copy."""
        gm, copies = copied(self.gm)
        graph = Graph(gm, self.traced)
        graph.tables = carried(self.tables, copies)
        return graph, copies

    def emitter(self, before: Node) -> Emitter:
        """Return an emitter that inserts nodes before a node."""
        return Emitter(self.gm, before, self.carriers)
