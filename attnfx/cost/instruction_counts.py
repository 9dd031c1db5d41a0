"""Read the instruction counts of the flash kernels' machine code, a table of `benchmarks/machine_code.py table`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).with_name("instructions.json")
SMALL, OF_SMALL = 86, (86, 89, 120, 121)  # these use the tiles compiled for 8.6, as in kernels/flash/host/tiles.py


@dataclass(frozen=True)
class Loop:
    """Instructions of one warp in one step, a tile of rows by keys.

    instructions  all instructions issued
    matrix        for the matrix unit
    special       for the special-function unit, mostly exponentials
    float         of float32 arithmetic
    loads         from shared memory (and of spilled registers), at most 16 bytes a thread
    stores        to shared memory
    """

    instructions: float
    matrix: float
    special: float
    float: float
    loads: float
    stores: float


@dataclass(frozen=True)
class Code:
    """One kernel compiled for one architecture, head width and tile.

    tile       rows, keys, warps, stages
    registers  per thread
    shared     bytes of shared memory per program
    total      instructions of the whole kernel
    full       the loop over tiles without masked scores
    checked    the loop that tests bounds, without the mask's own instructions
    """

    kernel: str
    capability: int
    width: int
    tile: tuple[int, int, int, int]
    registers: int
    shared: int
    total: int
    full: Loop
    checked: Loop

    @property
    def scores(self) -> int:
        """Return the number of scores that a warp holds at once."""
        return self.tile[0] * self.tile[1] // self.tile[2]


@lru_cache
def _table() -> list[Code]:
    return [
        Code(**row | dict(tile=tuple(row["tile"]), full=Loop(**row["full"]), checked=Loop(**row["checked"])))
        for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    ]


@lru_cache
def codes(kernel: str, capability: int, width: int) -> tuple[Code, ...]:
    """Return a kernel's compiled tiles for a compute capability and head width, the kernels' own default first. The
    kernel is "forward", "keys", "rows" or "decode"; the first three also with " loads" or " dropout". A width that is
    not in the table takes the next larger one."""
    known = {row.capability for row in _table() if row.kernel == kernel}
    arch = SMALL if capability in OF_SMALL else max((c for c in known if c <= capability and c != SMALL), default=80)
    rows = [row for row in _table() if (row.kernel, row.capability) == (kernel, arch)]
    widths = sorted({row.width for row in rows})
    nearest = next((w for w in widths if w >= width), widths[-1])
    return tuple(row for row in rows if row.width == nearest)
