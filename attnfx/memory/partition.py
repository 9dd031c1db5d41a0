"""Split a joint graph's records into forward and backward graphs, given the saved values.

This follows PyTorch's min-cut partitioner (torch/_functorch/partitioners.py) on a joint graph whose nodes are all
marked. The forward graph consists of the operations that its outputs and the saved values need, in order. In the
backward graph, each recomputed operation is right before the first that needs it (reordering_to_mimic_autograd_engine).
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from attnfx.ir.reach import reach
from attnfx.memory.records import Graph, Op, Result
from attnfx.memory.step import Part


@dataclass(frozen=True)
class Joint:
    """A joint graph's records.

    outputs   number of the caller's outputs, which come first in `graph.outputs`; the rest are gradients
    arriving  names of the inputs that are gradients of the outputs
    """

    graph: Graph
    outputs: int
    arriving: frozenset[str]

    @cached_property
    def makers(self) -> dict[str, Op]:
        """The operation that computes each value."""
        return {r.name: op for op in self.graph.ops for r in op.results}

    @cached_property
    def order(self) -> dict[str, int]:
        return {op.name: n for n, op in enumerate(self.graph.ops)}

    @cached_property
    def bases(self) -> dict[str, str]:
        return self.graph.bases()

    @cached_property
    def results(self) -> dict[str, Result]:
        return {r.name: r for op in self.graph.ops for r in op.results}

    @cached_property
    def size(self) -> dict[str, int]:
        return {name: r.bytes for name, r in self.results.items()}

    @cached_property
    def later(self) -> frozenset[str]:
        """Names of the operations that depend on an arriving gradient."""
        found: set[str] = set()
        for op in self.graph.ops:
            if op.name in self.arriving or any(self.makers[r].name in found for r in op.reads):
                found.add(op.name)
        return frozenset(found)

    @cached_property
    def forward(self) -> frozenset[str]:
        """Names of the operations that compute the forward pass's outputs. All others run in the backward pass."""
        return frozenset(op.name for op in self.closure(self.roots, ()))

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The forward pass's outputs, and the values that it writes into inputs."""
        written = (r.name for op in self.graph.ops if op.changes and op.name not in self.later for r in op.results)
        return (*self.graph.outputs[: self.outputs], *written)

    @cached_property
    def needed(self) -> frozenset[str]:
        """The forward pass's values that the backward pass reads."""
        after = [op for op in self.closure(self.graph.outputs[self.outputs :], ()) if op.name not in self.forward]
        read = {r for op in after for r in op.reads} | set(self.graph.outputs[self.outputs :])
        return frozenset(r for r in read if self.makers[r].name in self.forward)

    def closure(self, wanted: Iterable[str], held: Container[str]) -> list[Op]:
        """Return, in order, the operations that compute the wanted values if the values in `held` are available."""

        def fresh(names: Iterable[str]) -> list[str]:
            return [x for x in names if x not in held]

        values = reach(fresh(wanted), lambda x: fresh(self.makers[x].reads))
        found = {op.name: op for op in map(self.makers.__getitem__, values)}
        return sorted(found.values(), key=lambda op: self.order[op.name])

    def split(self, saved: Collection[str]) -> Part:
        """Split into graphs that save these values, and the inputs that the backward pass reads."""
        backward = self._backward(frozenset(saved))
        kept = [op.name for op in backward.inputs if op.name not in self.arriving]
        given = [op for op in self.graph.inputs if op.name not in self.later]
        made = [op for op in self.closure([*self.roots, *kept], ()) if op.kind != "input"]
        outputs = (*self.graph.outputs[: self.outputs], *kept)
        return Part(Graph((*given, *made), outputs), backward, self.outputs)

    def _backward(self, saved: frozenset[str]) -> Graph:
        outputs = self.graph.outputs[self.outputs :]
        body = [op for op in self.closure(outputs, saved) if op.kind != "input"]
        read = {r for op in body for r in op.reads} | set(outputs)
        inputs = [
            Op(name, "input", (), (replace(self.results[name], bytes=self.size[name] or self.size[self.bases[name]]),))
            for name in sorted(read, key=lambda r: self.order[self.makers[r].name])
            if name in saved or self.makers[name].kind == "input"
        ]
        first = next((n for n, op in enumerate(body) if self.arriving.intersection(op.reads)), 0)
        placed: list[Op] = []
        held = set(saved)  # with the results of operations that have run
        for op in body[first:]:
            for x in self.closure([r.name for r in op.results], held):
                if x.kind != "input":
                    placed.append(x)
                    held.update(r.name for r in x.results)
        return Graph((*inputs, *placed), outputs)
