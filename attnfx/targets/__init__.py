"""Describe the devices to decide for: measured on a present one, or a record by name for an absent one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnfx.targets.target import Target

if TYPE_CHECKING:
    import torch


def detect(device: torch.device | str | None = None) -> Target:
    """The device at hand; None is the present GPU, or the CPU where there is none.

    A GPU that has a record gets it, with the memory that it really has; another one gets the rates of the nearest
    architecture, scaled by what its driver says, and `note` says so. A CPU is measured once, in about a second.
    Raises OptionError for a device that is not there or is neither a GPU nor a CPU.
    """
    from attnfx.targets.detection import detect

    return detect(device)


__all__ = ["Target", "detect"]
