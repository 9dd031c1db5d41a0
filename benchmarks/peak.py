"""The peak of a call over what was allocated before it, from the allocator's own events.

PyTorch's profiler records every allocation and every release of the CPU allocator in order; the running sum of them is
what the call has taken at each moment. What a kernel takes without the allocator (a thread's stack, a library's own
scratch) is not among them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def events(run: Callable[[], T]) -> tuple[list[int], T]:
    """(bytes of each allocation, negative where it is a release, in order of time; the result of `run`)."""
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
    """The most bytes that are allocated while `run` runs, over those before it; and its result."""
    changes, result = events(run)
    peak = now = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak, result


__all__ = ["events", "peak_over_base"]
