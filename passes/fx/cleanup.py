"""Eliminate dead code, and verify a graph between passes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from attnfx.passes.fx.analysis import is_random, pure

UNREAD = "attnfx_unread"  # marks a random operator whose result nothing read when the graph was traced


def mark_unread_draws(gm: GraphModule) -> None:
    """Mark random operators whose result nothing reads: removing one would change all later random numbers."""
    dead: set[Node] = set()
    for n in reversed(gm.graph.nodes):
        if pure(n) and all(u in dead for u in n.users):
            dead.add(n)
            if is_random(n.target):
                n.meta[UNREAD] = True


def clean(gm: GraphModule, keep: Collection[Node] = ()) -> None:
    """Eliminate dead code in this graph alone. In-place operators, regions, the user's unread random operators and the
    nodes `keep` stay. The bodies of higher-order operators stay too, which FX's own elimination would enter."""
    for n in reversed(list(gm.graph.nodes)):
        if not n.users and pure(n) and UNREAD not in n.meta and n not in keep:
            gm.graph.erase_node(n)
    gm.recompile()


def check(gm: GraphModule) -> None:
    """Assert the invariants of a graph between passes. The AssertionError names the broken one."""
    gm.graph.lint()
    for n in gm.graph.nodes:
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.returns:
            assert "val" in n.meta, f"node {n.name} has no example value"
