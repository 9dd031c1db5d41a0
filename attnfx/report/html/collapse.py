"""Collapse each site of a graph into one node that holds the site's own nodes."""

from __future__ import annotations

from collections.abc import Hashable

import networkx as nx


def collapse(graph: nx.DiGraph, sites: list[str]) -> tuple[nx.DiGraph, dict[str, nx.DiGraph]]:
    """Return the graph with one node for each site, named after the site, and each site's subgraph.

    A node's attribute "site" names its site. Nodes on a path between two nodes of a site join the site, because the
    result must be acyclic. If such a path crosses another site, the site's nodes before the crossing stay outside.
    """
    outer = graph.copy()
    parts: dict[str, nx.DiGraph] = {}
    for site in sites:
        own = {n for n, held in outer.nodes(data="site") if held == site}
        own = _convex(outer, own, site)
        if own:
            parts[site] = graph.subgraph(own).copy()
            _merge(outer, own, site)
    return outer, parts


def _convex(graph: nx.DiGraph, own: set[Hashable], site: str) -> set[Hashable]:
    """Return a site's nodes and all nodes between them, without the nodes ahead of another site in between."""
    while True:
        after = set().union(*(nx.descendants(graph, n) for n in own)) if own else set()
        before = set().union(*(nx.ancestors(graph, n) for n in own)) if own else set()
        between = (after & before) - own
        others = {n for n in between if graph.nodes[n].get("site") not in (None, "", site)}
        if not others:
            return own | between
        own = own - set().union(*(nx.ancestors(graph, n) for n in others))


def _merge(graph: nx.DiGraph, own: set[Hashable], site: str) -> None:
    into = {a for a, b in graph.in_edges(own) if a not in own}
    out = {b for a, b in graph.out_edges(own) if b not in own}
    graph.remove_nodes_from(own)
    graph.add_node(site, site=site)
    graph.add_edges_from((a, site) for a in into)
    graph.add_edges_from((site, b) for b in out)
