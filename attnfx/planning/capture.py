"""The graphs that a model's step is compiled to, traced without running it: nothing is allocated at full size.

Parameters, buffers and inputs become fake tensors on the CPU, in a copy of the model that shares nothing with it but
its other attributes; a parameter on "meta" is as good as a real one.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import GraphModule
from torch.utils._pytree import tree_map, tree_map_only

from attnfx.compiler import pipeline
from attnfx.compiler.faults import described
from attnfx.inductor import Partitioner, compile_rest
from attnfx.options import Options
from attnfx.passes.fx.stand_ins import stand_ins
from attnfx.passes.joint.mark_recompute import copied
from attnfx.report.report import Report


@dataclass
class Captured:
    """One graph of Dynamo, rewritten, as AOTAutograd makes it and Inductor's joint passes leave it.

    joint       forward and backward in one graph, where there is a backward pass; else None
    forward     the graph of an inference; None where there is a backward pass
    arguments   what a partitioner of the joint graph is called with beside it
    report      what attnfx did with it, under which options
    problem     why the graph could not be brought that far; "" where it could
    """

    report: Report
    joint: GraphModule | None = None
    forward: GraphModule | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    options: Options | None = None
    problem: str = ""


class Done(Exception):
    """Nothing more is wanted of the compiler."""


def capture(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Options,
            train: bool, told: Sequence[Report] = ()) -> list[Captured]:  # fmt: skip
    """The graphs of one call of `model`, in the order in which they run. `told` are reports of the same graphs at other
    sizes, whose decisions are taken.

    Raises what the model raises on fake tensors, and what attnfx does.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model, args, kwargs = fakes((model, args, kwargs), mode)
    found: list[Captured] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        decided = told[len(found)].decided if len(found) < len(told) else None
        result = pipeline.run(gm, options, stages=True, told=decided)
        made = Captured(result.report, options=options)
        found.append(made)
        try:
            lower(result.gm if result.gm is not None else copy.deepcopy(gm), list(example_inputs), made, options.inner)
        except Done:
            pass
        except Exception as problem:
            made.problem = f"could not be compiled for planning: {described(problem)}"
        return stand_ins(gm, lambda x: x)

    # every capture is a new compilation of the same code: Dynamo's limit is for programs that recompile by mistake
    limits = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
    with mode, torch.set_grad_enabled(train), _quiet(), limits:
        try:
            torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException) as problem:
            if not found:
                raise
            found[-1].report.notes.append(
                f"the rest of the call is not planned, because its shapes depend on data: {problem}"
            )
    return found


def lower(gm: GraphModule, example_inputs: list[Any], into: Captured, inner: str = "inductor") -> None:
    """Bring a graph of pre-dispatch ATen to what the compiler of the rest would be given, and stop there: raises Done.

    The graph is changed.
    """

    def partition(joint: GraphModule, joint_inputs: Sequence[object], **kwargs: Any):
        into.joint, into.arguments = joint, {"joint_inputs": joint_inputs, **kwargs}
        raise Done

    def compiler(graph: GraphModule, _: Sequence[Any], **kwargs: Any):
        into.forward = graph
        raise Done

    compile_rest(gm, example_inputs, inner, {"force_disable_caches": True}, Partitioner(partition, "capture"), compiler)


def capture_graph(gm: GraphModule, example_inputs: Sequence[Any], options: Options, report: Report) -> Captured:
    """A graph that a backend was given, brought as far, and left as it was. Raises what stands in the way."""
    made = Captured(report, options=options)
    mode = detect_fake_mode(list(example_inputs)) or TracingContext.get().fake_mode
    inputs = list(example_inputs)
    for n, node in enumerate(x for x in gm.graph.nodes if x.op == "placeholder"):
        held = node.meta.get("example_value")
        if isinstance(held, FakeTensor):  # which knows the sizes that Dynamo took for fixed
            inputs[n] = held
    copy_ = GraphModule(gm, copied(gm.graph))
    copy_.meta.update(gm.meta)
    # what a compiler notes in the context of a compilation must not reach the one that follows
    with tracing(TracingContext(mode)), _quiet(), suppress(Done):
        lower(copy_, inputs, made, options.inner)
    return made


def fakes(tree: Any, mode: FakeTensorMode) -> Any:
    """A copy whose tensors are fake ones on the CPU, those of modules included."""
    memo: dict[int, Any] = {}

    def fake(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in memo:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
            if isinstance(x, nn.Parameter):
                made = nn.Parameter(made, requires_grad=x.requires_grad)
            else:
                made.requires_grad_(x.requires_grad and x.dtype.is_floating_point)
            memo[id(x)] = made
        return memo[id(x)]

    def module(x: Any) -> Any:
        if not isinstance(x, nn.Module):
            return x
        for tensor in (*x.parameters(), *x.buffers()):
            fake(tensor)
        return copy.deepcopy(x, memo)

    tree = tree_map(module, tree, is_leaf=lambda x: isinstance(x, nn.Module))
    return tree_map_only(torch.Tensor, lambda x: x if isinstance(x, FakeTensor) else fake(x), tree)


@contextmanager
def _quiet():
    """Dynamo logs the end that `Done` puts to a compilation as an error."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
