"""The GPU at hand: its compute capability."""

from __future__ import annotations

import torch


def capability(device: torch.device) -> int:
    """The compute capability as a number, 90 for 9.0; 0 for what is no NVIDIA GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


__all__ = ["capability"]
