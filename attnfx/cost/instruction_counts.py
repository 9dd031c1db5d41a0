"""Read the instruction counts of the flash kernels' machine code, a table of `benchmarks/machine_code.py table`."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("instructions.json")
KERNELS = Path(__file__).parent.parent / "kernels" / "flash"
# The kernels and the tile functions that they call. Score programs are generated, so their part is counted separately.
SOURCES = (
    "triton/forward.py", "triton/backward.py", "triton/backward_keys.py", "triton/backward_rows.py", "triton/decode.py",
    "host/tiles.py",
)  # fmt: skip
HELPERS = "triton/functions.py"
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
def _table() -> Mapping[tuple[str, int], tuple[Code, ...]]:
    found: dict[tuple[str, int], list[Code]] = {}
    for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]:
        made = Code(**row | dict(tile=tuple(row["tile"]), full=Loop(**row["full"]), checked=Loop(**row["checked"])))
        found.setdefault((made.kernel, made.capability), []).append(made)
    return {key: tuple(rows) for key, rows in found.items()}


@lru_cache
def codes(kernel: str, capability: int, width: int) -> tuple[Code, ...]:
    """Return a kernel's compiled tiles for a compute capability and head width, the kernels' own default first. The
    kernel is "forward", "keys", "rows" or "decode"; the first three also with " loads" or " dropout". A width that is
    not in the table takes the next larger one."""
    known = [c for k, c in _table() if k == kernel]
    arch = SMALL if capability in OF_SMALL else max((c for c in known if c <= capability and c != SMALL), default=80)
    rows = _table()[kernel, arch]
    widths = sorted({row.width for row in rows})
    nearest = next((w for w in widths if w >= width), widths[-1])
    return tuple(row for row in rows if row.width == nearest)


def fingerprint(folder: Path = KERNELS) -> str:
    """Hash the sources of the machine code: the kernels' syntax trees without docstrings, and the tile tables."""
    trees = {name: ast.parse((folder / name).read_text(encoding="utf-8")) for name in (*SOURCES, HELPERS)}
    helpers = {n.name: n for n in trees.pop(HELPERS).body if isinstance(n, ast.FunctionDef)}
    parts = [n for tree in trees.values() for n in tree.body if isinstance(n, (ast.FunctionDef, ast.Assign))]
    kernels = [n for n in parts if isinstance(n, ast.Assign) or n.decorator_list]
    todo, used = list(kernels), {}
    while todo:
        for n in ast.walk(todo.pop()):
            name = n.attr if isinstance(n, ast.Attribute) else n.id if isinstance(n, ast.Name) else ""
            if name in helpers and name not in used:
                used[name] = helpers[name]
                todo.append(helpers[name])
    texts = [_text(n) for n in (*kernels, *(used[name] for name in sorted(used)))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _text(node: Any) -> str:
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


def recorded() -> str:
    """Return the fingerprint of the kernels from which the table was generated."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["fingerprint"]
