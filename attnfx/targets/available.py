"""The device at hand: its record, and what of its memory this process can still have."""

from __future__ import annotations

import torch

from attnfx.errors import OptionError
from attnfx.targets import Target


def detected(device: torch.device | str | None) -> Target:
    """The record of the device at hand. A busy CPU may be measured out of all bounds once."""
    for _ in range(3):
        try:
            return Target.detect(device)
        except OptionError:
            if torch.device(device or "cpu").type != "cpu":
                raise
    return Target.detect(device)


def free_bytes(target: Target, device: torch.device | None = None) -> int:
    """What this process can still have of the device at hand; of several GPUs, of `device`, None for the current."""
    if target.kind == "cpu":
        try:
            with open("/proc/meminfo", encoding="utf-8") as file:
                lines = dict(line.split(":", 1) for line in file)
            return int(lines["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError):
            return target.memory
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return target.memory


__all__ = ["detected", "free_bytes"]
