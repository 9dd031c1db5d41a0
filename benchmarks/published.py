"""Compare the cost model with published numbers: TFLOP/s of attention kernels, measured by their authors.

    python benchmarks/published.py [--out benchmarks/results/published.json]

A kernel is described by the known facts about its schedule and instructions (attnfx/cost/others.json), a device by its
data sheet (attnfx/targets/records). Constants are not fitted to this table, with one exception below. But the table was
known when the model's form was chosen: a program's warp groups count as one stream, single warps as separate streams.
Shapes are from the FlashAttention papers: 16384 tokens in all, hidden size 2048, bfloat16 or float16, half the FLOPs
for a causal mask. `held` marks the points of at least 1024 tokens at head widths 64 and 128, whose error a test bounds.
The time of shorter rows is mostly before and after a kernel's loop, and little is published about the kernels'
schedules at head width 256.

The rate of a backward pass's products is predicted as a share of the forward pass's rate. others.json has this share
from the table's 16384 tokens. The backward pass's other memory traffic is visible in the shorter rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from attnfx.cost.gpu_kernel import other, other_backward, work
from attnfx.ir import algebra as A
from attnfx.spec import AttentionSpec, I, J
from attnfx.targets import Target

OUT = Path(__file__).parent / "results" / "published.json"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
FA3 = "Shah et al. 2024, FlashAttention-3 (arXiv:2407.08608), figure 5: attention forward speed, H100 80GB SXM5"
BACK = "Shah et al. 2024, FlashAttention-3 (arXiv:2407.08608), figure 6: attention backward speed, H100 80GB SXM5"
FA2 = "Dao 2023, FlashAttention-2 (arXiv:2307.08691): about 70% (at most 73%) of an A100's peak of 312 TFLOP/s"
UPSTREAM = "PyTorch benchmark repository, pull request 2391: Triton's tutorial kernel, H100"
BEST = "upstream Triton's best tutorial kernel, H100 SXM, 16k, as this project's survey found it"
# kernel, device, head width, causal, TFLOP/s at each length (None: not published), source
TABLE = (
    ("flash-attention-3", "h100-sxm", 64, False, (333, 392, 460, 476, 496, 497), FA3),
    ("flash-attention-3", "h100-sxm", 128, False, (467, 565, 625, 638, 646, 648), FA3),
    ("flash-attention-3", "h100-sxm", 128, True, (292, 423, 521, 579, 602, 616), FA3),
    ("flash-attention-3", "h100-sxm", 256, False, (286, 427, 537, 612, 628, 642), FA3),
    ("cudnn", "h100-sxm", 64, False, (335, 373, 395, 408, 412, 413), FA3),
    ("cudnn", "h100-sxm", 128, False, (497, 574, 617, 609, 600, 595), FA3),
    ("cudnn", "h100-sxm", 128, True, (315, 410, 484, 518, 529, 539), FA3),
    ("triton", "h100-sxm", 64, False, (340, 382, 396, 400, 401, 403), FA3),
    ("triton", "h100-sxm", 128, False, (323, 372, 389, 389, 392, 395), FA3),
    ("triton", "h100-sxm", 128, True, (146, 273, 323, 353, 369, 378), FA3),
    ("triton", "h100-sxm", 128, False, (329, 390, 434, 458, 471, 477), UPSTREAM),
    ("triton", "h100-sxm", 128, False, (None, None, None, None, None, 487), BEST),
    ("flash-attention-2", "h100-sxm", 64, False, (282, 306, 318, 321, 322, 324), FA3),
    ("flash-attention-2", "h100-sxm", 128, False, (309, 350, 362, 368, 370, 370), FA3),
    ("flash-attention-2", "h100-sxm", 128, True, (191, 260, 298, 319, 333, 335), FA3),
    ("flash-attention-2", "a100-80gb", 128, False, (None, None, None, None, None, 0.7 * 312), FA2),
)
BACKWARD = (
    ("flash-attention-3", "h100-sxm", 64, (272, 363, 422, 453, 472, 474)),
    ("flash-attention-3", "h100-sxm", 128, (316, 424, 501, 542, 559, 561)),
    ("cudnn", "h100-sxm", 64, (266, 348, 395, 417, 432, 433)),
    ("cudnn", "h100-sxm", 128, (305, 408, 465, 499, 518, 516)),
    ("flash-attention-2", "h100-sxm", 64, (198, 238, 264, 279, 287, 291)),
    ("flash-attention-2", "h100-sxm", 128, (214, 260, 291, 310, 318, 322)),
)
PLAIN = A.mul(A.const(0.125), A.DOT)
SPECS = {
    False: AttentionSpec(score=PLAIN),
    True: AttentionSpec(score=A.where(A.ge(I, J), PLAIN, A.const(float("-inf")))),
}


class Point(NamedTuple):
    """One published rate and its prediction, in TFLOP/s."""

    kernel: str
    device: str
    width: int
    causal: bool
    length: int
    published: float
    predicted: float
    held: bool
    source: str
    backward: bool = False

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def predict(
    kernel: str, device: str, width: int, causal: bool, length: int, backward: bool = False, tokens: int = 16384
) -> float:
    """Predict the TFLOP/s of a forward or backward pass over `tokens` tokens in rows of `length`, hidden size 2048."""
    target, heads, batch = Target.by_name(device), 2048 // width, tokens // length
    one = other(kernel, target, "bfloat16", width)
    sizes = (("B", batch), ("H", heads), ("S", length), ("T", length))
    part = work(SPECS[causal], sizes, one.rows, one.keys)
    ms = one.milliseconds(target, part, batch * heads, one.keys * 2 * width * 2) + target.launch / 1e3
    if backward:
        ms = other_backward(kernel, target, "bfloat16", width, ms, tokens * 2048, 2)
    return (10 if backward else 4) * batch * heads * length**2 * width * (0.5 if causal else 1) / ms / 1e9


def points() -> Iterator[Point]:
    for kernel, device, width, causal, numbers, source in TABLE:
        for length, published in zip(LENGTHS, numbers):
            if published is not None:
                found = predict(kernel, device, width, causal, length)
                held = length >= 1024 and width <= 128
                yield Point(kernel, device, width, causal, length, published, found, held, source)
    for kernel, device, width, numbers in BACKWARD:
        for length, published in zip(LENGTHS, numbers):
            found = predict(kernel, device, width, False, length, backward=True)
            yield Point(kernel, device, width, False, length, published, found, length >= 1024, BACK, backward=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = list(points())
    for p in found:
        mask = "causal" if p.causal else "backward" if p.backward else ""
        print(f"{p.kernel:18} {p.device:10} {p.width:4} {mask:8} {p.length:6} {p.published:7.0f} {p.predicted:7.0f} "
              f"{p.error:+6.1%} {'' if p.held else '(not bounded by a test)'}")  # fmt: skip
    held = [abs(p.error) for p in found if p.held]
    print(f"{len(held)} points bounded by a test: mean error {sum(held) / len(held):.1%}, largest {max(held):.1%}; "
          f"{sum(e <= 0.15 for e in held)} within 15%")  # fmt: skip
    rows = [p._asdict() | {"predicted": round(p.predicted, 1), "error": round(p.error, 3)} for p in found]
    data = {"unit": "TFLOP/s; predicted by attnfx.cost, published by the sources", "rows": rows}
    options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
