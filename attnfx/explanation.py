"""`attnfx.explain`: what would be done with a model, without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from attnfx import pipeline
from attnfx.options import Options
from attnfx.report import Report
from attnfx.sites import number


def explain(model: Callable[..., Any], **options: Any) -> Callable[..., Report]:
    """Trace `model` on example inputs and decide, running none of its kernels.

    `attnfx.explain(model, rewrite="always")(*args, **kwargs)` gives a `Report` over all graphs that Dynamo makes of the
    call. Tensors that a graph would have computed are zeros of the right shape while the rest is traced, so control
    flow that depends on values may take another branch than a real run. The model's state is not changed.

    Raises:
        OptionError: an option is unknown or has a bad value.
    """
    chosen = Options.make(options)
    if chosen.tune:  # nothing is timed here
        chosen = replace(chosen, tune="known")

    def run(*args: Any, **kwargs: Any) -> Report:
        total = Report(graphs=0)

        def backend(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
            total.take(pipeline.run(gm, chosen, stages=True).report)
            return _zeros(gm)

        torch.compile(model, backend=backend)(*args, **kwargs)
        if not total.graphs:
            total.notes.append("Dynamo made no graph of this call: nothing of it can be compiled")
        return total

    return run


def _zeros(gm: GraphModule) -> Callable[..., Any]:
    """A function with the outputs of the graph in shape and dtype, all zero."""
    outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]

    def value(x: Any) -> Any:
        held = x.meta.get("example_value") if isinstance(x, torch.fx.Node) else x
        if isinstance(held, torch.Tensor):
            shape = [number(n) for n in held.shape]
            return torch.zeros(shape, dtype=held.dtype, device=held.device, requires_grad=held.requires_grad)
        return number(held) if isinstance(held, torch.SymInt) else held

    return lambda *_: tree_map(value, outputs, is_leaf=lambda x: isinstance(x, torch.fx.Node))
