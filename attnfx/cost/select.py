"""Choose among the candidates of a site."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from attnfx.cost import cpu, gpu
from attnfx.cost import row_chunks as rows
from attnfx.cost.query import Question
from attnfx.ir.expr import Expr
from attnfx.ir.interpret import evaluate as _evaluate
from attnfx.options import Options
from attnfx.report.records import Candidate, Decision
from attnfx.spec import UNKNOWN_SIZE
from attnfx.targets import Target

GAIN = 0.95  # a rewrite must be predicted to take at most this share of the original's time
# The same on a GPU if the original is PyTorch's fused operator itself: the model is only known to be within 15% of
# published kernels, on either side.
NATIVE_GAIN = 0.8
# A configuration must be predicted to take at most this share of the time of its kernel's default, which comes first:
# the model orders tiles less reliably than tiers.
TILE_GAIN = 0.9
COMPILED = 1.0  # ms of a call that C++ must save over another tier: g++ compiles it for seconds, at every new shape


def evaluate(e: Expr, sizes: Mapping[str, int]) -> int:
    """Evaluate a size expression; unknown sizes count as UNKNOWN_SIZE."""
    return int(_evaluate(e, defaultdict(lambda: UNKNOWN_SIZE, sizes)))


def select(
    ask: Question,
    options: Options,
    threads: int = 1,
    device: Target | None = None,
    corrections: Mapping[str, float] | None = None,
) -> Decision:
    """Decide on one site, for a GPU or for a CPU whose `threads` share the work. `corrections` are factors of the
    predicted times by tier and direction ("library/training"), as measured by `attnfx bench --calibrate`."""
    on_gpu = device is not None and device.kind != "cpu"
    kept, others = gpu.candidates(ask, device) if on_gpu and device else cpu.candidates(ask, threads)
    if corrections:
        kept, *others = (
            replace(c, predicted_ms=c.predicted_ms * corrections.get(line(c.tier, ask.training), 1.0))
            for c in (kept, *others)
        )
    every = [kept, *others]
    allowed = [c for c in others if c.tier in options.tiers]
    if not allowed:
        why = "; ".join(f"{tier}: {reason}" for tier, reason in ask.refused.items() if tier in options.tiers)
        able = dict.fromkeys(c.tier for c in others)
        none = "the option `tiers` allows only kept" if options.tiers == ("kept",) else "none suits these sizes"
        return _of(
            kept,
            f"no allowed tier can run this attention ({why or none})",
            every,
            "no_tier",
            able=" or ".join(f'"{t}"' for t in able),
        )
    best = likeliest(allowed)
    if options.rewrite == "always":
        return _of(best, "", every)
    if ask.device != "cpu" and not on_gpu:
        return _without_rates(kept, every, ask.device)
    if ask.weights_read:
        why = f"the weights themselves are read at {ask.weights_read}, so they are computed in any case"
        return _of(kept, why, every, "weights_read", reader=ask.weights_read)
    ratio = best.predicted_ms / max(kept.predicted_ms, 1e-9)
    told = f"{ratio:.2f} x the original's time" + (", calibrated on this device" if corrections else "")
    most = NATIVE_GAIN if ask.native and on_gpu else GAIN
    if ratio <= most:
        return _of(best, f"predicted {told}", every)
    sizes = f"{ask.dims['T']} queries and {ask.dims['S']} keys"
    return _of(kept, f"a rewrite is predicted to take {told} (the limit is {most:g} x)", every, "slower", sizes=sizes)


def likeliest(some: list[Candidate]) -> Candidate:
    """Return the candidate with the shortest predicted time, unless it is C++ that hardly pays for its compilation.
    Of a kernel, the default (first) configuration wins unless another is much faster (TILE_GAIN)."""
    kernels: dict[tuple[str, str], Candidate] = {}
    for c in sorted(some, key=lambda c: c.predicted_ms):
        default = next(d for d in some if (d.tier, d.kernel) == (c.tier, c.kernel))
        best = c if c.predicted_ms <= TILE_GAIN * default.predicted_ms else default
        kernels.setdefault((c.tier, c.kernel), best)
    return _worth_compiling(min(kernels.values(), key=lambda c: c.predicted_ms), list(kernels.values()))


def _worth_compiling(best: Candidate, others: list[Candidate]) -> Candidate:
    """Return the best candidate, or the next one if C++ that compiles for seconds saves less than COMPILED a call."""
    rest = [c for c in others if c.kernel != "cpp"]
    if best.kernel != "cpp" or not rest:
        return best
    second = min(rest, key=lambda c: c.predicted_ms)
    return second if second.predicted_ms - best.predicted_ms < COMPILED else best


def line(tier: str, training: bool) -> str:
    """Return the key of a correction factor, e.g. "library/training"."""
    return f"{tier}/{'training' if training else 'forward'}"


def select_rows(
    ask: rows.Rows, options: Options, weights_read: bool, threads: int = 1, device: Target | None = None
) -> Decision:
    """Decide on a region of whole rows, for a GPU or for a CPU whose `threads` share the work. `weights_read` means
    that a value of the scores' size leaves the region."""
    on_gpu = device is not None and device.kind != "cpu"
    kept, ways = rows.candidates(ask, threads, device if on_gpu else None)
    best = min(ways, key=lambda c: c.predicted_ms)
    every = [kept, *ways]
    if options.rewrite == "always":
        return _of(best, "whole rows", every)
    if ask.device != "cpu" and not on_gpu:
        return _without_rates(kept, every, ask.device)
    if weights_read:
        return _of(kept, "a tensor as large as the scores is read outside the attention", every, "weights_read")
    ratio = best.predicted_ms / max(kept.predicted_ms, 1e-9)
    source = ", estimated from the device's rates and not measured" if on_gpu else ""
    told = f"{ratio:.2f} x the original's time{source}"
    size, memory = ask.bytes >> 20, device.memory if device is not None else _memory()
    if kept.predicted_bytes > memory:
        why = f"with its scores of {size} MiB the original exceeds the memory of {memory >> 20} MiB"
        return _of(best, f"whole rows: {why}; predicted {told}", every)
    if ratio <= GAIN:
        return _of(best, f"whole rows: the scores take {size} MiB; predicted {told}", every)
    sizes = f"{ask.bytes / 2**20:.3g} MiB of scores"
    why = f"chunks of rows are predicted to take {told}"
    if ask.bytes < rows.CACHE and not on_gpu:
        limit = f"chunks of rows usually pay off only from {rows.CACHE >> 20} MiB of scores"
        return _of(kept, f"{why}: {limit}, and these take {ask.bytes / 2**20:.3g} MiB", every, "slower", sizes=sizes)
    return _of(kept, f"{why}, but less memory", every, "slower", sizes=sizes)


def _memory() -> int:
    """Return this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _without_rates(kept: Candidate, every: list[Candidate], device: str) -> Decision:
    return _of(kept, f"this version of attnfx has no compute rates for {device}", every, "no_rates", device=device)


def _of(chosen: Candidate, reason: str, every: list[Candidate], code: str = "", **facts: str) -> Decision:
    """Return the decision for one of the candidates; `facts` are those that the advice of `code` needs."""
    alternatives = tuple(c for c in every if c is not chosen)
    return Decision(**vars(chosen), reason=reason, alternatives=alternatives, code=code, facts=facts)
