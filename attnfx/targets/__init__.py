"""Devices to decide for: measured on a present one, or a record by name for an absent one."""

from attnfx.targets.target import Target

__all__ = ["Target"]
