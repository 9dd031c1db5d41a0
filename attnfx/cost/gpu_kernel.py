"""Predict the time of one launch of a tiled attention kernel, from the mask's tiles and the kernel's machine code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from attnfx.cost.gpu_occupancy import (
    LATENCY,
    SCHEDULERS,
    SHARED_BYTES,
    TRIPS,
    WARP,
    Step,
    cycles,
    float_lanes,
    matrix_rate,
    occupancy,
    on_all,
    warp_groups,
)  # fmt: skip
from attnfx.cost.instruction_counts import Code, Loop
from attnfx.cost.operation_counts import Operations
from attnfx.ir import algebra as A
from attnfx.mask import ANALYSED, visited
from attnfx.mask.predicate import kept
from attnfx.spec import AttentionSpec
from attnfx.targets import Target

OTHERS = Path(__file__).with_name("others.json")
COPY = 0.9  # share of the stated bandwidth that copies reach: 4.3 of 4.8 TB/s measured on an H200
L2_SHARE = 0.76  # same share of the last shared cache: 2155 of 2826 GB/s on a V100 (Jia et al. 2018, arXiv:1804.06826)


class Work(NamedTuple):
    """The tiles of one head.

    blocks             number of row blocks
    shortest, longest  fewest and most tiles that a block visits
    total              tiles that all blocks visit
    full               share of the visited tiles without masked scores and bound tests
    """

    blocks: int
    shortest: int
    longest: int
    total: int
    full: float


def even(blocks: int, each: int, full: float) -> Work:
    """Return the work of blocks that all visit `each` tiles."""
    return Work(blocks, each, each, blocks * each, full)


@lru_cache(maxsize=4096)
def work(spec: AttentionSpec, dims: tuple[tuple[str, int], ...], rows: int, keys: int) -> Work:
    """Return the tiles of `rows` by `keys` that a kernel visits; `dims` are sorted pairs: B, H, T, S, the spec's sizes.
    The mask is analyzed in blocks of at least ANALYSED rows. Smaller blocks count as parts of one: an upper bound."""
    sizes = dict(dims)
    if kept(spec) is A.TRUE:
        columns = -(-sizes["S"] // keys)
        return even(-(-sizes["T"] // rows), columns, (sizes["S"] // keys) / max(columns, 1))
    found, blocks = visited(spec, sizes, max(rows, ANALYSED), keys), -(-sizes["T"] // rows)
    total = -(-found.total * blocks // max(found.blocks, 1))
    return Work(blocks, found.shortest, found.longest, total, min(1.0, found.full / max(found.total, 1)))


@dataclass(frozen=True)
class Kernel:
    """The cost of a kernel at one tile size.

    rows, keys     size of the tile
    full, checked  cycles of a step on each unit: without and with the mask
    resident       programs that a multiprocessor holds
    streams        independent streams of steps in these programs
    stages         of the load pipeline
    around         cycles of a program outside its loop; latency is counted separately
    longest_first  whether row blocks with the most keys start first, as in attnfx's kernels
    """

    rows: int
    keys: int
    full: Step
    checked: Step
    resident: int
    streams: int
    stages: int
    around: float
    longest_first: bool = True

    def program(self, target: Target, part: Work, steps: float, streams: int, bytes_per_step: float) -> float:
        """Return the cycles of a multiprocessor for a program of `steps` steps, if `streams` streams share it."""
        step = self.full.times(part.full).plus(self.checked, 1.0 - part.full)
        hidden = (self.stages - 1) * sum(step)
        stall = max(0.0, LATENCY - hidden) if self.stages > 1 else LATENCY
        # the streams of a program share its work; each of them waits for memory
        inner = max(1, self.streams // max(self.resident, 1))
        delay = stall + TRIPS * LATENCY / max(steps, 1)
        one = cycles(step.times(1.0 / inner), streams, delay) * inner
        # bytes per cycle from the last shared cache to a multiprocessor
        rate = L2_SHARE * target.l2_bandwidth / (target.multiprocessors * target.clock)
        return steps * max(one, bytes_per_step / rate) + self.around

    def milliseconds(self, target: Target, part: Work, heads: int, bytes_per_step: float, repeat: int = 1) -> float:
        """Predict the ms of a launch with a program per row block and head; it walks its tiles `repeat` times."""
        if not part.blocks or not self.resident:
            return float("inf") if part.blocks else 0.0
        mean = part.total * repeat / part.blocks
        # in a launch too small to fill the multiprocessors, fewer programs share each
        held = max(1, min(self.resident, -(-part.blocks * heads // target.multiprocessors)))
        shared = max(1, self.streams * held // self.resident)
        alone = max(1, self.streams // self.resident)
        cost = self.program(target, part, mean, shared, bytes_per_step)
        slower = 1.0
        if cost and alone != shared:
            slower = self.program(target, part, mean, alone, bytes_per_step) / cost
        shortest, longest = (n * repeat / mean if mean else 1.0 for n in (part.shortest, part.longest))
        return on_all(target, part.blocks * heads, cost, shortest * cost, longest * cost, slower, self.longest_first)


@lru_cache(maxsize=4096)
def of_code(code: Code, target: Target, dtype: str, products: float, extra: Operations) -> Kernel:
    """Return the cost of one of attnfx's kernels, whose products take `products` matrix FLOPs per score."""
    rows, keys, warps, stages = code.tile
    scores = rows * keys
    rate = matrix_rate(target, dtype)
    if warp_groups(target) and target.capability >= 100 and rows < 128:
        rate *= rows / 128  # tcgen05 has lanes for 128 rows: PTX ISA, tcgen05.mma
    lanes, special = float_lanes(target), target.exponentials / (target.multiprocessors * target.clock)

    def step(loop: Loop, more: float, more_special: float) -> Step:
        added = more * scores / WARP
        floats = (loop.float * warps + added) * WARP / lanes
        return Step(
            matrix=products * scores / rate,
            special=(loop.special * warps * WARP + more_special * scores) / special,
            issue=max((loop.instructions * warps + added) / SCHEDULERS, floats),
            shared=(loop.loads + loop.stores) * warps * WARP * 16 / SHARED_BYTES,
        )

    resident = occupancy(target, warps, code.registers, code.shared)
    streams = resident if warp_groups(target) else resident * max(1, warps // SCHEDULERS)
    outside = max(0.0, code.total - code.full.instructions - code.checked.instructions) * warps / SCHEDULERS
    return Kernel(
        rows, keys, step(code.full, extra.always, extra.special),
        step(code.checked, extra.always + extra.masked, extra.special + extra.masked_special),
        resident, streams, stages, outside,
    )  # fmt: skip


@lru_cache
def _others() -> list[Mapping]:
    return json.loads(OTHERS.read_text(encoding="utf-8"))["rows"]


@lru_cache(maxsize=1024)
def _other(name: str, capability: int, dtype: str, width: int) -> Mapping:
    """Return a published kernel's row of others.json for a dtype, architecture and head width. The row is of the newest
    listed architecture up to `capability` and the next larger width, else the largest."""
    kind = "float32" if dtype == "float32" else "float16"
    rows = [r for r in _others() if r["name"] == name and r.get("dtype", kind) == kind]
    newest = max((r["capability"] for r in rows if r["capability"] <= capability), default=rows[0]["capability"])
    rows = sorted((r for r in rows if r["capability"] == newest), key=lambda r: r["width"])
    return next((r for r in rows if r["width"] >= width), rows[-1])


def other_backward(
    name: str, target: Target, dtype: str, width: int, forward: float, elements: int, element: int
) -> float:
    """Predict the ms of a published kernel's backward pass after a forward pass of `forward` ms. The query has
    `elements` elements of `element` bytes. Besides its five products, the backward pass sums out * grad_out, fills a
    float32 gradient of the query with zeros, and converts it."""
    passed = elements * (2 * element + 4 + 4 + element) / (COPY * target.bandwidth * 1e6)
    slower = _other(name, target.capability, dtype, width)["backward"]
    return 2.5 * forward / slower + passed + 3 * target.launch / 1e3


def other(name: str, target: Target, dtype: str, width: int) -> Kernel:
    """Return the cost of a published kernel. others.json states either its instructions or the share of the matrix
    unit's rate that it was measured to reach."""
    row = _other(name, target.capability, dtype, width)
    rows, keys = row["tile"]
    scores = rows * keys
    flops = 4.0 * scores * width
    if "share" in row:
        rate = matrix_rate(target, row.get("unit", dtype), row.get("single_warps", True)) / row.get("products", 1)
        one = Step(flops / (row["share"] * rate), 0, 0, 0)
    else:
        special = target.exponentials / (target.multiprocessors * target.clock)
        one = Step(
            matrix=flops / matrix_rate(target, dtype, row["single_warps"]),
            special=row["special"] * scores / special,
            issue=row["instructions"] * scores / WARP / SCHEDULERS,
            shared=row["shared"] * scores / SHARED_BYTES,
        )
    # a tile that the mask cuts costs a comparison and a selection per score
    cut = one.plus(Step(0, 0, 2 * scores / WARP / SCHEDULERS, 0))
    # the output: a rescaling, a conversion, an address and a store per four elements
    around = 2.0 * rows * width / WARP / SCHEDULERS
    return Kernel(rows, keys, one, cut, row["programs"], row["streams"], 2, around, False)
