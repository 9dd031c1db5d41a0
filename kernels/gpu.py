"""Query the GPU's compute capability and the state of CUDA graph capture."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
LEAST_CAPABILITY = 80  # of Triton's kernels: the first with asynchronous copies and bfloat16


def lasting(make: Callable[[], T], device: torch.device) -> T:
    """Return the result of `make`: tensors on the device that outlive the call.

    With mode="reduce-overhead", a thread that warms up or captures a CUDA graph allocates from the graph's private
    pool, and torch.compile rejects tensors that stay alive there. So another thread allocates them.
    """
    if device.type != "cuda":
        return make()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def capturing() -> bool:
    """Return whether this thread captures a CUDA graph. During capture, code must not compile or synchronize."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def capability(device: torch.device) -> int:
    """Return the compute capability as an integer, 90 for 9.0; 0 if the device is not an NVIDIA GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def too_old(found: int) -> str | None:
    """Return why Triton's kernels do not run on a GPU of this compute capability, or None."""
    if found < LEAST_CAPABILITY:
        return f"Triton's kernels need compute capability 8.0, and the GPU has {found // 10}.{found % 10}"
    return None
