"""What an NVIDIA GPU takes for a site: a roofline of matrix products, exponentials and memory traffic.

The rates are the device's own: multiprocessors times clock times what one does in a cycle. The shares of them that
kernels reach are those that published kernels reach; none was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnfx.cost.question import Question
from attnfx.mask import key_ranges
from attnfx.report import Candidate

# Dense half-precision matrix FLOPs of a multiprocessor in a cycle, with float32 sums, by compute capability: the peak
# rates in NVIDIA's architecture white papers over multiprocessors and boost clock. float32 has a quarter by TF32.
MATRIX_FLOPS = {70: 1024, 75: 1024, 80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
EXPONENTIALS = 16  # of a multiprocessor in a cycle (CUDA programming guide, throughput of native arithmetic)
# Shares of the peaks: FlashAttention-2 on an A100 reaches 70% forward and 55 to 60% backward (Dao 2023, figure 4).
FORWARD, BACKWARD, PRODUCTS, COPY = 0.65, 0.5, 0.6, 0.85
LAUNCH_MS = 0.005
# How often the scores pass through memory: Inductor writes them, reads and writes them in the softmax, and reads them
# for the second product. Its backward pass: the gradient of the weights and of the scores, written and read, and the
# weights read twice.
PASSES, BACKWARD_PASSES = 4, 7
ROWS = 128  # queries of a tile
DECODE_ROWS = 16  # fewer queries than this fill no tile


@dataclass(frozen=True)
class Gpu:
    """A device's rates. `capability` is 90 for 9.0, `clock` in GHz, `bandwidth` in GB/s."""

    capability: int
    multiprocessors: int
    clock: float
    bandwidth: float

    def matrix(self, dtype: str) -> float:
        """FLOPs in a millisecond."""
        known = max((c for c in MATRIX_FLOPS if c <= self.capability), default=70)
        share = 1.0 if dtype in ("float16", "bfloat16") else 0.25 if self.capability >= 80 else 0.125
        return MATRIX_FLOPS[known] * share * self.multiprocessors * self.clock * 1e6

    @property
    def exponentials(self) -> float:
        """Exponentials in a millisecond."""
        return EXPONENTIALS * self.multiprocessors * self.clock * 1e6

    @property
    def copy(self) -> float:
        """Bytes that go through memory in a millisecond."""
        return COPY * self.bandwidth * 1e6


def candidates(ask: Question, gpu: Gpu) -> tuple[Candidate, list[Candidate]]:
    """(the original, the rewrites that can run) with their predicted times (ms) and bytes beyond inputs and output."""
    dims, scores, element = ask.dims, ask.scores, ask.element
    flops = 2.0 * scores * (dims["D"] + dims["Dv"])
    matrix = gpu.matrix(ask.dtype)
    rows = dims["B"] * dims["H"] * dims["T"]
    operands = rows * (dims["D"] + dims["Dv"]) + dims["B"] * dims["G"] * dims["S"] * (dims["D"] + dims["Dv"])
    ranges = key_ranges(ask.spec, dims, ROWS)
    live = sum((r.i1 - r.i0) * (r.j1 - r.j0) for r in ranges) / max(dims["T"] * dims["S"], 1)

    tiles = dims["B"] * dims["H"] * -(-dims["T"] // ROWS)
    filled = min(1.0, max(tiles, 1) / gpu.multiprocessors)  # of the device, by a program for each block of rows

    def original() -> Candidate:
        passes = PASSES + (BACKWARD_PASSES if ask.training else 0)
        products = max(flops * (3 if ask.training else 1) / (PRODUCTS * matrix), operands * element / gpu.copy)
        time = products + passes * scores * element / gpu.copy + LAUNCH_MS * passes
        return Candidate("kept", "inductor", time, 2 * scores * element)

    def fused(share: float) -> float:
        exponentials = share * scores / gpu.exponentials
        forward = max(share * flops / (FORWARD * matrix), exponentials, operands * element / gpu.copy) / filled
        if not ask.training:
            return forward + LAUNCH_MS
        return forward + max(share * flops * 2.5 / (BACKWARD * matrix), exponentials) + 4 * LAUNCH_MS

    kept = Candidate("kept", "aten", fused(1.0 if ask.spec.captures else live), 0) if ask.native else original()
    out: list[Candidate] = []
    if ask.can("flash"):
        out.append(Candidate("flash", "triton", fused(live), 4 * rows))
    if ask.can("decode") and dims["T"] <= DECODE_ROWS and not ask.training:
        time = operands * element / gpu.copy + 2 * LAUNCH_MS
        parts = max(1, 2 * gpu.multiprocessors // max(dims["B"] * dims["G"], 1))  # that the keys are split into
        out.append(Candidate("decode", "triton", time, 4 * rows * (dims["Dv"] + 2) * parts))
    if ask.can("chunked"):
        # blocks of eager operators: the scores pass through memory for each, about three times as often
        block = min(scores, 1 << 26)
        time = 3 * original().predicted_ms * live + LAUNCH_MS * 12 * max(1, scores >> 26)
        out.append(Candidate("chunked", "blocks", time, 3 * 4 * block))
    return kept, out


__all__ = ["Gpu", "candidates"]
