"""Record the stages of a graph as data (`attnfx.report.stages.Stage`): traced, lifted and rewritten.

Reads graphs, changes nothing. Needs `meta["val"]` to show shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice

import torch
from torch.fx import GraphModule, Node

from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import between, written_operands
from attnfx.passes.fx.nodes import op_name, value, where_in_source
from attnfx.passes.match.results import Finding
from attnfx.report.stages import GraphNode, Place, Stage, collapse

KINDS = {"placeholder": "input", "get_attr": "constant", "output": "output"}
LARGEST = 1000  # nodes of one site


class Recorder:
    """A recorder of one graph, from the traced to the rewritten stage. Sites are numbers until they have names."""

    def __init__(self, gm: GraphModule, findings: Sequence[Finding], text: str = ""):
        """Needs the graph that the findings are in, before any rewriting. `text` is its readable code."""
        self.gm = gm
        self.of: dict[Node, str] = {}
        self.places = []
        for number, finding in enumerate(findings):
            reads = None if finding.match is None else tuple(n.name for n in finding.match.read)
            self.places.append(Place(str(number), finding.final.name, reads))
            for n in _members(finding):
                self.of.setdefault(n, str(number))
        self.of.update({f.final: str(number) for number, f in enumerate(findings)})
        self.traced = self._stage("traced", text)

    def rewritten(self, number: int, made: Iterable[Node]) -> None:
        """Assign the new nodes to this site."""
        self.of.update((n, str(number)) for n in made)

    def stages(self, filed: Collection[int], text: str = "") -> list[Stage]:
        """Return the three stages, with numbers as the sites. The lifted stage collapses the `filed` sites; `text` is
        the rewritten code."""
        places = [p for p in self.places if int(p.site) in filed]
        return [self.traced, collapse(self.traced, places), self._stage("rewritten", text)]

    def _stage(self, name: str, text: str) -> Stage:
        nodes = self.gm.graph.nodes
        edges = [(a.name, n.name) for n in nodes for a in n.all_input_nodes]
        return Stage(name, [_node(n, self.of.get(n, "")) for n in nodes], edges, text)


def _members(finding: Finding) -> set[Node]:
    """Return an attention's nodes: from its output back to operands and captures, or to its normalizers if refused."""
    match, final = finding.match, finding.final
    if match is None:
        return between(set(finding.anchors), final) | {final}
    read = set(match.read)
    calls = reach([final], lambda n: [a for a in n.all_input_nodes if a.op == "call_function" and a not in read])
    return set(islice(calls, LARGEST))


def _node(n: Node, site: str) -> GraphNode:
    held = value(n)
    shape, dtype = None, ""
    if isinstance(held, torch.Tensor):
        shape = tuple(x if isinstance(x, int) else str(x) for x in held.shape)
        dtype = str(held.dtype).removeprefix("torch.")
    kind = KINDS.get(n.op, "operator")
    label = op_name(n).lstrip(".") if n.op == "call_function" else str(n.target)
    if written_operands(n):
        label += " (in place)"
    return GraphNode(n.name, label, kind, shape, dtype, where_in_source(n), _module(n), site)


def _module(n: Node) -> str:
    """Return the path of the module that a node came from, "" at the top."""
    stack = n.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path.removeprefix("L['self']").removeprefix(".")
