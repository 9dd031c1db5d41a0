"""Lay out a graph for a drawing: layers from inputs to outputs, with few edge crossings.

The layout follows Sugiyama, Tagawa and Toda (1981): a node is below everything it reads and, within its layer, near the
mean position of its neighbors.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import networkx as nx

WIDTH, HEIGHT = 176, 38  # of a node's box, in the drawing's units
ACROSS, DOWN = 22, 26  # between boxes
SWEEPS = 4


@dataclass(frozen=True)
class Drawing:
    """The centers of the boxes, and the size of the drawing."""

    places: dict[Hashable, tuple[float, float]]
    width: float
    height: float


def draw(graph: nx.DiGraph) -> Drawing:
    """Lay out every node of an acyclic graph."""
    layers = _ordered(graph, _layers(graph))
    widest = max((len(layer) for layer in layers), default=0)
    width = max(widest * (WIDTH + ACROSS) + ACROSS, WIDTH + 2 * ACROSS)
    places: dict[Hashable, tuple[float, float]] = {}
    for depth, layer in enumerate(layers):
        left = (width - len(layer) * (WIDTH + ACROSS) + ACROSS) / 2
        for n, node in enumerate(layer):
            places[node] = (left + n * (WIDTH + ACROSS) + WIDTH / 2, DOWN + depth * (HEIGHT + DOWN) + HEIGHT / 2)
    return Drawing(places, width, DOWN + len(layers) * (HEIGHT + DOWN))


def _layers(graph: nx.DiGraph) -> list[list[Hashable]]:
    """Put each node in the layer just above its first user, and nodes without users at the bottom."""
    return [list(layer) for layer in nx.topological_generations(graph.reverse(copy=False))][::-1]


def _ordered(graph: nx.DiGraph, layers: list[list[Hashable]]) -> list[list[Hashable]]:
    """Sort each layer by its nodes' mean neighbor position, from the layer above and then below, SWEEPS times."""
    place = {node: n - len(layer) / 2 for layer in layers for n, node in enumerate(layer)}
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        neighbours = graph.predecessors if downwards else graph.successors

        def mean(node: Hashable, neighbours=neighbours) -> float:  # type: ignore[no-untyped-def]
            near = [place[other] for other in neighbours(node)]
            return sum(near) / len(near) if near else place[node]

        for layer in layers if downwards else reversed(layers):
            layer.sort(key=mean)
            place.update((node, n - len(layer) / 2) for n, node in enumerate(layer))
    return layers
