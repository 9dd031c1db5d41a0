"""Hold a graph module with what its passes ask of it."""

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
    """A graph module; its facts, its lifter and its carriers of sizes are made when first asked for.

    gm       the module: Dynamo's until the pass `trace` puts a graph of ATen in its place
    dynamo   the module as Dynamo made it
    traced   whether that has happened
    tables   products that are loaded as elements of smaller ones (the pass `table_lookups`)
    """

    def __init__(self, gm: GraphModule, traced: bool = False):
        self.gm = self.dynamo = gm
        self.traced = traced
        self.tables: dict[Node, LookedUp] = {}

    @cached_property
    def mode(self) -> FakeTensorMode:
        """The mode of the placeholders' example values, or one of its own where these are no fakes."""
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
        """Forget what was known of the graph as it was. Where no node was erased, its sizes can be read as before."""
        for name in ("facts", "lifter", *(["carriers"] if erased else [])):
            self.__dict__.pop(name, None)

    def copy(self) -> tuple[Graph, dict[Node, Node]]:
        """A copy, and the copy of each node."""
        gm, copies = copied(self.gm)
        graph = Graph(gm, self.traced)
        graph.tables = carried(self.tables, copies)
        return graph, copies

    def emitter(self, before: Node) -> Emitter:
        """An emitter of nodes that stand before a node."""
        return Emitter(self.gm, before, self.carriers)
