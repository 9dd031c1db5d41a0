"""What is known of a device: its rates, its sizes, and where each number is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """A device's rates and sizes. Nothing in it is about a model.

    kind               "cuda", "hip" or "cpu"
    capability         90 for compute capability 9.0, or 942 for gfx942; 0 on a CPU
    matrix             dense matrix TFLOP/s by dtype name ("bfloat16", "float16", "tf32", "float32")
    fp32               TFLOP/s of plain float32 arithmetic
    exponentials       10^9 exponentials a second, of the whole device
    bandwidth          GB/s of memory
    memory             bytes
    l2                 bytes of the last shared cache
    multiprocessors    or cores
    shared_memory      bytes of a multiprocessor (of a core's own last cache on a CPU)
    registers          32-bit registers of a multiprocessor
    clock              GHz, boost
    launch             microseconds from one kernel's start to the next
    sources            field -> where its number is from
    """

    name: str
    kind: str
    capability: int
    matrix: Mapping[str, float]
    fp32: float
    exponentials: float
    bandwidth: float
    memory: int
    l2: int
    multiprocessors: int
    shared_memory: int
    registers: int
    clock: float
    launch: float
    sources: Mapping[str, str] = field(default_factory=dict)
