"""Replace a graph by a function with stand-in results, so that the rest of a call can be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from attnfx.passes.fx.nodes import number


def stand_ins(gm: GraphModule, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """Return a function with the output structure of a Dynamo graph. It returns `tensor(example)` for each tensor and
    an int for each symbolic size."""
    outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]

    def value(x: Any) -> Any:
        held = x.meta.get("example_value") if isinstance(x, Node) else x
        if isinstance(held, torch.Tensor):
            return tensor(held)
        return number(held) if isinstance(held, torch.SymInt) else held

    return lambda *_: tree_map(value, outputs, is_leaf=lambda x: isinstance(x, Node))


def zeros(x: torch.Tensor) -> torch.Tensor:
    """Return zeros of the same shape, dtype and device."""
    shape = [number(n) for n in x.shape]
    return torch.zeros(shape, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)
