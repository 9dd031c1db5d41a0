"""`attnfx.explain`: what would be done with a model, without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from attnfx.compiler import pipeline
from attnfx.options import Options
from attnfx.passes.fx.stand_ins import stand_ins, zeros
from attnfx.report.report import Report


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
            return stand_ins(gm, zeros)

        torch.compile(model, backend=backend)(*args, **kwargs)
        if not total.graphs:
            total.notes.append("Dynamo captured no graph of this call, so there is nothing to rewrite")
        return total

    return run
