"""What a measurement must name to be used again: the device it was made on, and the versions of what ran."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def fingerprint(device: torch.device) -> dict[str, object]:
    """The device's name, its threads (0 on a GPU), and the versions of attnfx, PyTorch and Triton."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "versions": {name: _version(name) for name in ("attnfx", "torch", "triton")},
    }


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's own name."""
    if device.type == "cpu":
        return processor()
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else device.type


@lru_cache(maxsize=1)
def processor() -> str:
    """The name that the processor gives itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


@lru_cache(maxsize=8)
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
