"""Predict the time of a step's kernels on a target by the roofline model: the longer of arithmetic and traffic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attnfx.memory.liveness import Phase
from attnfx.targets import Target

# Shares of the peak rates that library kernels reach; attnfx/cost/gpu_library.py has such shares for attention.
PRODUCTS, COPY = 0.6, 0.85


def roofline_ms(flops: float, moved: float, dtype: str, target: Target) -> float:
    """Return the milliseconds for `flops` operations and `moved` bytes: the longer of the two, plus a launch."""
    arithmetic = flops / (PRODUCTS * target.rate(dtype) * 1e9)
    traffic = moved / (COPY * target.bandwidth * 1e6)
    return max(arithmetic, traffic) + target.launch / 1e3


def step_ms(phases: Iterable[Phase], sizes: Mapping[str, int], target: Target) -> float:
    """Return the milliseconds of all phases' kernels; `sizes` has the bytes of the inputs."""
    total, known = 0.0, dict(sizes)
    for phase in phases:
        known |= phase.arrives
        for k in phase.kernels:
            known |= {w.name: w.bytes for w in k.writes}
            moved = sum(known.get(r, 0) for r in k.reads) + sum(w.bytes for w in k.writes)
            total += roofline_ms(k.flops, moved, k.dtype, target)
    return total
