"""Gives memory that was freed back to the system, where the C library would keep it.

glibc serves blocks of up to 32 MiB from its heap, and before version 2.38 it rarely reuses one that was allocated with
an alignment, as PyTorch's are, for the next of the same size: passes over chunks grow the heap to many times what is
alive.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

STATM = Path("/proc/self/statm")


class Heap:
    """`trim()` between two chunks keeps what the process grows by under about `growth` bytes over what is alive.

    It costs the pages that are touched again: a smaller `growth`, more time. Where the system has no such call, it does
    nothing."""

    def __init__(self, growth: int):
        self.growth = growth
        self.base = _resident() if _malloc_trim() is not None else None

    def trim(self) -> None:
        give_back = _malloc_trim()
        if self.base is None or give_back is None or _resident() - self.base <= self.growth:
            return
        give_back(0)
        self.base = _resident()


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if STATM.exists() else None


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
