"""Parse and format sizes in bytes, and convert a user's memory budget to bytes on a device."""

from __future__ import annotations

import re

from attnfx.errors import OptionError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
WANTED = "Valid values: bytes, a size such as '16GiB', a fraction of the device's memory such as 0.8, 'auto', or None"
NEAR = re.compile(r"\W*(\d+(?:\.\d+)?)\s*([KMGT])", re.IGNORECASE)
MOST = 1 << 60  # bytes; no device has more


def size(value: str) -> int | None:
    """Return the bytes of a size such as "16GiB", or None if the text is not a size."""
    found = _SIZE.fullmatch(value.strip())
    return None if found is None else round(float(found[1]) * _UNITS[(found[2] or "").lower()])


def _wanted(value: object) -> str:
    """Return the end of an error's sentence: the size that a user may have meant, if any, and the valid values."""
    found = NEAR.match(value) if isinstance(value, str) else None
    meant = f"; did you mean '{found[1]}{found[2].upper()}iB'?" if found and float(found[1]) else "."
    return f"{meant} {WANTED}"


def check(source: str, value: object) -> int | float | str | None:
    """Return a budget as a number of bytes, a fraction, "auto" or None. Raises OptionError for anything else."""
    if value is None or value == "auto":
        return value  # pyright: ignore[reportReturnType]
    wanted = _wanted(value)
    if isinstance(value, str):
        found = size(value)
        if found is None:
            raise OptionError(f"{source}: {value!r} is not valid{wanted}")
        value = found
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{source}: {value!r} is not valid{wanted}")
    if isinstance(value, float) and 1 < value < MOST and value == int(value):
        value = int(value)
    if value > MOST:
        raise OptionError(f"{source}: {value!r} bytes are more than any device has{wanted}")
    if value <= 0:
        raise OptionError(f"{source}: {value!r} is not a positive budget{wanted}")
    if isinstance(value, float) and not 0 < value <= 1:
        raise OptionError(f"{source}: {value!r} is neither a whole number of bytes nor a fraction up to 1{wanted}")
    return value


def in_bytes(budget: int | float | str, total: int, free: int, device: str) -> int:
    """Return the bytes of a budget on a device with `total` bytes of memory, `free` of them available. Raises
    OptionError if the budget is more than the total."""
    if budget == "auto":
        return free
    if isinstance(budget, float):
        return int(budget * total)
    assert isinstance(budget, int)
    if budget > total:
        raise OptionError(f"memory_budget: {text(budget)} is more than the memory of {device}, {text(total)}")
    return budget


def text(of: float) -> str:
    """Format bytes for reading: "3.42 GiB"."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(of) >= bytes_:
            return f"{of / bytes_:.2f} {unit}"
    return f"{of:.0f} B"
