"""Tune sites: time the likeliest candidates of a site on its real shapes once, and cache the times.

A site is cut out of its graph. The original cut and the cut rewritten for each candidate are compiled and timed alone.
The inputs have the shapes, strides and dtypes of the example inputs, with synthetic values: normal random numbers for
query, key and value, zeros for other floats (a bias that masks nothing), and ones for bools and integers (every key is
visible). So the times do not reflect effects of values, such as the share of padding in a mask.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

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
from attnfx.targets.sdpa_dispatch import IMPLEMENTATIONS
from attnfx.tuning import timing

MOST = 8  # candidates that are timed, including the original
ANSWERS = cache.JsonCache("tuning")

Build = Callable[[Candidate], "GraphModule | None"]
Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], Mapping[str, float]]
log = logging.getLogger(__name__)


def tune(
    ask: Question, decision: Decision, options: Options, device: torch.device, build: Build, timer: Timer | None = None
) -> Decision:
    """Decide by measured times, from the cache if it has them.

    `decision` is the prediction. `build(candidate)` returns the cut graph of the site under a candidate, or None if it
    cannot be built; it is called only for candidates to be timed. If none can be timed, the prediction stands and its
    reason notes that. With tune="known", the prediction stands if the cache lacks the times.
    """
    first = Candidate(**{name: getattr(decision, name) for name in Candidate.__dataclass_fields__})
    every = sorted((first, *decision.alternatives), key=lambda c: c.predicted_ms)
    chosen = [c for c in every if c.tier == "kept" or c.tier in options.tiers]
    chosen = sorted(chosen, key=lambda c: c.tier != "kept")[:MOST]
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
    """Return a candidate's name in the cache: its tier, and any configuration that the tier does not choose itself."""
    flash = f" {c.kernel}" if c.kernel in IMPLEMENTATIONS.values() else ""
    return f"{configuration.of(c)}{flash}"


def key_of(ask: Question, names: Mapping[str, Candidate], device: torch.device) -> str:
    """Return the cache key of a measurement: the question (T and S rounded up to powers of two), the candidates, the
    device and the versions."""
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
    """Decide for the fastest timed candidate; with rewrite="always", for the fastest rewrite."""
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
    code = "slower" if best.tier == "kept" else ""
    return Decision(**vars(best), reason=f"measured: {said}", code=code, alternatives=others)


def measure(
    names: Mapping[str, Candidate], options: Options, device: torch.device, build: Build, timer: Timer | None = None
) -> dict[str, float]:
    """Return the ms of a call of each candidate that can be built and run, by name. A call includes the backward pass
    if inputs require gradients. PyTorch's random generators are left unchanged."""
    runs: dict[str, Callable[[], object]] = {}
    devices = [device] if device.type == "cuda" and torch.cuda.is_available() else []
    # a backend is called while Dynamo traces: keep this compilation out of that trace
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
    """Make tensors for the placeholders of a cut graph, with the values that the module's docstring describes."""
    out = []
    for n in graph.graph.nodes:
        if n.op != "placeholder":
            continue
        like = n.meta["example_value"]
        sizes = [1 if stride == 0 else size for size, stride in zip(like.shape, like.stride())]  # expanded dims: 1
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
    # Compile the backward pass now: on a GPU, its first run would compile it in another thread, which would wait for
    # the lock that this compilation holds.
    with torch.set_grad_enabled(training), aot.patch(force_non_lazy_backward_lowering=True):
        compiled = compile_graph(graph, inputs, options, capturable=not draws(graph))

    def call() -> None:
        with torch.set_grad_enabled(training):
            outs = compiled(*inputs)
            taught = [x for x in outs if isinstance(x, torch.Tensor) and x.requires_grad]
            if taught:
                torch.autograd.grad(taught, [x for x in inputs if x.requires_grad], taught, allow_unused=True)

    return call
