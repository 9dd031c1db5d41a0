"""Rule out graphs without attention by the names of their operators, before they are traced."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule

from attnfx.passes.fx.nodes import PRODUCTS, calls
from attnfx.passes.lift.products import GATES

# A graph whose operator names contain none of these words lacks a normalizer, so it is not traced. Many graphs have
# gates or divisions by a sum; these can be normalizers only if the graph has products as well.
SHARES = (("div", "normalize"), ("sum", "norm", "mean"))
HINTS = ("softmax", "softmin", "exp", "sort", "scaled_dot_product", "multi_head")


def worth_tracing(gm: GraphModule) -> bool:
    """Return whether a graph may hold an attention, judged by the names of its operators."""
    names = [name for _, name in calls(gm)]

    def some(words: Iterable[str]) -> bool:
        return any(word in name for name in names for word in words)

    return some(HINTS) or ((some(GATES) or all(map(some, SHARES))) and some(PRODUCTS))
