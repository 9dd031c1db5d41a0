"""The choice among the candidates of a site."""

from __future__ import annotations

from collections.abc import Mapping

from attnfx.cost import cpu, gpu
from attnfx.cost.question import Question
from attnfx.ir.expr import Expr
from attnfx.ir.interpret import evaluate as _evaluate
from attnfx.options import Options
from attnfx.report import Candidate, Decision
from attnfx.targets import Target

ROWS_BYTES = 64 << 20  # of scores, from which on whole rows are computed in chunks
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


def decide(ask: Question, options: Options, threads: int = 1, device: Target | None = None) -> Decision:
    """A decision for one site: on a GPU, or on a CPU whose `threads` share the work."""
    on_gpu = device is not None and device.kind != "cpu"
    kept, others = gpu.candidates(ask, device) if on_gpu and device else cpu.candidates(ask, threads)
    allowed = [c for c in others if c.tier in options.tiers]
    if not allowed:
        why = "; ".join(f"{tier}: {reason}" for tier, reason in ask.refused.items() if tier in options.tiers)
        return _of(kept, "no allowed tier can run it" + (f" ({why})" if why else ""), others)
    best = likeliest(allowed)
    alternatives = [kept, *(c for c in others if c is not best)]
    if options.rewrite == "always":
        return _of(best, "", alternatives)
    if ask.device != "cpu" and not on_gpu:
        return _of(kept, f"this version knows no rates of {ask.device}", others)
    if ask.weights_read:
        return _of(kept, f"the weights themselves are read at {ask.weights_read}", others)
    ratio = best.predicted_ms / max(kept.predicted_ms, 1e-9)
    if ratio <= (NATIVE_GAIN if ask.native and on_gpu else GAIN):
        return _of(best, f"predicted {ratio:.2f} x the original's time", alternatives)
    return _of(kept, f"a rewrite is predicted to take {ratio:.2f} x the original's time", others)


def likeliest(some: list[Candidate]) -> Candidate:
    """The candidate with the shortest predicted time; of one tier, a configuration that is not much faster than the
    tier's first gives way to it."""
    best = min(some, key=lambda c: c.predicted_ms)
    default = next(c for c in some if c.tier == best.tier)
    return best if best.predicted_ms <= TILE_GAIN * default.predicted_ms else default


def decide_rows(
    values: int, element: int, device: str, training: bool, options: Options, weights_read: bool
) -> Decision:
    """A decision for a region of whole rows, whose largest value has `values` numbers of `element` bytes.

    Against Inductor on the same function (12 heads x 2048 x 64, one thread of an AMD EPYC), chunks of rows took 0.82
    (talking heads) and 0.90 (the best keys) of the time forward, 1.05 and 1.24 in training, where only their memory is
    less; where the scores fit into the caches there is nothing to gain. `weights_read` says that a value of their size
    leaves the region.
    """
    chunked = Candidate("chunked", "rows", 0.0, min(values * element, ROWS_BYTES))
    kept = Candidate("kept", "inductor", 0.0, 2 * values * element)
    if options.rewrite == "always":
        return _of(chunked, "whole rows", [kept])
    if device != "cpu":
        return _of(kept, f"this version has no kernel that is faster on {device}", [chunked])
    if weights_read:
        return _of(kept, "values as large as the scores are read outside", [chunked])
    if training:
        return _of(
            kept, 'in training, chunks of rows take less memory but more time: rewrite="always" does it', [chunked]
        )
    if values * element < ROWS_BYTES:
        return _of(kept, f"the scores are smaller than {ROWS_BYTES >> 20} MiB", [chunked])
    return _of(chunked, f"whole rows, whose scores would take {values * element >> 20} MiB", [kept])


def _of(chosen: Candidate, reason: str, alternatives: list[Candidate]) -> Decision:
    return Decision(**vars(chosen), reason=reason, alternatives=tuple(alternatives))


__all__ = ["decide", "decide_rows", "evaluate"]
