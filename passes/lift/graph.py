"""Wrap a graph module, and cache the analyses that the passes share."""

from __future__ import annotations

from functools import cached_property

from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from attnfx.passes.fx.analysis import Facts
from attnfx.passes.fx.copies import copied
from attnfx.passes.lift.emitter import Carriers, Emitter, size_carriers
from attnfx.passes.lift.lifter import Lifter


class Graph:
    """A graph module with its facts, its lifter and its size carriers, each computed on first use.

    gm       the module: Dynamo's until the pass `trace` replaces it by an ATen graph
    dynamo   the module as Dynamo made it
    traced   whether `trace` has replaced it
    made     nodes that were emitted since the facts were last brought up to date
    """

    def __init__(self, gm: GraphModule, traced: bool = False):
        self.gm = self.dynamo = gm
        self.traced = traced
        self.made: list[Node] = []

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
        return Lifter(self.facts.written, self.facts.frozen)

    @cached_property
    def carriers(self) -> Carriers:
        return size_carriers(self.gm)

    def changed(self) -> None:
        """Discard the cached analyses after a change."""
        for name in ("facts", "lifter", "carriers"):
            self.__dict__.pop(name, None)
        self.made.clear()

    def grew(self) -> None:
        """Bring the cached analyses up to date after emitted nodes took the place of others, and none was erased. A
        pass over many places calls this after each, so that its time stays linear in the nodes."""
        if "facts" in self.__dict__:
            self.facts.grow(self.made)
        self.__dict__.pop("lifter", None)
        self.made.clear()

    def copy(self) -> tuple[Graph, dict[Node, Node]]:
        """Return a copy, and a map from each node to its copy."""
        gm, copies = copied(self.gm)
        return Graph(gm, self.traced), copies

    def emitter(self, before: Node) -> Emitter:
        """Return an emitter that inserts nodes before a node."""
        return Emitter(self.gm, before, self.carriers, self.made)
