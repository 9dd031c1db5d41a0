"""Describe a device by its rates and sizes, each number with its source, and read the records of known devices."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from attnfx.errors import OptionError
from attnfx.targets.sdpa_dispatch import ASSUMED, IMPLEMENTATIONS

FOLDER = Path(__file__).with_name("records")
_VENDORS = re.compile(r"\b(nvidia|amd|tesla|geforce|instinct|radeon)\b")
KINDS = ("cuda", "hip", "cpu")
DTYPES = ("bfloat16", "float16", "tf32", "float32")
# Least and largest value of each field, in its own unit: a record with a value outside is mistyped.
RANGES: Mapping[str, tuple[float, float]] = {
    "capability": (0, 2000), "matrix": (1e-6, 1e5), "fp32": (1e-6, 1e4), "exponentials": (1e-4, 1e6),
    "bandwidth": (0.1, 1e5), "memory": (1 << 27, 1 << 50), "l2": (1 << 15, 1 << 36), "l2_bandwidth": (0.1, 1e6),
    "multiprocessors": (1, 10000), "shared_memory": (1 << 13, 1 << 30), "registers": (16, 1 << 24),
    "warps": (1, 1024), "clock": (0.05, 20), "launch": (1e-2, 1e4),
}  # fmt: skip
WHOLE = ("capability", "memory", "l2", "multiprocessors", "shared_memory", "registers", "warps")


@dataclass(frozen=True)
class Target:
    """A device's memory, bandwidth and compute rates, independent of any model.

    name               the record's name, such as "h100-sxm"; for a device without a record, the device's own name
    kind               "cuda", "hip" or "cpu"
    capability         90 for compute capability 9.0, or 942 for gfx942; 0 on a CPU
    matrix             dense matrix TFLOP/s by dtype name ("bfloat16", "float16", "tf32", "float32"), float32 sums
    fp32               TFLOP/s of plain float32 arithmetic
    exponentials       10^9 exponentials a second, of the whole device
    bandwidth          GB/s of memory
    memory             bytes of memory
    l2                 bytes of the last shared cache
    l2_bandwidth       GB/s of the last shared cache
    multiprocessors    number of multiprocessors, or of cores
    shared_memory      bytes of a multiprocessor (of a core's own last cache on a CPU)
    registers          32-bit registers of a multiprocessor
    warps              most warps on a multiprocessor (threads of a core on a CPU)
    clock              GHz at which the rates are stated
    launch             microseconds from one kernel's start to the next
    cudnn              version of cuDNN, 92000 for 9.20, if PyTorch prefers its kernel; 0 if it prefers none
    flash_attention    the implementation of FlashAttention that is active in PyTorch: "FA2" (its own), "FA3" or "FA4"
    note               a remark on the numbers as a whole; empty for a record that follows its sources
    sources            field -> source of its number

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
    cudnn: int = ASSUMED
    flash_attention: str = "FA2"
    note: str = ""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        def refuse(name: str, value: object, wanted: str) -> OptionError:
            return OptionError(f"target {self.name!r}: field {name!r} is {value!r}, expected {wanted}")

        if not isinstance(self.name, str) or not self.name:
            raise OptionError(f"a target's field 'name' is {self.name!r}, expected a non-empty string")
        if self.kind not in KINDS:
            raise refuse("kind", self.kind, "one of " + ", ".join(map(repr, KINDS)))
        if not isinstance(self.cudnn, int) or isinstance(self.cudnn, bool) or self.cudnn < 0:
            raise refuse("cudnn", self.cudnn, "a version as a whole number, such as 92000 for 9.20, or 0")
        if self.flash_attention not in IMPLEMENTATIONS:
            raise refuse("flash_attention", self.flash_attention, "one of " + ", ".join(map(repr, IMPLEMENTATIONS)))
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
        """Return the dense matrix TFLOP/s for operands of a dtype, by its name without "torch.". TF32 counts as its own
        dtype. A dtype that the matrix unit does not support is computed in float32."""
        return self.matrix.get(dtype, self.matrix["float32"])

    @staticmethod
    def names() -> list[str]:
        """Return the names of the records that come with attnfx."""
        return sorted(records())

    @staticmethod
    def by_name(name: str) -> Target:
        """Return the record of a device, such as "h100-sxm"; ignores case, spaces, dashes and the vendor's name.

        Raises OptionError, which names the nearest record, for an unknown name.
        """
        found = aliases().get(key(name))
        if found is None:
            raise OptionError(
                f"unknown target {name!r}; did you mean {nearest(name)!r}? Valid targets: "
                f"{', '.join(Target.names())}, or the path of a JSON file"
            )
        return found

    @staticmethod
    def from_json(source: str | PathLike[str]) -> Target:
        """Create a custom target from the path of a JSON file, or from JSON text.

        It has the fields of this class; `cudnn`, `flash_attention`, `note` and `sources` are optional.

        Raises OptionError, with the field's name, for a missing, unknown or absurd value, and for a file that cannot be
        read or is not JSON.
        """
        text = fspath(source)
        where = "the target's JSON text"
        if not text.lstrip().startswith("{"):
            where = repr(text)
            try:
                text = Path(text).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as problem:
                raise OptionError(f"the target's file {where} cannot be read: {problem}") from problem
        try:
            data = json.loads(text)
        except ValueError as problem:
            raise OptionError(f"{where} is not valid JSON: {problem}") from problem
        if not isinstance(data, dict):
            raise OptionError(f"{where} does not contain a JSON object with a target's fields")
        return _target(data, where)


UNITS: Mapping[str, str] = {
    "capability": "90 for 9.0", "matrix": "TFLOP/s", "fp32": "TFLOP/s", "exponentials": "10^9 a second",
    "bandwidth": "GB/s", "memory": "bytes", "l2": "bytes", "l2_bandwidth": "GB/s", "multiprocessors": "of the device",
    "shared_memory": "bytes of a multiprocessor", "registers": "of a multiprocessor", "warps": "of a multiprocessor",
    "clock": "GHz", "launch": "microseconds",
}  # fmt: skip


def replaced(target: Target, **changes: Any) -> Target:
    """Return the target with some fields replaced and checked again."""
    return Target(**{f.name: getattr(target, f.name) for f in fields(Target)} | changes)


# -- the records that come with attnfx --------------------------------------------------------------
def key(name: str) -> str:
    """Normalize a device's name: remove case, spaces, dashes and the vendor."""
    return re.sub(r"[^a-z0-9]", "", _VENDORS.sub("", re.sub(r"[-_\s]+", " ", name.lower())))


@lru_cache
def records() -> Mapping[str, Target]:
    """Return the records by name."""
    return {made.name: made for made, _ in _read()}


@lru_cache
def aliases() -> Mapping[str, Target]:
    """Return the records by every name and alias, normalized by `key`."""
    return {key(name): made for made, others in _read() for name in (made.name, *others)}


@lru_cache
def _read() -> tuple[tuple[Target, tuple[str, ...]], ...]:
    found = []
    for file in sorted(FOLDER.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        found.append((_target(data, str(file)), tuple(data.get("aliases", ()))))
    return tuple(found)


def nearest(name: str) -> str:
    """Return the name of the record with the most similar name or alias."""

    def alike(entry: tuple[str, Target]) -> float:
        return difflib.SequenceMatcher(None, key(name), entry[0]).ratio()

    return max(aliases().items(), key=alike)[1].name


def _target(data: Mapping[str, Any], where: str) -> Target:
    given = {name: value for name, value in data.items() if name != "aliases"}
    known = [f.name for f in fields(Target)]
    for name in given:
        if name not in known:
            close = max(known, key=lambda k: difflib.SequenceMatcher(None, name, k).ratio())
            raise OptionError(f"{where}: unknown field {name!r} of a target; did you mean {close!r}?")
    for f in fields(Target):
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise OptionError(f"{where}: the field {f.name!r} of the target is missing")
    return Target(**given)
