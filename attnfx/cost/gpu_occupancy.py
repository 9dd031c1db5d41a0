"""How long a multiprocessor takes for the steps of the programs that it holds: a closed queueing network.

A step (one tile of rows by keys) asks four units of the multiprocessor for cycles: the matrix unit, the
special-function unit, the issue of instructions, and shared memory. Independent streams of steps share the units: while
one stream multiplies, another takes exponentials. With one stream the units' cycles add up; with many the busiest unit
decides; mean value analysis (Reiser and Lavenberg 1980) gives what is between without a fitted constant.

What is a stream: on GPUs whose matrix instructions are issued by single warps (before 9.0), each warp of a scheduler.
Where warp groups hand over whole products (9.0 and later), a program: its groups take turns on the matrix unit step by
step, so that all of them are done at the same time and then take exponentials at the same time, unless a kernel orders
them explicitly, as FlashAttention-3 does (Shah et al. 2024, section 3.1), which makes each group a stream.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from attnfx.targets import Target

SCHEDULERS = 4  # of a multiprocessor, each issues one instruction of a warp per cycle: CUDA programming guide
WARP = 32
SHARED_BYTES = 128  # per cycle of a multiprocessor: 32 banks of 4 bytes, CUDA programming guide
RESERVED = 1024  # bytes of shared memory that the system takes of each program: CUDA programming guide, 8.0 and later
PROGRAMS = 32  # that a multiprocessor holds at most (16 and 24 on some; no kernel here comes near)
# Share of the stated matrix rate that a dense product holds. Single-warp instructions reach it (Sun et al. 2022,
# "Dissecting Tensor Cores via Microbenchmarks"); warp-group products of an H200 measured 769 to 798 of 989 TFLOP/s
# under its power limit; single-warp instructions there have 63% (Luo et al. 2024, arXiv:2402.13499, mma on Hopper).
DENSE, DENSE_GROUPS, SINGLE_ON_GROUPS = 1.0, 0.8, 0.63
# Cycles of a load that misses the first cache: an estimate. Chasing pointers on an idle device takes 470 to 540 (Luo et
# al. 2024, table of memory latency); a busy memory adds waiting. With 500, the published numbers are met as well.
LATENCY = 700
TRIPS = 4  # of them one after the other around a program's loop: key ranges, query, first keys, output


class Step(NamedTuple):
    """Cycles that one step of one program asks of each unit of a multiprocessor."""

    matrix: float
    special: float
    issue: float
    shared: float

    def plus(self, other: Step, share: float = 1.0) -> Step:
        """This and a share of another."""
        (a, b, c, d), (e, f, g, h) = self, other
        return Step(a + share * e, b + share * f, c + share * g, d + share * h)

    def times(self, factor: float) -> Step:
        a, b, c, d = self
        return Step(factor * a, factor * b, factor * c, factor * d)


def warp_groups(target: Target) -> bool:
    """Whether the matrix unit takes whole warp groups' products (wgmma, tcgen05): not the consumer chips of 12.0."""
    return target.kind == "cuda" and 90 <= target.capability < 120


def matrix_rate(target: Target, dtype: str, single_warps: bool = False) -> float:
    """Matrix FLOPs of a multiprocessor in a cycle that products hold; `single_warps`: by mma.sync on any GPU."""
    peak = target.rate(dtype) * 1e3 / (target.multiprocessors * target.clock)
    if not warp_groups(target) or dtype == "float32":
        return peak * DENSE
    return peak * (SINGLE_ON_GROUPS if single_warps else DENSE_GROUPS)


def float_lanes(target: Target) -> float:
    """float32 operations (a multiply-add is one) of a multiprocessor in a cycle: 64 or 128."""
    return target.fp32 * 1e3 / (2 * target.multiprocessors * target.clock)


def occupancy(target: Target, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds; 0 where not one fits. Registers are given out by 8 a thread."""
    threads = WARP * warps
    by_registers = target.registers // (-(-max(registers, 16) // 8) * 8 * threads)
    by_shared = target.shared_memory // (shared + RESERVED)
    return max(0, min(by_registers, by_shared, target.warps // warps, PROGRAMS))


@lru_cache(maxsize=4096)
def cycles(step: Step, streams: int, delay: float = 0.0) -> float:
    """Cycles of the multiprocessor for one step when `streams` streams share it, each of which waits `delay` cycles for
    memory in every step: exact mean value analysis of a closed network with one queue for each unit."""
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
    """Milliseconds of a launch of programs that take these cycles of a multiprocessor at full occupancy.

    `alone` is the cycles of a program that has the multiprocessor for itself, over that share. A program goes to the
    multiprocessor that is free first. What is left over at the end is made of the shortest programs where the longest
    of a head start first; in another order, half of the longest one is waited for.
    """
    left = -programs % target.multiprocessors
    tail = left * shortest / target.multiprocessors
    if not longest_first and longest > shortest:
        tail = max(tail, longest / 2)
    work = programs * mean / target.multiprocessors + tail
    return max(work, longest * alone) / (target.clock * 1e6)
