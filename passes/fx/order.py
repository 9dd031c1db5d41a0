"""Move computations to an earlier place in a graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch.fx import Node

from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import Facts, is_random, pure, written


def move_before(facts: Facts, nodes: Iterable[Node], before: Node, beside: Collection[Node] = ()) -> bool:
    """Move the nodes, and all that they are computed from, before another node; return whether that was possible.

    A random operator, one that touches memory which is written in place, and one in another autocast or no_grad region
    stay where they are, as do `beside` and everything computed from them. `facts` are those of the present graph.
    """

    def late(some: Iterable[Node]) -> list[Node]:
        return [n for n in some if not n < before]

    moved = sorted(reach(late(nodes), lambda n: late(n.all_input_nodes)))
    if any(n in beside or not _movable(facts, n, before) for n in moved):
        return False
    for n in moved:
        before.prepend(n)
    return True


def _movable(facts: Facts, n: Node, before: Node) -> bool:
    if n.op == "get_attr":
        return True
    fixed = is_random(n.target) or written(facts, [n]) or facts.regions[n] != facts.regions[before]
    return pure(n) and not fixed
