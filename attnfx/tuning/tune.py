"""Tuning: the likeliest candidates of a site are timed on its real shapes, once, and the answer is kept.

A site is cut out of its graph; the cut graph as it was, and rewritten for each candidate, is compiled and timed by
itself. Its tensors are made up in the shapes, strides and dtypes of the example inputs: normal numbers where query, key
and value are read, zeros for other floats (a bias that hides nothing), ones for bools and integers (everything is
seen). What depends on values, a padding mask's share for instance, is therefore not in the times.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._guards import tracing
from torch.fx import GraphModule

from attnfx import cache
from attnfx.cost import Question
from attnfx.fingerprint import fingerprint
from attnfx.inductor import compile_graph
from attnfx.kernels.operators import configuration
from attnfx.options import Options
from attnfx.passes.joint.chunk_limit import draws
from attnfx.report.records import Candidate, Decision
from attnfx.tuning import timing

MOST = 8  # candidates that are timed, the original among them
ANSWERS = cache.JsonCache("tuning")

Build = Callable[[Candidate], "GraphModule | None"]
Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], Mapping[str, float]]
log = logging.getLogger(__name__)


def tune(
    ask: Question, decision: Decision, options: Options, device: torch.device, build: Build, timer: Timer | None = None
) -> Decision:
    """The decision by measured times, which come from the cache where they are known.

    `decision` is the one by prediction. `build(candidate)` gives the cut graph that a candidate makes of the site, None
    where it cannot; it is called only for what must be timed. Where nothing can be timed the prediction stands, and the
    reason says so; with tune="known" it stands wherever the cache has no answer.
    """
    first = Candidate(**{name: getattr(decision, name) for name in Candidate.__dataclass_fields__})
    every = sorted((first, *decision.alternatives), key=lambda c: c.predicted_ms)
    chosen = [c for c in every if c.tier == "kept" or c.tier in options.tiers]
    kept = [c for c in chosen if c.tier == "kept"]
    chosen = [*kept, *(c for c in chosen if c.tier != "kept")][:MOST]
    if len(chosen) < 2:
        return decision
    names = {label(c): c for c in chosen}
    key = key_of(ask, names, device)
    times = None if options.tune == "again" else _known(key, names)
    if times is None:
        if options.tune == "known":
            return decision
        times = measure(names, options, device, build, timer)
        if len(times) > 1:
            ANSWERS.put(key, times)
    return fastest(decision, every, times, options)


def label(c: Candidate) -> str:
    """A candidate's name in the cache: its tier, and what of its configuration is not the tier's own choice."""
    return str(configuration.of(c))


def key_of(ask: Question, names: Mapping[str, Candidate], device: torch.device) -> str:
    """What a measurement holds for: the spec, its sizes (T and S rounded up to powers of two), dtype, direction,
    device and versions, and what was compared."""
    dims = {k: 1 << (v - 1).bit_length() if k in ("T", "S") and v > 0 else v for k, v in ask.dims.items()}
    spec = hashlib.sha256(ask.spec.to_json().encode()).hexdigest()[:20]
    return cache.key_of(
        spec=spec, dims=dims, dtype=ask.dtype, training=ask.training, native=ask.native, sums=ask.sums,
        candidates=sorted(names), **fingerprint(device),
    )  # fmt: skip


def _known(key: str, names: Mapping[str, Candidate]) -> dict[str, float] | None:
    held = ANSWERS.get(key)
    if not isinstance(held, dict) or not all(isinstance(v, float) and k in names for k, v in held.items()):
        return None
    return held if len(held) > 1 else None


def fastest(decision: Decision, every: Sequence[Candidate], times: Mapping[str, float], options: Options) -> Decision:
    """The fastest of what was timed; with rewrite="always", of the rewrites."""
    timed = [replace(c, measured_ms=times.get(label(c))) for c in every]
    rivals = [c for c in timed if c.measured_ms is not None]
    if options.rewrite == "always":
        rivals = [c for c in rivals if c.tier != "kept"]
    if len([c for c in timed if c.measured_ms is not None]) < 2 or not rivals:
        said = f"{decision.reason}; " if decision.reason else ""
        return replace(decision, reason=f"{said}not measured: fewer than two candidates could be timed")
    best = min(rivals, key=lambda c: c.measured_ms or 0.0)
    said = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(times.items(), key=lambda x: x[1]))
    others = tuple(c for c in timed if c is not best)
    return Decision(**vars(best), reason=f"measured: {said}", alternatives=others)


def measure(
    names: Mapping[str, Candidate], options: Options, device: torch.device, build: Build, timer: Timer | None = None
) -> dict[str, float]:
    """ms of a call of each candidate that can be built and run, by name; forward and backward where inputs require a
    gradient. The state of PyTorch's generators stays as it was."""
    runs: dict[str, Callable[[], object]] = {}
    devices = [device] if device.type == "cuda" and torch.cuda.is_available() else []
    # a backend is called while Dynamo traces: what is compiled here is no part of that trace
    with tracing(None), torch.random.fork_rng(devices=devices):
        inputs: list[torch.Tensor] | None = None
        for name in timing.with_progress(list(names), "timing candidates"):
            try:
                graph = build(names[name])
                if graph is None:
                    continue
                inputs = made_up(graph) if inputs is None else inputs
                runs[name] = _runnable(graph, inputs, options)
            except Exception as problem:
                log.debug("candidate %s cannot be timed: %s", name, problem)
        found = (timer or timing.shortest)(runs, device) if runs else {}
    return {name: float(ms) for name, ms in found.items()}


def made_up(graph: GraphModule) -> list[torch.Tensor]:
    """Tensors for the placeholders of a cut graph, as the module's docstring says."""
    out = []
    for n in graph.graph.nodes:
        if n.op != "placeholder":
            continue
        like = n.meta["example_value"]
        sizes = [1 if stride == 0 else size for size, stride in zip(like.shape, like.stride())]  # what was expanded
        real = torch.empty_strided(sizes, like.stride(), dtype=like.dtype, device=like.device)
        if n.meta.get("operand"):
            real.normal_()
        else:
            real.fill_(0 if like.dtype.is_floating_point else 1)
        out.append(real.expand(like.shape).requires_grad_(like.requires_grad))
    return out


def _runnable(graph: GraphModule, inputs: list[torch.Tensor], options: Options) -> Callable[[], object]:
    import torch._functorch.config as aot

    training = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    # A backward pass that is compiled when it first runs would do so in another thread on a GPU, and wait there for
    # the lock that this compilation holds.
    with torch.set_grad_enabled(training), aot.patch(force_non_lazy_backward_lowering=True):
        compiled = compile_graph(graph, inputs, options, capturable=not draws(graph))
    return partial(_call, compiled, inputs, training)


def _call(compiled: Callable[..., Any], inputs: list[torch.Tensor], training: bool) -> None:
    with torch.set_grad_enabled(training):
        outs = compiled(*inputs)
        taught = [x for x in outs if isinstance(x, torch.Tensor) and x.requires_grad]
        if taught:
            torch.autograd.grad(taught, [x for x in inputs if x.requires_grad], taught, allow_unused=True)
