"""What a CPU takes for a site: one line per way of computing, nanoseconds per score and thread.

The numbers were fitted to benchmarks/results/grid.json (AMD EPYC, one thread's own time); other processors differ in
the numbers, less in the ratios that decide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnfx.cost.question import Question
from attnfx.mask import key_ranges
from attnfx.report import Candidate


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
SUMS = Line(2.5, 0.020, 4e5, 3.1)  # a sum of the weights: blocks without the values; measured, 12 heads x 2048 x 64
MASKED = 1.0
BLOCK = 256  # queries in a block, as kernels/library.py cuts them
BLOCK_CALL = 6e4  # ns for each block beyond the first


def candidates(ask: Question, threads: int) -> tuple[Candidate, list[Candidate]]:
    """(the original, the rewrites that can run) with their predicted times (ms) and bytes beyond inputs and output."""
    dims, element = ask.dims, ask.element
    scores = ask.scores
    live, masked, blocks = _live(ask)
    width = (dims["D"] + dims["Dv"]) / 2

    def time(line: Line, count: float, extra: float = 0.0, calls: float = 0.0) -> float:
        forward = count * (line.fixed + extra + line.per_dim * width) / threads + line.call + calls
        return forward * (line.backward if ask.training else 1.0) / 1e6

    lines = next(line for limit, line in ORIGINAL if scores * element <= limit)
    saved = 2 * scores * element  # scores and weights are alive together
    kept = Candidate("kept", "inductor", time(lines, scores), saved)
    if ask.native:
        kept = Candidate("kept", "aten", time(LIBRARY, scores, MASKED if masked else 0.0) - LIBRARY.call / 1e6, 0)
    out: list[Candidate] = []
    rows = dims["B"] * dims["H"] * 4
    cuts = (blocks - 1) * BLOCK_CALL
    if ask.can("library"):
        cost = time(LIBRARY, scores * live, MASKED if masked else 0.0, cuts)
        if ask.training and any(c.grad for c in ask.spec.captures):  # its backward pass gives captures no gradient
            cost = cost / LIBRARY.backward + time(CHUNKED, scores * live) * (1 - 1 / CHUNKED.backward)
        tile = rows * min(dims["T"], BLOCK) * (dims["S"] if masked else 1)
        out.append(Candidate("library", "flash_attention_for_cpu", cost, tile))
    if ask.can("chunked"):
        block = min(scores, 1 << 20) * 4 * 3
        out.append(Candidate("chunked", "blocks", time(CHUNKED, scores * live, 0.0, cuts), block))
    again = ask.sums * time(SUMS, scores * live, 0.0, cuts)
    return kept, [replace(c, predicted_ms=c.predicted_ms + again) for c in out]


def _live(ask: Question) -> tuple[float, bool, int]:
    """(share of the scores that is computed, whether blocks need a mask, how many blocks there are)."""
    dims = ask.dims
    ranges = key_ranges(ask.spec, dims, BLOCK)
    total = sum((r.i1 - r.i0) * (r.j1 - r.j0) for r in ranges)
    masked = not all(r.full for r in ranges) or any(e in ask.spec.score.free for e in ("i", "j"))
    if not masked:
        return 1.0, False, 1
    return total / max(dims["T"] * dims["S"], 1), masked, max(len(ranges), 1)
