"""Describe the devices to decide for: a present device by detection, an absent one by the name of its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnfx.targets.target import Target

if TYPE_CHECKING:
    import torch


def detect(device: torch.device | str | None = None) -> Target:
    """Return the target of a present device; None means the current GPU, or the CPU on a machine without one.

    A GPU with a record gets that record, with its actual memory. Another GPU gets the rates of the nearest
    architecture, scaled by values from its driver, and `note` states this. A CPU is measured once, in about a second.
    Raises OptionError for a device that is absent or is neither a GPU nor a CPU.
    """
    from attnfx.targets.detection import detect

    return detect(device)


__all__ = ["Target", "detect"]
