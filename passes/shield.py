"""Kept sites must come out right: an equivalent form that PyTorch's own attention patterns do not match."""

from __future__ import annotations

from torch.fx import GraphModule

from attnfx.passes.match import Finding


def shield(gm: GraphModule, finding: Finding, only_risky: bool = False) -> bool:
    """Shield the softmaxes of a kept site; True where the graph changed."""
    return False
