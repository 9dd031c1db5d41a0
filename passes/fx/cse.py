"""Eliminate common subexpressions: calls of one function with the same operands become one call.

Needs `meta["val"]`; changes the graph in place; promises the same results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from attnfx.passes.fx.analysis import storage, written_operands


def share(gm: GraphModule, wanted: Callable[[Node], bool]) -> None:
    """Keep the first of the wanted calls of one function that read the same elements, and remove the others. They must
    be functions of their operands alone. A write to the operands' memory separates the calls."""
    found: dict[str, Node] = {}
    writes: dict[int | None, int] = {}

    def named(x: Node) -> str:
        held = x.meta["val"]
        memory = storage(x)
        if memory is not None:  # equal views of the same memory are one operand
            place = held.dtype, tuple(held.shape), held.stride(), held.storage_offset()
            return f"{memory} {place} {writes.get(memory, 0)}"
        if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
            return str(held)  # the value identifies a size, not the node that computes it
        return x.name

    for n in list(gm.graph.nodes):
        for x in written_operands(n):
            writes[storage(x)] = writes.get(storage(x), 0) + 1
        if n.op == "call_function" and wanted(n):
            key = str((n.target, torch.fx.map_arg((n.args, n.kwargs), named)))  # type: ignore[arg-type,return-value]
            first = found.setdefault(key, n)
            if first is not n:
                n.replace_all_uses_with(first, propagate_meta=False)
                gm.graph.erase_node(n)
