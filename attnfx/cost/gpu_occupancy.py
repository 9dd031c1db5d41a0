"""Model a multiprocessor that runs the steps of its resident programs as a closed queueing network.

A step (one tile of rows by keys) takes cycles of four units of the multiprocessor: the matrix unit, the
special-function unit, instruction issue, and shared memory. Independent streams of steps share the units: while one
stream multiplies, another computes exponentials. With one stream the units' cycles add up; with many the busiest unit
decides. Between these limits, mean value analysis (Reiser and Lavenberg 1980) needs no fitted constant.

On GPUs whose matrix instructions are issued by single warps (before 9.0), each warp of a scheduler is a stream. On GPUs
whose warp groups issue whole products (9.0 and later), a program is one stream. Its groups take turns on the matrix
unit in each step, so they finish together and then compute exponentials together. A kernel that orders its groups
explicitly, as FlashAttention-3 does (Shah et al. 2024, section 3.1), makes each group a stream.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from attnfx.targets import Target

SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of a warp per cycle: CUDA programming guide
WARP = 32
SHARED_BYTES = 128  # per cycle of a multiprocessor: 32 banks of 4 bytes, CUDA programming guide
RESERVED = 1024  # bytes of shared memory reserved by the system per program: CUDA programming guide, 8.0 and later
PROGRAMS = 32  # most programs on a multiprocessor (16 and 24 on some; no kernel here comes near)
# Share of the stated matrix rate that a dense product reaches. Single-warp instructions reach all of it (Sun et al.
# 2022, "Dissecting Tensor Cores via Microbenchmarks"). Warp-group products of an H200 reached 769 to 798 of 989 TFLOP/s
# under its power limit; single-warp instructions reach 63% on Hopper (Luo et al. 2024, arXiv:2402.13499, mma).
DENSE, DENSE_GROUPS, SINGLE_ON_GROUPS = 1.0, 0.8, 0.63
# Cycles of a load that misses the first cache: an estimate. Pointer chasing on an idle device takes 470 to 540 (Luo et
# al. 2024, table of memory latency); a busy memory adds waiting. With 500, the model fits published numbers as well.
LATENCY = 700
TRIPS = 4  # such loads in sequence around a program's loop: key ranges, query, first keys, output


class Step(NamedTuple):
    """Cycles that one step of one program takes on each unit of a multiprocessor."""

    matrix: float
    special: float
    issue: float
    shared: float

    def plus(self, other: Step, share: float = 1.0) -> Step:
        """Return the sum of this step and a share of another."""
        return Step(*(a + share * b for a, b in zip(self, other)))

    def times(self, factor: float) -> Step:
        return Step(*(factor * a for a in self))


def warp_groups(target: Target) -> bool:
    """Return whether warp groups issue whole products (wgmma, tcgen05); the consumer chips of 12.0 do not."""
    return target.kind == "cuda" and 90 <= target.capability < 120


def matrix_rate(target: Target, dtype: str, single_warps: bool = False) -> float:
    """Return the matrix FLOPs per cycle that products reach on a multiprocessor; with `single_warps`, by mma.sync."""
    peak = target.rate(dtype) * 1e3 / (target.multiprocessors * target.clock)
    if not warp_groups(target) or dtype == "float32":
        return peak * DENSE
    return peak * (SINGLE_ON_GROUPS if single_warps else DENSE_GROUPS)


def float_lanes(target: Target) -> float:
    """Return the float32 operations of a multiprocessor per cycle, 64 or 128; a multiply-add is one."""
    return target.fp32 * 1e3 / (2 * target.multiprocessors * target.clock)


def occupancy(target: Target, warps: int, registers: int, shared: int) -> int:
    """Return how many programs a multiprocessor holds, 0 if none fits; registers come in units of 8 a thread."""
    threads = WARP * warps
    by_registers = target.registers // (-(-max(registers, 16) // 8) * 8 * threads)
    by_shared = target.shared_memory // (shared + RESERVED)
    return max(0, min(by_registers, by_shared, target.warps // warps, PROGRAMS))


@lru_cache(maxsize=4096)
def cycles(step: Step, streams: int, delay: float = 0.0) -> float:
    """Return the multiprocessor's cycles per step if `streams` streams share it. Each stream waits `delay` cycles for
    memory in every step. Computed by exact mean value analysis of a closed network with one queue per unit."""
    waiting = [0.0] * len(step)
    total = 1.0
    for n in range(1, max(streams, 1) + 1):
        times = [d * (1.0 + q) for d, q in zip(step, waiting)]
        total = (sum(times) + delay) / n
        waiting = [t / total for t in times]
    return total


def on_all(
    target: Target, programs: int, mean: float, shortest: float, longest: float, alone: float, longest_first: bool
) -> float:
    """Return the ms of a launch of programs that take these cycles of a multiprocessor at full occupancy.

    `alone` is a program's cycles with a multiprocessor to itself, divided by its cycles at full occupancy. A program
    runs on the first free multiprocessor. If a head's longest programs start first, the tail of the launch consists of
    the shortest programs. In another order, the tail is half of the longest program.
    """
    left = -programs % target.multiprocessors
    tail = left * shortest / target.multiprocessors
    if not longest_first and longest > shortest:
        tail = max(tail, longest / 2)
    work = programs * mean / target.multiprocessors + tail
    return max(work, longest * alone) / (target.clock * 1e6)
