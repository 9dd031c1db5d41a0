"""The choice among the candidates of a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnfx.cost import cpu, gpu, rows
from attnfx.cost.question import Question
from attnfx.ir.expr import Expr
from attnfx.ir.interpret import evaluate as _evaluate
from attnfx.options import Options
from attnfx.report import Candidate, Decision
from attnfx.targets import Target

GAIN = 0.95  # a rewrite must be predicted to take at most this share of the original's time
# The same on a GPU where the original is PyTorch's fused operator itself: the model is within 15% of published kernels,
# and no more is known of either.
NATIVE_GAIN = 0.8
# A configuration must be predicted to take at most this share of the time of its kernel's default, which comes first:
# the model orders tiles less surely than tiers.
TILE_GAIN = 0.9


def evaluate(e: Expr, sizes: Mapping[str, int]) -> int:
    """The value of a size expression; sizes that are not known count as 1024."""

    class Known(dict[str, int]):
        def __missing__(self, key: str) -> int:
            return 1024

    return int(_evaluate(e, Known(sizes)))


def decide(
    ask: Question,
    options: Options,
    threads: int = 1,
    device: Target | None = None,
    corrections: Mapping[str, float] | None = None,
) -> Decision:
    """A decision for one site: on a GPU, or on a CPU whose `threads` share the work. `corrections` are factors of the
    predicted times by tier and direction ("library/training"), as `attnfx bench --calibrate` measures them."""
    on_gpu = device is not None and device.kind != "cpu"
    kept, others = gpu.candidates(ask, device) if on_gpu and device else cpu.candidates(ask, threads)
    if corrections:
        kept, *others = (_corrected(c, ask, corrections) for c in (kept, *others))
    allowed = [c for c in others if c.tier in options.tiers]
    if not allowed:
        why = "; ".join(f"{tier}: {reason}" for tier, reason in ask.refused.items() if tier in options.tiers)
        return _of(kept, "no allowed tier can run it" + (f" ({why})" if why else ""), others, "no_tier")
    best = likeliest(allowed)
    alternatives = [kept, *(c for c in others if c is not best)]
    if options.rewrite == "always":
        return _of(best, "", alternatives)
    if ask.device != "cpu" and not on_gpu:
        return _of(kept, f"this version knows no rates of {ask.device}", others, "no_rates")
    if ask.weights_read:
        return _of(kept, f"the weights themselves are read at {ask.weights_read}", others, "weights_read")
    ratio = best.predicted_ms / max(kept.predicted_ms, 1e-9)
    told = f"{ratio:.2f} x the original's time" + (", calibrated on this device" if corrections else "")
    if ratio <= (NATIVE_GAIN if ask.native and on_gpu else GAIN):
        return _of(best, f"predicted {told}", alternatives)
    return _of(kept, f"a rewrite is predicted to take {told}", others, "slower")


def likeliest(some: list[Candidate]) -> Candidate:
    """The candidate with the shortest predicted time; of one tier, a configuration that is not much faster than the
    tier's first gives way to it."""
    best = min(some, key=lambda c: c.predicted_ms)
    default = next(c for c in some if c.tier == best.tier)
    return best if best.predicted_ms <= TILE_GAIN * default.predicted_ms else default


def line(tier: str, training: bool) -> str:
    """The name of a correction."""
    return f"{tier}/{'training' if training else 'forward'}"


def _corrected(c: Candidate, ask: Question, corrections: Mapping[str, float]) -> Candidate:
    return replace(c, predicted_ms=c.predicted_ms * corrections.get(line(c.tier, ask.training), 1.0))


def decide_rows(
    work: Mapping[str, int],
    values: int,
    element: int,
    width: int,
    device: str,
    training: bool,
    options: Options,
    weights_read: bool,
    threads: int = 1,
) -> Decision:
    """A decision for a region of whole rows, whose largest value has `values` numbers of `element` bytes; `work` as
    cost/rows.py has it. `weights_read` says that a value of their size leaves the region."""
    kept, chunked = rows.candidates(work, values, element, width, training, threads)
    if options.rewrite == "always":
        return _of(chunked, "whole rows", [kept])
    if device != "cpu":
        return _of(kept, f"this version has no kernel that is faster on {device}", [chunked], "slower")
    if weights_read:
        return _of(kept, "values as large as the scores are read outside", [chunked], "weights_read")
    ratio = chunked.predicted_ms / max(kept.predicted_ms, 1e-9)
    if ratio <= GAIN and not training:  # no training step was measured that became faster
        size = values * element >> 20
        return _of(chunked, f"whole rows, whose scores take {size} MiB: {ratio:.2f} x the original's time", [kept])
    why = f"chunks of rows are predicted to take {ratio:.2f} x the original's time"
    if values * element < rows.CACHE:
        return _of(kept, f"{why}: the scores are smaller than {rows.CACHE >> 20} MiB", [chunked], "slower")
    where = "in training, " if training else ""
    return _of(kept, f'{where}{why}, but less memory: rewrite="always" does it', [chunked], "slower")


def _of(chosen: Candidate, reason: str, alternatives: list[Candidate], code: str = "") -> Decision:
    return Decision(**vars(chosen), reason=reason, alternatives=tuple(alternatives), code=code)


__all__ = ["decide", "decide_rows", "evaluate", "line"]
