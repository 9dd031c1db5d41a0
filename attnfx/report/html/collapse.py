"""A graph in which every site is one node that holds its own nodes."""

from __future__ import annotations

from collections.abc import Hashable

import networkx as nx


def collapse(graph: nx.DiGraph, sites: list[str]) -> tuple[nx.DiGraph, dict[str, nx.DiGraph]]:
    """(the graph with one node for each site, named as the site is; site -> the part of the graph that it stands for).

    A node's attribute "site" says which it belongs to. What lies on a path between two nodes of a site goes into it,
    else the result had cycles; where that is another site's, the nodes before it are left outside.
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
    """The nodes and all that lies between them, without those that come before another site's."""
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
