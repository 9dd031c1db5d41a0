"""Tell at a glance which graphs hold no attention: these are not traced."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule

from attnfx.passes.fx.nodes import PRODUCTS
from attnfx.passes.lift.products import GATES

# A graph without one of these words in its operators' names holds no normaliser: it is not traced. A gate, which many
# linear layers have, may be one where there are products as well, and so may what is divided by a sum.
SHARES = (("div", "normalize"), ("sum", "norm", "mean"))
HINTS = ("softmax", "softmin", "exp", "sort", "scaled_dot_product", "multi_head")


def worth_tracing(gm: GraphModule) -> bool:
    """Whether the names of a graph's operators leave room for an attention."""
    names = [
        str(n.target) if n.op == "call_method" else getattr(n.target, "__name__", str(n.target))
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for n in module.graph.nodes
        if n.op in ("call_function", "call_method")
    ]

    def some(words: Iterable[str]) -> bool:
        return any(word in name for name in names for word in words)

    return some(HINTS) or ((some(GATES) or all(map(some, SHARES))) and some(PRODUCTS))
