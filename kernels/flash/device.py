"""The GPU at hand: its compute capability, and its rates as the driver tells them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import TypeVar

import torch

from attnfx.cost.gpu import Gpu

T = TypeVar("T")


def lasting(make: Callable[[], T], device: torch.device) -> T:
    """What `make` gives: tensors on the device that outlive the call.

    With mode="reduce-overhead" torch.compile gives a thread that warms up or captures a CUDA graph memory of the
    graph's own, and refuses what is found to live on there. So another thread allocates them.
    """
    if device.type != "cuda":
        return make()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def capability(device: torch.device) -> int:
    """The compute capability as a number, 90 for 9.0; 0 for what is no NVIDIA GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def rates(device: torch.device) -> Gpu | None:
    """What the cost model knows of a device; None for what is no NVIDIA GPU, and where there is none to ask."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return None
    if not torch.cuda.is_available():
        return None
    return _rates(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _rates(index: int) -> Gpu:
    from triton.runtime import driver

    found = driver.active.utils.get_device_properties(index)  # type: ignore[attr-defined]
    return Gpu(
        capability=capability(torch.device("cuda", index)),
        multiprocessors=found["multiprocessor_count"],
        clock=found["sm_clock_rate"] / 1e6,  # kHz
        bandwidth=2 * found["mem_clock_rate"] * found["mem_bus_width"] / 8 / 1e6,  # two transfers a cycle, kHz and bits
    )


__all__ = ["capability", "lasting", "rates"]
