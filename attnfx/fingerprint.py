"""Identify the device and the software versions of a measurement, so that it is reused only under the same."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def fingerprint(device: torch.device) -> dict[str, object]:
    """Return the device's name, its threads (0 on a GPU), and the versions of attnfx, PyTorch and Triton."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "versions": {name: version_of(name) or "none" for name in ("attnfx", "torch", "triton")},
    }


def device_name(device: torch.device) -> str:
    """Return the model name of the processor or GPU."""
    if device.type == "cpu":
        return processor()
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else device.type


@lru_cache(maxsize=1)
def processor() -> str:
    """Return the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


@lru_cache(maxsize=8)
def version_of(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
