"""Capture the graphs to which a model's step is compiled, without running it or allocating tensors at full size.

Parameters, buffers and inputs become fake tensors on the CPU, in a copy of the model that shares only its other
attributes. Parameters on "meta" work as well as real ones.
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
from attnfx.compiler.private_code import private_code
from attnfx.inductor import Partitioner, compile_rest
from attnfx.options import Options
from attnfx.passes.fx.copies import copied
from attnfx.passes.fx.stand_ins import stand_ins
from attnfx.report.report import Report


@dataclass
class Captured:
    """One graph of Dynamo, rewritten, after AOTAutograd and Inductor's joint passes.

    report      the report of attnfx on the graph, under `options`
    graph       forward and backward in one joint graph, or the graph of an inference; unset if the capture failed
    arguments   further arguments of a partitioner of the joint graph; None if there is no backward pass
    problem     the reason if the capture failed; "" if it succeeded
    """

    report: Report
    options: Options
    graph: GraphModule = field(init=False)
    arguments: dict[str, Any] | None = None
    problem: str = ""


class Done(Exception):
    """The exception that stops the compiler once the graph is captured."""


def capture(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Options,
            train: bool, told: Sequence[Report] = ()) -> list[Captured]:  # fmt: skip
    """Capture the graphs of one call of `model`, in the order in which they run.

    `told` has reports of the same graphs at other sizes, whose decisions are reused. Raises any error of attnfx, or of
    the model on fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model, args, kwargs = fakes((model, args, kwargs), mode)
    found: list[Captured] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        decided = told[len(found)].decided if len(found) < len(told) else None
        result = pipeline.run(gm, options, stages=True, told=decided)
        made = Captured(result.report, options)
        found.append(made)
        try:
            lower(result.gm if result.gm is not None else copy.deepcopy(gm), list(example_inputs), made, options.inner)
        except Done:
            pass
        except Exception as problem:
            made.problem = f"could not be compiled for planning: {described(problem)}"
        return stand_ins(gm, lambda x: x)

    with mode, torch.set_grad_enabled(train), _quiet(), private_code(model) as traced:
        try:
            torch.compile(traced, backend=backend, dynamic=False)(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException) as problem:
            if not found:
                raise
            found[-1].report.notes.append(
                f"the rest of the call is not planned, because its shapes depend on data: {problem}"
            )
    return found


def lower(gm: GraphModule, example_inputs: list[Any], into: Captured, inner: str = "inductor") -> None:
    """Lower a pre-dispatch ATen graph to the input of the inner compiler, store it in `into`, and raise Done.

    Changes the graph.
    """

    def partition(joint: GraphModule, joint_inputs: Sequence[object], **kwargs: Any):
        into.graph, into.arguments = joint, {"joint_inputs": joint_inputs, **kwargs}
        raise Done

    def compiler(graph: GraphModule, _: Sequence[Any], **kwargs: Any):
        into.graph = graph
        raise Done

    compile_rest(gm, example_inputs, inner, {"force_disable_caches": True}, Partitioner(partition, "capture"), compiler)


def capture_graph(gm: GraphModule, example_inputs: Sequence[Any], options: Options, report: Report) -> Captured:
    """Capture a graph that a backend received, from a copy. Raises the errors of lowering."""
    made = Captured(report, options)
    mode = detect_fake_mode(list(example_inputs)) or TracingContext.get().fake_mode
    inputs = list(example_inputs)
    for n, node in enumerate(x for x in gm.graph.nodes if x.op == "placeholder"):
        held = node.meta.get("example_value")
        if isinstance(held, FakeTensor):  # has the sizes that Dynamo specialized
            inputs[n] = held
    # the lowering's entries in its tracing context must not reach the following compilation
    with tracing(TracingContext(mode)), _quiet(), suppress(Done):
        lower(copied(gm)[0], inputs, made, options.inner)
    return made


def fakes(tree: Any, mode: FakeTensorMode) -> Any:
    """Copy a tree with fake tensors on the CPU in place of its tensors, including the tensors of modules."""
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
    """Silence errors in logs: Dynamo logs a compilation that `Done` stops as an error."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
