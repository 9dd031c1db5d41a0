"""Which tier a site gets, and what it is predicted to cost.

A roofline of one line per way of computing: nanoseconds per score and thread, plus what a call costs whatever its
size. The numbers of `CPU` were fitted to benchmarks/results/grid.json (AMD EPYC, one thread's own time); other
processors differ in the numbers, less in the ratios that decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attnfx.ir.expr import Expr
from attnfx.ir.interpret import evaluate as _evaluate
from attnfx.mask import key_ranges
from attnfx.options import Options
from attnfx.report import Candidate, Decision
from attnfx.spec import AttentionSpec


@dataclass(frozen=True)
class Line:
    """time = scores * (fixed + per_dim * head_dim) + call; ns per score of one thread, ns per call."""

    fixed: float
    per_dim: float
    call: float
    backward: float  # forward and backward together, as a multiple of the forward


# The original under Inductor, by the bytes of all its scores: in a core's cache, in the shared one, in memory.
ORIGINAL = (
    (4 << 20, Line(1.9, 0.036, 2e4, 3.0)),
    (32 << 20, Line(3.1, 0.036, 2e4, 3.0)),
    (1 << 62, Line(4.1, 0.036, 2e4, 3.0)),
)
LIBRARY = Line(0.5, 0.0415, 2.5e5, 3.4)  # a score that is computed at all; blocks with a mask pay MASKED more
CHUNKED = Line(5.2, 0.040, 4e5, 3.4)
SUMS = Line(2.5, 0.020, 4e5, 3.1)  # a sum of the weights: blocks without the values (12 heads x 2048 x 64, measured)
MASKED = 1.0
BLOCK = 256  # queries in a block, as kernels/library.py cuts them
BLOCK_CALL = 6e4  # ns for each block beyond the first
ROWS_BYTES = 64 << 20  # of scores, from which on whole rows are computed in chunks
GAIN = 0.95  # a rewrite must be predicted to take at most this share of the original's time


def evaluate(e: Expr, sizes: Mapping[str, int]) -> int:
    """The value of a size expression; sizes that are not known count as 1024."""

    class Known(dict[str, int]):
        def __missing__(self, key: str) -> int:
            return 1024

    return int(_evaluate(e, Known(sizes)))


def decide(
    spec: AttentionSpec, dims: Mapping[str, int], dtype: str, device: str, training: bool, options: Options,
    library: str | None, threads: int = 1, original: str = "naive", sums: int = 0, weights_read: str = "",
) -> Decision:  # fmt: skip
    """A decision for one site.

    dims       B, H, G, T, S, D, Dv and the spec's own sizes
    dtype      of query, key and value, the name without "torch."
    library    why the library tier cannot run it, or None
    threads    that share the work on a CPU
    original      "library" where the graph calls PyTorch's fused operator itself
    sums          how many sums of the weights are computed again
    weights_read  where the weights themselves are read, so that they exist whatever is decided
    """
    kept, others = candidates(spec, dims, dtype, training, library, threads, original, sums)
    allowed = [c for c in others if c.tier in options.tiers]
    if not allowed:
        return _of(kept, "no allowed tier can run it" + (f" (library: {library})" if library else ""), others)
    best = min(allowed, key=lambda c: c.predicted_ms)
    alternatives = [kept, *(c for c in others if c is not best)]
    if options.rewrite == "always":
        return _of(best, "", alternatives)
    if device != "cpu":
        return _of(kept, f"this version has no kernel that is faster on {device}", others)
    if weights_read:
        return _of(kept, f"the weights themselves are read at {weights_read}", others)
    ratio = best.predicted_ms / max(kept.predicted_ms, 1e-9)
    if ratio <= GAIN:
        return _of(best, f"predicted {ratio:.2f} x the original's time", alternatives)
    return _of(kept, f"a rewrite is predicted to take {ratio:.2f} x the original's time", others)


def decide_rows(values: int, element: int, device: str, options: Options, weights_read: bool) -> Decision:
    """A decision for a region of whole rows, whose largest value has `values` numbers of `element` bytes.

    Chunks of rows took 0.63 (talking heads) and 1.03 (the best keys) of eager's time in training, 12 heads x 4096 x 64
    (benchmarks/rows.py, one thread of an AMD EPYC); where the scores fit into the caches there is nothing to gain.
    `weights_read` says that a value of their size leaves the region.
    """
    chunked = Candidate("chunked", "rows", 0.0, min(values * element, ROWS_BYTES))
    kept = Candidate("kept", "inductor", 0.0, 2 * values * element)
    if options.rewrite == "always":
        return _of(chunked, "whole rows", [kept])
    if device != "cpu":
        return _of(kept, f"this version has no kernel that is faster on {device}", [chunked])
    if weights_read:
        return _of(kept, "values as large as the scores are read outside", [chunked])
    if values * element < ROWS_BYTES:
        return _of(kept, f"the scores are smaller than {ROWS_BYTES >> 20} MiB", [chunked])
    return _of(chunked, f"whole rows, whose scores would take {values * element >> 20} MiB", [kept])


def _of(chosen: Candidate, reason: str, alternatives: list[Candidate]) -> Decision:
    return Decision(
        chosen.tier, chosen.kernel, chosen.predicted_ms, chosen.predicted_bytes, reason, tuple(alternatives)
    )


def candidates(
    spec: AttentionSpec, dims: Mapping[str, int], dtype: str, training: bool, library: str | None, threads: int,
    original: str, sums: int,
) -> tuple[Candidate, list[Candidate]]:  # fmt: skip
    """(the original, the rewrites that can run) with their predicted times (ms) and bytes beyond inputs and output."""
    scores = dims["B"] * dims["H"] * dims["T"] * dims["S"]
    element = 2 if dtype in ("float16", "bfloat16") else 8 if dtype == "float64" else 4
    live, masked, blocks = _live(spec, dims)
    width = (dims["D"] + dims["Dv"]) / 2

    def time(line: Line, count: float, extra: float = 0.0, calls: float = 0.0) -> float:
        forward = count * (line.fixed + extra + line.per_dim * width) / threads + line.call + calls
        return forward * (line.backward if training else 1.0) / 1e6

    lines = next(line for limit, line in ORIGINAL if scores * element <= limit)
    saved = 2 * scores * element  # scores and weights are alive together
    kept = Candidate("kept", "inductor", time(lines, scores), saved)
    if original == "library":
        kept = Candidate("kept", "aten", time(LIBRARY, scores, MASKED if masked else 0.0) - LIBRARY.call / 1e6, 0)
    out: list[Candidate] = []
    rows = dims["B"] * dims["H"] * 4
    if library is None:
        cost = time(LIBRARY, scores * live, MASKED if masked else 0.0, (blocks - 1) * BLOCK_CALL)
        if training and any(c.grad for c in spec.captures):  # its backward pass gives captures no gradient
            cost = cost / LIBRARY.backward + time(CHUNKED, scores * live) * (1 - 1 / CHUNKED.backward)
        out.append(
            Candidate(
                "library", "flash_attention_for_cpu", cost, rows * min(dims["T"], BLOCK) * (dims["S"] if masked else 1)
            )
        )
    block = min(scores, 1 << 20) * 4 * 3
    out.append(Candidate("chunked", "blocks", time(CHUNKED, scores * live, 0.0, (blocks - 1) * BLOCK_CALL), block))
    again = sums * time(SUMS, scores * live, 0.0, (blocks - 1) * BLOCK_CALL)
    return kept, [replace(c, predicted_ms=c.predicted_ms + again) for c in out]


def _live(spec: AttentionSpec, dims: Mapping[str, int]) -> tuple[float, bool, int]:
    """(share of the scores that is computed, whether blocks need a mask, how many blocks there are)."""
    ranges = key_ranges(spec, dict(dims), BLOCK)
    total = sum((r.i1 - r.i0) * (r.j1 - r.j0) for r in ranges)
    masked = not all(r.full for r in ranges) or any(e in spec.score.free for e in ("i", "j"))
    if not masked:
        return 1.0, False, 1
    return total / max(dims["T"] * dims["S"], 1), masked, max(len(ranges), 1)
