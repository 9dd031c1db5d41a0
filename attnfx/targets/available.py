"""Return the target of a present device, and the memory that this process can still allocate on it."""

from __future__ import annotations

import torch

from attnfx.errors import OptionError
from attnfx.targets.detection import detect
from attnfx.targets.target import Target


def detected(device: torch.device | str | None) -> Target:
    """Return the target of a present device; a busy CPU may measure out of range, so detection is repeated."""
    for _ in range(3):
        try:
            return detect(device)
        except OptionError:
            if torch.device(device or "cpu").type != "cpu":
                raise
    return detect(device)


def free_on(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device, or None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def free_bytes(target: Target, device: torch.device | None = None) -> int:
    """Return the bytes that this process can still allocate on the present device, or the target's memory if unknown.
    `device` selects one of several GPUs; None means the current one."""
    if target.kind == "cpu":
        device = torch.device("cpu")
    elif not torch.cuda.is_available():
        return target.memory
    free = free_on(device or torch.device("cuda"))
    return target.memory if free is None else free
