"""Delay writes to inputs that nothing in the graph reads afterwards: move them to the end of the graph.

    scores = q @ k.mT + mask(length); length.add_(1); scores.softmax(-1) @ v
        becomes   (q @ k.mT + mask(length)).softmax(-1) @ v; length.add_(1)

A rewritten attention reads its operands where its result was computed, after all of its operators. A cache that counts
its length in place, or that shifts its keys behind the scores, would have changed by then. AOTAutograd writes inputs at
the end of the forward pass too. A write stays where it is if the graph reads the memory or the write's result later,
if what it writes changes before the end, or if it is in another autocast or no_grad region than the end. Needs
`meta["val"]`; changes the graph in place; promises the same results.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from attnfx.passes.fx.analysis import Facts, is_random, storage, written_operands
from attnfx.passes.lift.graph import Graph


def run(graph: Graph) -> int:
    """Move each write that can be delayed before the output, in their order; return how many were moved."""
    facts, nodes = graph.facts, list(graph.gm.graph.nodes)
    last = end = nodes[-1]
    after = {end}  # nodes that stay behind a delayed write
    moved = 0
    for n in reversed(nodes):
        if not _can_wait(facts, n, end, after):
            continue
        if n.next is not last:
            last.prepend(n)
            moved += 1
        after.add(n)
        last = n
    return moved


def _can_wait(facts: Facts, n: Node, end: Node, after: set[Node]) -> bool:
    """Return whether a node is a write to an input that may take place as the last one before the nodes `after`."""
    keys = {storage(x) for x in written_operands(n)}
    if not keys or None in keys or not keys <= facts.given or facts.regions[n] != facts.regions[end]:
        return False
    if is_random(n.target) or torch.Tag.inplace_view in getattr(n.target, "tags", ()):
        return False
    aliases = [x for key in keys for x in facts.families[key]]
    readers = [u for x in aliases for u in x.users if n < u]
    changes = [w for x in n.all_input_nodes for w in facts.mutations.get(storage(x), ()) if n < w]
    return after.issuperset((*n.users, *readers, *changes))
