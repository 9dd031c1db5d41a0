"""Apply a memory budget while a graph is compiled, and record the memory of devices that ran out of it.

The budget covers the whole step: the graph's inputs (including parameters), all computed values, and the gradients. An
optimizer's state is not part of a graph: leave room for it, or pass the optimizer to `attnfx.plan`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule

from attnfx.compiler import pipeline
from attnfx.inductor import Partitioner
from attnfx.memory.byte_size import in_bytes, text
from attnfx.options import Options
from attnfx.passes.fx.graph_breaks import ended_by
from attnfx.passes.fx.nodes import number
from attnfx.passes.joint.chunk_limit import limit as limit_chunks
from attnfx.passes.joint.mark_recompute import forward_nodes, mark
from attnfx.planning.capture import Captured, capture_graph
from attnfx.planning.peak import Resident, fitting, total
from attnfx.planning.strategies import Marks, strategies
from attnfx.targets import Target
from attnfx.targets.available import detected, free_bytes

# Bytes that tensors could actually use when a device ran out of memory, by its index: "auto" plans with at most that.
_limits: dict[int, int] = {}
_watched: list[bool] = []


def fit(gm: GraphModule, example_inputs: Sequence[Any], options: Options, result: pipeline.Result
        ) -> tuple[pipeline.Result, dict[str, Any]]:  # fmt: skip
    """Fit a graph and its rewrite into the budget. Raises BudgetError if that is impossible.

    Return the rewrite, and the arguments of `compile_graph` for it: the partitioner for recomputation, and Inductor's
    config.
    """
    device = next((x.device for x in example_inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
    target = options.target if isinstance(options.target, Target) else detected(device)
    resident = _resident(example_inputs)
    budget = options.memory_budget
    assert budget is not None
    free = _free(target, device) + resident.total if budget == "auto" else 0
    limit = in_bytes(budget, target.memory, free, target.name)
    results = {id(result.report): result}
    first = _captured(gm, example_inputs, options, result)

    def rewritten() -> list[Captured]:
        always = replace(options, rewrite="always")
        other = pipeline.again(result, always, example_inputs)
        results[id(other.report)] = other
        return [_captured(gm, example_inputs, always, other)]

    ways = strategies([first], target, options.inner == "inductor", rewritten)
    way = fitting(ways, limit, resident, target, first.arguments is not None)
    chosen = results[id(way.captured[0].report)]
    marks = way.marks[0]
    if way.chunk and chosen.gm is not None:
        limit_chunks(chosen.gm, way.chunk)
    told = [f"memory_budget: the predicted peak is {text(total(way.events, resident, target))} of {text(limit)}"]
    if way.chunk:
        told.append(f"attention is computed in chunks of {way.chunk} scores")
    if marks.again:
        told.append(
            f"{len(marks.dropped)} values ({text(sum(marks.dropped.values()))}) are recomputed in the backward pass"
        )
    if ended_by(gm) is not None:
        told.append("this counts one graph, which ends at a graph break, and not the memory of the other graphs")
    chosen.report.notes.append("; ".join(told))
    patches = {} if way.waits else {"allow_buffer_reuse": False}
    return chosen, {"partitioner": _partitioner(marks) if marks.again else None, "patches": patches}


def _captured(gm: GraphModule, inputs: Sequence[Any], options: Options, result: pipeline.Result) -> Captured:
    return capture_graph(result.gm if result.gm is not None else gm, inputs, options, result.report)


def _resident(example_inputs: Sequence[Any]) -> Resident:
    """Return the bytes of the graph's inputs, including parameters; inputs that share memory count once."""
    held: dict[object, int] = {}
    given: dict[object, int] = {}
    for n, x in enumerate(example_inputs):
        if isinstance(x, torch.Tensor):
            parameter = isinstance(x, torch.nn.Parameter)
            fake = type(x) is not torch.Tensor and not parameter
            key = n if fake else x.untyped_storage().data_ptr() or n
            (held if parameter else given)[key] = number(x.untyped_storage().nbytes())
    rest = tuple(size for key, size in given.items() if key not in held)
    return Resident(sum(held.values()), held=tuple(held.values()), given=rest)


def _marked(marks: Marks, joint: GraphModule, joint_inputs: Sequence[object], **kwargs: Any):
    missing = (marks.saved | marks.again) - forward_nodes(joint).keys()
    if missing:
        raise RuntimeError(
            f"the compiled graph differs from the planned one: it lacks {', '.join(sorted(missing)[:3])}"
        )
    mark(joint, marks.saved, marks.again)
    return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)


def _partitioner(marks: Marks) -> Partitioner:
    """Return PyTorch's partitioner for a joint graph with marked nodes. A hash of the marks is its cache key."""
    names = "\n".join([*sorted(marks.saved), "", *sorted(marks.again)])
    return Partitioner(partial(_marked, marks), hashlib.sha256(names.encode()).hexdigest())


def _free(target: Target, device: torch.device) -> int:
    """Return the bytes that "auto" may plan with, and start to record if devices run out of memory."""
    if device.type != "cuda":
        return free_bytes(target)
    _watch()
    index = device.index if device.index is not None else torch.cuda.current_device()
    free = free_bytes(target, device)
    return min(free, max(_limits[index] - torch.cuda.memory_allocated(index), 0)) if index in _limits else free


def _watch() -> None:
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is not None and not _watched:
        _watched.append(True)
        attach(ran_out)


def ran_out(device: int, wanted: int, most: int, free: int) -> None:
    """Record that a device ran out of memory: the next compile under "auto" plans with the memory it really had.

    c10/cuda/CUDACachingAllocator.cpp calls this as an observer of the error.

    wanted  bytes of the failed allocation
    most    bytes that this process may use: the device's memory, or its allowed share
    free    unused bytes of the device
    """
    held, cached = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    cached -= held
    # the requested bytes did not fit beside the held ones; they may even be more than all remaining memory
    really = min(most, held + min(wanted - 1, free + cached))
    _limits[device] = min(_limits.get(device, really), really)
    warnings.warn(
        f"attnfx: cuda:{device} ran out of memory ({text(wanted)} were requested beside {text(held)} of this process's "
        f"tensors; {text(free)} were free and {text(cached)} cached). Free unused tensors, call torch._dynamo.reset(), "
        'and run the step again: memory_budget="auto" then plans with the memory that was really available',
        stacklevel=2,
    )
