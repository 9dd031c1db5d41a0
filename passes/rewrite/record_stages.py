"""Record the stages of a graph as data (`attnfx.report.stages.Stage`): traced, lifted and rewritten.

Reads graphs, changes nothing. Needs `meta["val"]` to show shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self.gm, self.findings, self.text = gm, findings, text
        self.of: dict[Node, int] = {}
        for number, finding in enumerate(findings):
            for n in _members(finding):
                self.of.setdefault(n, number)
        self.of.update({f.final: number for number, f in enumerate(findings)})
        self.nodes = [(_node(n), self.of.get(n)) for n in gm.graph.nodes]
        self.edges = [(a.name, n.name) for n in gm.graph.nodes for a in n.all_input_nodes]
        self.reads = [_reads(f) for f in findings]
        self.finals = [f.final.name for f in findings]
        self.known = set(gm.graph.nodes)

    def rewritten(self, number: int) -> None:
        """Assign the new nodes to this site."""
        for n in self.gm.graph.nodes:
            if n not in self.known:
                self.of[n] = number
                self.known.add(n)

    def stages(self, names: Mapping[int, str], text: str = "") -> list[Stage]:
        """Return the three stages. `names` are the names of the filed sites, `text` is the rewritten code."""
        traced = Stage("traced", [n.of(names.get(s, "") if s is not None else "") for n, s in self.nodes], self.edges)
        traced.text = self.text
        places = [Place(name, self.finals[s], self.reads[s]) for s, name in names.items()]
        after = Stage("rewritten", text=text)
        for n in self.gm.graph.nodes:
            after.nodes.append(_node(n).of(names.get(self.of[n], "") if n in self.of else ""))
            after.edges.extend((a.name, n.name) for a in n.all_input_nodes)
        return [traced, collapse(traced, places), after]


def _reads(finding: Finding) -> tuple[str, ...] | None:
    """Return the nodes that a matched site reads: query, key, value and captures; None for a refused site."""
    m = finding.match
    return None if m is None else tuple(n.name for n in m.read)


def _members(finding: Finding) -> set[Node]:
    """Return an attention's nodes: from its output back to operands and captures, or to its normalizers if refused."""
    match, final = finding.match, finding.final
    if match is None:
        return between(set(finding.anchors), final) | {final}
    read = set(match.read)
    calls = reach([final], lambda n: [a for a in n.all_input_nodes if a.op == "call_function" and a not in read])
    return set(islice(calls, LARGEST))


def _node(n: Node) -> GraphNode:
    held = value(n)
    shape, dtype = None, ""
    if isinstance(held, torch.Tensor):
        shape = tuple(x if isinstance(x, int) else str(x) for x in held.shape)
        dtype = str(held.dtype).removeprefix("torch.")
    kind = KINDS.get(n.op, "operator")
    label = op_name(n).lstrip(".") if n.op == "call_function" else str(n.target)
    if written_operands(n):
        label += " (in place)"
    return GraphNode(n.name, label, kind, shape, dtype, where_in_source(n), _module(n))


def _module(n: Node) -> str:
    """Return the path of the module that a node came from, "" at the top."""
    stack = n.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path.removeprefix("L['self']").removeprefix(".")
