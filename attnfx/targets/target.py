"""What is known of a device: its rates, its sizes, and where each number is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

from attnfx.errors import OptionError

if TYPE_CHECKING:
    import torch

KINDS = ("cuda", "hip", "cpu")
DTYPES = ("bfloat16", "float16", "tf32", "float32")
# The least and the largest value that a field may have, in its own unit: outside of them a record is mistyped.
RANGES: Mapping[str, tuple[float, float]] = {
    "capability": (0, 2000), "matrix": (1e-6, 1e5), "fp32": (1e-6, 1e4), "exponentials": (1e-4, 1e6),
    "bandwidth": (0.1, 1e5), "memory": (1 << 27, 1 << 50), "l2": (1 << 15, 1 << 36), "l2_bandwidth": (0.1, 1e6),
    "multiprocessors": (1, 10000), "shared_memory": (1 << 13, 1 << 30), "registers": (16, 1 << 24),
    "warps": (1, 1024), "clock": (0.05, 20), "launch": (1e-2, 1e4),
}  # fmt: skip
WHOLE = ("capability", "memory", "l2", "multiprocessors", "shared_memory", "registers", "warps")


@dataclass(frozen=True)
class Target:
    """A device's rates and sizes. Nothing in it is about a model.

    kind               "cuda", "hip" or "cpu"
    capability         90 for compute capability 9.0, or 942 for gfx942; 0 on a CPU
    matrix             dense matrix TFLOP/s by dtype name ("bfloat16", "float16", "tf32", "float32"), float32 sums
    fp32               TFLOP/s of plain float32 arithmetic
    exponentials       10^9 exponentials a second, of the whole device
    bandwidth          GB/s of memory
    memory             bytes
    l2                 bytes of the last shared cache
    l2_bandwidth       GB/s of that cache
    multiprocessors    or cores
    shared_memory      bytes of a multiprocessor (of a core's own last cache on a CPU)
    registers          32-bit registers of a multiprocessor
    warps              that a multiprocessor holds at most (threads of a core on a CPU)
    clock              GHz, that the rates are stated for
    launch             microseconds from one kernel's start to the next
    note               what a reader must know of the numbers as a whole; empty for a record as its sources have it
    sources            field -> where its number is from

    Raises OptionError, with the field's name, for a value that no device has.
    """

    name: str
    kind: str
    capability: int
    matrix: Mapping[str, float] = field(hash=False)
    fp32: float
    exponentials: float
    bandwidth: float
    memory: int
    l2: int
    l2_bandwidth: float
    multiprocessors: int
    shared_memory: int
    registers: int
    warps: int
    clock: float
    launch: float
    note: str = ""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        def refuse(name: str, value: object, wanted: str) -> OptionError:
            return OptionError(f"target {self.name!r}: field {name!r} is {value!r}, expected {wanted}")

        if not isinstance(self.name, str) or not self.name:
            raise OptionError(f"a target's field 'name' is {self.name!r}, expected some text")
        if self.kind not in KINDS:
            raise refuse("kind", self.kind, "one of " + ", ".join(map(repr, KINDS)))
        for name in ("matrix", "sources"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise refuse(name, value, "a table of names and values")
            object.__setattr__(self, name, dict(value))
        for dtype in self.matrix:
            if dtype not in DTYPES:
                raise refuse("matrix", dtype, "dtypes among " + ", ".join(map(repr, DTYPES)))
        if "float32" not in self.matrix:
            raise refuse("matrix", self.matrix, "a rate for 'float32' at least")
        for name, (low, high) in RANGES.items():
            held = getattr(self, name)
            for value in held.values() if name == "matrix" else (held,):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not low <= value <= high or (name in WHOLE and value != int(value)):
                    kind = "a whole number" if name in WHOLE else "a number"
                    raise refuse(name, value, f"{kind} from {low:,.10g} to {high:,.10g} ({UNITS[name]})")

    def rate(self, dtype: str) -> float:
        """Dense matrix TFLOP/s for operands of a dtype (the name without "torch."); TF32 counts as its own dtype. One
        that the matrix unit does not know is computed in float32."""
        return self.matrix.get(dtype, self.matrix["float32"])

    @staticmethod
    def names() -> list[str]:
        """The names of the records that come with attnfx."""
        from attnfx.targets import records

        return sorted(records.records())

    @staticmethod
    def by_name(name: str) -> Target:
        """The record of a device, such as "h100-sxm"; case, spaces, dashes and the vendor's name do not matter.

        Raises OptionError, naming the nearest, for a name that is not known.
        """
        from attnfx.targets import records

        return records.by_name(name)

    @staticmethod
    def from_json(source: str | PathLike[str]) -> Target:
        """A target of one's own: the path of a JSON file, or its text. Its fields are those of this class; only
        `note` and `sources` may be left out.

        Raises OptionError, with the field's name, for a missing, unknown or absurd value.
        """
        from attnfx.targets import records

        return records.from_json(source)

    @staticmethod
    def detect(device: torch.device | str | None = None) -> Target:
        """The device at hand; None is the present GPU, or the CPU where there is none.

        A GPU that has a record gets it, with the memory that it really has; another one gets the rates of the nearest
        architecture, scaled by what its driver says, and `note` says so. A CPU is measured once, in about a second.
        Raises OptionError for a device that is not there or is neither a GPU nor a CPU.
        """
        from attnfx.targets import detection as detect

        return detect.detect(device)


UNITS: Mapping[str, str] = {
    "capability": "90 for 9.0", "matrix": "TFLOP/s", "fp32": "TFLOP/s", "exponentials": "10^9 a second",
    "bandwidth": "GB/s", "memory": "bytes", "l2": "bytes", "l2_bandwidth": "GB/s", "multiprocessors": "of the device",
    "shared_memory": "bytes of a multiprocessor", "registers": "of a multiprocessor", "warps": "of a multiprocessor",
    "clock": "GHz", "launch": "microseconds",
}  # fmt: skip


def numbers() -> tuple[str, ...]:
    """The fields that hold numbers: each needs a source."""
    return tuple(f.name for f in fields(Target) if f.name in RANGES)


def replaced(target: Target, **changes: Any) -> Target:
    """The target with other values, checked again."""
    return Target(**{f.name: getattr(target, f.name) for f in fields(Target)} | changes)
