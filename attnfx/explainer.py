"""Implement `attnfx.explain`: report how a model would be rewritten, without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule

from attnfx.compiler import pipeline
from attnfx.compiler.private_code import private_code
from attnfx.options import Options
from attnfx.passes.fx.stand_ins import stand_ins, zeros
from attnfx.report.report import Report


def explain(model: Callable[..., Any], *inputs: NoReturn, **options: Any) -> Callable[..., Report]:
    """Trace `model` on example inputs and decide on its sites, running none of its kernels.

    `attnfx.explain(model, rewrite="always")(*args, **kwargs)` returns a `Report` on all graphs that Dynamo captures
    from the call. The model's Python code runs, so a `print` prints. Each graph returns zeros of the right shapes
    instead of its results. So control flow that depends on values may take another branch than in a real run. The
    model's state is not changed.

    `options` are the fields of `Options`. A refused site is in the report and not raised, even with `strict`. `tune`
    only uses cached times; `verify`, `memory_budget`, `dump_dir` and `inner` have no effect.

    Raises:
        OptionError: An option is unknown or has a bad value.
        TypeError: The inputs are passed with the model; they go to the function that `explain` returns.
        torch._dynamo.exc.BackendCompilerFailed: attnfx itself fails on a graph or, with `strict`, on a part of one.
    """
    if inputs:
        raise TypeError("call attnfx.explain(model, **options)(*inputs): the inputs go to the function that it returns")
    chosen = replace(Options.make(options).without_timing(), verify="off")

    def run(*args: Any, **kwargs: Any) -> Report:
        total = Report(graphs=0)

        def backend(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
            total.take(pipeline.run(gm, chosen, example_inputs, stages=True).report)
            return stand_ins(gm, zeros)

        with private_code(model) as traced:
            torch.compile(traced, backend=backend)(*args, **kwargs)
        if not total.graphs:
            total.notes.append("Dynamo captured no graph of this call, so there is nothing to rewrite")
        return total

    return run
