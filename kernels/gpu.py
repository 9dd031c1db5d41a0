"""The GPU at hand: its compute capability, and what a CUDA graph that is being captured asks of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

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


def capturing() -> bool:
    """Whether this thread captures a CUDA graph, in which nothing can be compiled and the host can wait for nothing."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def capability(device: torch.device) -> int:
    """The compute capability as a number, 90 for 9.0; 0 for what is no NVIDIA GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
