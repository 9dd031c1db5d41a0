"""Represent a stage of a graph as data, for networkx, DOT, GraphML and JSON. Independent of torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class GraphNode:
    """One node of a stage.

    id      unique in the stage: the number of the graph, the names of submodules, and the node's name
    label   the operator or role: "matmul", "input", "attention_3"
    kind    "input", "constant", "operator", "site" or "output"
    shape   a tensor's shape, with symbolic sizes as text: (2, 12, "s0", 64)
    dtype   a tensor's dtype: "float32"
    where   the user's line: "model.py:88"
    module  the path of the module that it came from: "layers.3.attention"
    site    the name of the site that it belongs to
    """

    id: str
    label: str
    kind: str = "operator"
    shape: tuple[int | str, ...] | None = None
    dtype: str = ""
    where: str = ""
    module: str = ""
    site: str = ""


@dataclass(frozen=True)
class Place:
    """A site's place in a graph: the ids of its last node, and of its operands and captures (None if unknown)."""

    site: str
    final: str
    reads: tuple[str, ...] | None = None


@dataclass
class Stage:
    """The graphs of one stage: "traced" (ATen before autograd), "lifted" (one node for each site) or "rewritten".

    Edges go from an operand to its user. `text` is the readable code, if it was kept.
    """

    name: str
    nodes: list[GraphNode] = field(default_factory=list)
    edges: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""

    def add(self, other: Stage, prefix: str = "", sites: dict[str, str] | None = None) -> None:
        """Add the nodes of another graph, with `prefix` before their ids and their sites renamed."""
        sites = sites or {}
        for n in other.nodes:
            site = sites.get(n.site, n.site)
            label = site if n.kind == "site" else n.label
            self.nodes.append(replace(n, id=prefix + n.id, site=site, label=label))
        self.edges.extend((prefix + a, prefix + b) for a, b in other.edges)
        self.text = "\n\n".join(t for t in (self.text, other.text) if t)

    def listing(self) -> str:
        """Return a line for each node: its shape, operator, operands, site and the user's line."""
        operands: dict[str, list[str]] = defaultdict(list)
        for a, b in self.edges:
            operands[b].append(a)
        lines = []
        for n in self.nodes:
            shape = "" if n.shape is None else f": {n.dtype}[{', '.join(map(str, n.shape))}]"
            notes = "  # " + ", ".join(t for t in (n.site, n.where) if t) if n.site or n.where else ""
            made = f"{n.label}({', '.join(operands[n.id])})" if n.kind not in ("input", "constant") else n.kind
            lines.append(f"{n.id}{shape} = {made}{notes}")
        return "\n".join(lines) + "\n"

    def to_networkx(self) -> networkx.DiGraph:
        """Return a directed graph with the fields of `GraphNode` as node attributes (shapes as text, "2 x 12")."""
        import networkx

        graph = networkx.DiGraph(name=self.name)
        for n in self.nodes:
            shape = "" if n.shape is None else " x ".join(map(str, n.shape))
            attributes = {f.name: getattr(n, f.name) for f in fields(n) if f.name != "id"}
            graph.add_node(n.id, **{**attributes, "shape": shape})
        graph.add_edges_from(self.edges)
        return graph

    def to_data(self) -> dict[str, Any]:
        """Return networkx's node-link data, without the nodes' empty fields. The keys are "directed", "multigraph",
        "graph", "nodes" and "edges"."""
        nodes = [
            {f.name: value for f in fields(n) if (value := getattr(n, f.name)) not in ("", None)} for n in self.nodes
        ]
        edges = [{"source": a, "target": b} for a, b in self.edges]
        return {"directed": True, "multigraph": False, "graph": {"name": self.name}, "nodes": nodes, "edges": edges}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Stage:
        """The inverse of `to_data`."""
        nodes = [GraphNode(**{**n, "shape": tuple(n["shape"]) if "shape" in n else None}) for n in data["nodes"]]
        return cls(data["graph"]["name"], nodes, [(e["source"], e["target"]) for e in data["edges"]])

    def to_json(self) -> str:
        return json.dumps(self.to_data())

    def to_graphml(self, path: str | Path) -> None:
        """Write GraphML, which yEd, Gephi and networkx read."""
        import networkx

        networkx.write_graphml(self.to_networkx(), Path(path))

    def to_dot(self, path: str | Path | None = None) -> str:
        """Return the graph in Graphviz's DOT language; also write it to `path` if given."""
        lines = [f"digraph {_quoted(self.name)} {{", "  node [shape=box, fontname=monospace];"]
        for n in self.nodes:
            shape = "" if n.shape is None else f"{n.dtype} {' x '.join(map(str, n.shape))}"
            label = "\n".join(t for t in (n.label, shape, n.where) if t)
            style = ", style=filled, fillcolor=lightgoldenrod" if n.site else ""
            lines.append(f"  {_quoted(n.id)} [label={_quoted(label)}{style}];")
        lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in self.edges]
        dot = "\n".join([*lines, "}"]) + "\n"
        if path is not None:
            Path(path).write_text(dot)
        return dot


def collapse(traced: Stage, places: Iterable[Place]) -> Stage:
    """Build the "lifted" stage: replace the nodes that serve only one site by a single node.

    That node keeps the id of the site's last node and reads the site's operands and captures. Operators that lose their
    last user are removed.
    """
    at = {p.final: p for p in places}
    readers: dict[str, list[str]] = defaultdict(list)
    for a, b in traced.edges:
        readers[a].append(b)
    home: dict[str, str] = {}  # node -> the last node of the only site that it serves
    for n in reversed(traced.nodes):
        if n.id in at:
            home[n.id] = n.id
        elif n.site and readers[n.id]:
            found = {home.get(r) for r in readers[n.id]}
            final = found.pop()
            if not found and final is not None and at[final].site == n.site:
                home[n.id] = final
    edges: dict[tuple[str, str], None] = {}
    for a, b in traced.edges:
        a, b = home.get(a, a), home.get(b, b)
        if a != b and (b not in at or at[b].reads is None):
            edges[(a, b)] = None
    for p in at.values():
        edges.update({(home.get(a, a), p.final): None for a in p.reads or () if home.get(a, a) != p.final})
    nodes = [n for n in traced.nodes if home.get(n.id, n.id) == n.id]
    users: dict[str, set[str]] = defaultdict(set)
    for a, b in edges:
        users[a].add(b)
    dead: set[str] = set()
    for n in reversed(nodes):
        if n.kind == "operator" and readers[n.id] and users[n.id] <= dead:
            dead.add(n.id)
    lifted = Stage("lifted", edges=[(a, b) for a, b in edges if b not in dead])
    for n in nodes:
        site = at[n.id].site if n.id in at else ""
        if n.id not in dead:
            lifted.nodes.append(replace(n, site=site, label=site or n.label, kind="site" if site else n.kind))
    return lifted


def _quoted(text: str) -> str:
    """Quote a string for Graphviz, with line breaks as its escape."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
