"""Measure the peak memory of a call beyond the memory allocated before it, from the allocator's own events.

PyTorch's profiler records all allocations and releases of the CPU allocator in order. Their running sum is the memory
that the call holds at each moment. Memory that kernels obtain elsewhere (a thread's stack, a library's own scratch) is
not included.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def events(run: Callable[[], T]) -> tuple[list[int], T]:
    """Run `run`, and return the bytes of its allocations in order (negative for releases), and its result."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = run()
    finally:
        gc.enable()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    found = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    found = [e for e in found if e.device_type() == torch.autograd.DeviceType.CPU and e.nbytes()]
    return [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())], result


def peak_over_base(run: Callable[[], T]) -> tuple[int, T]:
    """Return the peak of the bytes allocated while `run` runs, minus those allocated before, and its result."""
    changes, result = events(run)
    peak = now = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak, result


__all__ = ["events", "peak_over_base"]
