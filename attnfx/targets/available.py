"""The device at hand: its record, and what of its memory this process can still have."""

from __future__ import annotations

import torch

from attnfx.errors import OptionError
from attnfx.targets.detection import detect
from attnfx.targets.target import Target


def detected(device: torch.device | str | None) -> Target:
    """The record of the device at hand. A busy CPU may be measured out of all bounds once."""
    for _ in range(3):
        try:
            return detect(device)
        except OptionError:
            if torch.device(device or "cpu").type != "cpu":
                raise
    return detect(device)


def free_on(device: torch.device) -> int | None:
    """Bytes that this process can still have on a device; None where it does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def free_bytes(target: Target, device: torch.device | None = None) -> int:
    """What this process can still have of the device at hand; of several GPUs, of `device`, None for the current. The
    target's whole memory where nothing is known."""
    if target.kind == "cpu":
        device = torch.device("cpu")
    elif not torch.cuda.is_available():
        return target.memory
    free = free_on(device or torch.device("cuda"))
    return target.memory if free is None else free
