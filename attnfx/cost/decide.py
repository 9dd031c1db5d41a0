"""The choice among the candidates of a site."""

from __future__ import annotations

from collections.abc import Mapping

from attnfx.cost import cpu, gpu, rows
from attnfx.cost.gpu import Gpu
from attnfx.cost.question import Question
from attnfx.ir.expr import Expr
from attnfx.ir.interpret import evaluate as _evaluate
from attnfx.options import Options
from attnfx.report import Candidate, Decision

GAIN = 0.95  # a rewrite must be predicted to take at most this share of the original's time


def evaluate(e: Expr, sizes: Mapping[str, int]) -> int:
    """The value of a size expression; sizes that are not known count as 1024."""

    class Known(dict[str, int]):
        def __missing__(self, key: str) -> int:
            return 1024

    return int(_evaluate(e, Known(sizes)))


def decide(ask: Question, options: Options, threads: int = 1, device: Gpu | None = None) -> Decision:
    """A decision for one site: on a GPU, or on a CPU whose `threads` share the work."""
    kept, others = cpu.candidates(ask, threads) if device is None else gpu.candidates(ask, device)
    allowed = [c for c in others if c.tier in options.tiers]
    if not allowed:
        why = "; ".join(f"{tier}: {reason}" for tier, reason in ask.refused.items() if tier in options.tiers)
        return _of(kept, "no allowed tier can run it" + (f" ({why})" if why else ""), others)
    best = min(allowed, key=lambda c: c.predicted_ms)
    alternatives = [kept, *(c for c in others if c is not best)]
    if options.rewrite == "always":
        return _of(best, "", alternatives)
    if ask.device != "cpu" and device is None:
        return _of(kept, f"this version knows no rates of {ask.device}", others)
    if ask.weights_read:
        return _of(kept, f"the weights themselves are read at {ask.weights_read}", others)
    ratio = best.predicted_ms / max(kept.predicted_ms, 1e-9)
    if ratio <= GAIN:
        return _of(best, f"predicted {ratio:.2f} x the original's time", alternatives)
    return _of(kept, f"a rewrite is predicted to take {ratio:.2f} x the original's time", others)


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
        return _of(kept, f"this version has no kernel that is faster on {device}", [chunked])
    if weights_read:
        return _of(kept, "values as large as the scores are read outside", [chunked])
    ratio = chunked.predicted_ms / max(kept.predicted_ms, 1e-9)
    if ratio <= GAIN and not training:  # no training step was measured that became faster
        size = values * element >> 20
        return _of(chunked, f"whole rows, whose scores take {size} MiB: {ratio:.2f} x the original's time", [kept])
    why = f"chunks of rows are predicted to take {ratio:.2f} x the original's time"
    if values * element < rows.CACHE:
        return _of(kept, f"{why}: the scores are smaller than {rows.CACHE >> 20} MiB", [chunked])
    where = "in training, " if training else ""
    return _of(kept, f'{where}{why}, but less memory: rewrite="always" does it', [chunked])


def _of(chosen: Candidate, reason: str, alternatives: list[Candidate]) -> Decision:
    return Decision(**vars(chosen), reason=reason, alternatives=tuple(alternatives))


__all__ = ["decide", "decide_rows", "evaluate"]
