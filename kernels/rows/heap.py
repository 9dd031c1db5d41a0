"""Return freed memory to the system if the C library would keep it.

glibc serves blocks of up to 32 MiB from its heap. PyTorch allocates with an alignment, and before version 2.38 glibc
rarely reuses such a block for the next one of the same size. A pass over chunks can therefore grow the heap to many
times the size of the live tensors.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

STATM = Path("/proc/self/statm")


class Heap:
    """A limit on the heap's growth: `trim()` between chunks keeps freed memory below about `growth` bytes. Trimmed
    pages fault again at their next use, so a smaller `growth` costs more time. It has no effect on systems without
    `malloc_trim`."""

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
    """Return the resident memory of this process in bytes."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
