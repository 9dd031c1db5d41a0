"""Tables of tile shapes, warps and stages by architecture and head dim, with the source of each row.

"probe" marks rows chosen from the machine code of ahead-of-time compilation (benchmarks/machine_code.py, counts and
spills): the main loop does not spill, and its instructions per FLOP are the fewest among the shapes tried. No tile was
timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch

from attnfx.kernels.gpu import capability
from attnfx.spec import AttentionSpec, reads_pairs

Row = TypeVar("Row")


class Tile(NamedTuple):
    """The rows and keys of one tile, the warps of a program, and the pipeline stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


# Chips with sm_80's instructions but only 99 KiB of shared memory per program (CUDA programming guide, technical
# specifications by compute capability) have their own rows.
SMALL = 86
OF_SMALL = (86, 89, 120, 121)

# Key: (compute capability, head dim padded to a power of two). A device uses the largest capability up to its own, a
# head dim the next row of at least its width.
FORWARD = {
    (90, 64): Tile(128, 64, 4, 3),  # probe
    (90, 128): Tile(128, 128, 8, 2),  # probe
    (90, 256): Tile(128, 64, 8, 2),  # probe
    (80, 64): Tile(128, 64, 4, 3),  # probe
    (80, 128): Tile(128, 64, 8, 3),  # probe
    (80, 256): Tile(64, 32, 4, 2),  # probe
    (100, 64): Tile(128, 64, 8, 2),  # probe
    (100, 128): Tile(128, 64, 8, 2),  # probe
    (100, 256): Tile(128, 64, 8, 2),  # probe
    (SMALL, 64): Tile(128, 64, 4, 2),  # probe
    (SMALL, 128): Tile(128, 32, 8, 2),  # probe
    (SMALL, 256): Tile(64, 32, 4, 2),  # probe
}
# A load by row and key, or dropout's random bits, need registers in addition to the scores. These tables give a thread
# fewer scores if the registers would not suffice.
FORWARD_LOADS = FORWARD | {
    (80, 64): Tile(128, 64, 8, 3),  # probe
    (80, 128): Tile(128, 32, 8, 3),  # probe
}
FORWARD_DROPOUT = FORWARD_LOADS | {
    (90, 64): Tile(128, 64, 8, 3),  # probe
    (90, 128): Tile(128, 64, 8, 2),  # probe
    (80, 256): Tile(64, 32, 8, 2),  # probe
}
# For float32 inputs on any chip: twice the bytes, and without matrix instructions of that width.
SINGLE = {(80, 64): Tile(64, 32, 4, 2), (80, 128): Tile(32, 32, 4, 2), (80, 256): Tile(16, 32, 4, 1)}  # probe
SINGLE_BACKWARD = {(80, 128): Tile(32, 32, 4, 1), (80, 256): Tile(16, 16, 4, 1)}  # probe
PLAIN = AttentionSpec()
INTERPRETED = Tile(32, 32, 1, 1)
LEAST = Tile(16, 16, 1, 1)


def pick(table: dict[tuple[int, int], Row], capability: int, width: int) -> Row:
    """Return a table's row for a GPU of this compute capability (90 for 9.0) and a head dim padded to `width`."""
    if capability in OF_SMALL:
        arch = SMALL
    else:
        arch = max((key[0] for key in table if key[0] <= capability and key[0] != SMALL), default=80)
    dims = sorted(key[1] for key in table if key[0] == arch)
    return table[arch, next((d for d in dims if d >= width), dims[-1])]


def forward_table(spec: AttentionSpec) -> dict[tuple[int, int], Tile]:
    return FORWARD_DROPOUT if spec.random else FORWARD_LOADS if reads_pairs(spec) else FORWARD


def backward_table(spec: AttentionSpec) -> dict[tuple[int, int], tuple[Tile, Tile]]:
    return BACKWARD_DROPOUT if spec.random else BACKWARD_LOADS if reads_pairs(spec) else BACKWARD


def _and_smaller(first: Row, others: Iterable[Row], size: Callable[[Row], int]) -> list[Row]:
    """List a row of a table and then smaller rows from `others`, in decreasing size."""
    out = [first]
    for row in sorted(others, key=size, reverse=True):
        if size(row) < size(out[-1]):
            out.append(row)
    return out


def _size(tile: Tile) -> int:
    return tile.rows + tile.keys * tile.stages


def _sizes(tiles: tuple[Tile, Tile]) -> int:
    return max(_size(tiles[0]), _size(tiles[1]))


def _tried(device: torch.device, chosen: Tile | None, first: Tile, others: Iterable[Tile]) -> list[Tile]:
    """List the tiles of a kernel in the order of trial. On a GPU, `chosen` comes before the table's."""
    if device.type != "cuda":
        return [INTERPRETED, LEAST]
    table = _and_smaller(first, others, _size)
    return table if chosen is None else [chosen, *(tile for tile in table if tile != chosen)]


def forward_tiles(
    device: torch.device, dtype: torch.dtype, width: int, chosen: Tile | None = None, spec: AttentionSpec = PLAIN
) -> list[Tile]:
    """List the tiles to try for the forward kernel: the table's for a head dim padded to `width`, then smaller ones. On
    a GPU, `chosen` comes first."""
    if dtype == torch.float32:
        return _tried(device, chosen, pick(SINGLE, 80, width), SINGLE.values())
    first = pick(forward_table(spec), capability(device), width)
    return _tried(device, chosen, first, [*FORWARD.values(), *SINGLE.values()])


# The tile of the pass over keys, then of the pass over rows.
BACKWARD = {
    (90, 64): (Tile(64, 64, 4, 2), Tile(64, 128, 4, 2)),  # probe
    (90, 128): (Tile(64, 128, 8, 2), Tile(128, 128, 8, 2)),  # probe
    (90, 256): (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),  # probe
    (80, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),  # probe
    (80, 128): (Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),  # probe
    (80, 256): (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),  # probe
    (100, 64): (Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),  # probe
    (100, 128): (Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),  # probe
    (100, 256): (Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)),  # probe
    (SMALL, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),  # probe
    (SMALL, 128): (Tile(32, 64, 4, 2), Tile(128, 32, 8, 2)),  # probe
    (SMALL, 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),  # probe
}

BACKWARD_LOADS = BACKWARD | {
    (90, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),  # probe
    (90, 128): (Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),  # probe
    (90, 256): (Tile(64, 32, 8, 2), Tile(64, 64, 8, 2)),  # probe
    (80, 64): (Tile(32, 64, 4, 2), Tile(64, 64, 4, 2)),  # probe
}
BACKWARD_DROPOUT = BACKWARD_LOADS | {
    (90, 64): (Tile(32, 64, 4, 2), Tile(64, 64, 4, 2)),  # probe
    (90, 256): (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),  # probe
    (80, 256): (Tile(32, 64, 8, 2), Tile(64, 32, 8, 2)),  # probe
    (80, 64): (Tile(32, 128, 8, 2), Tile(64, 64, 4, 2)),  # probe
    (100, 64): (Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),  # probe
    (100, 128): (Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),  # probe
}


def backward_tiles(
    device: torch.device, dtype: torch.dtype, width: int, spec: AttentionSpec = PLAIN
) -> list[tuple[Tile, Tile]]:
    """List the pairs of tiles to try for the passes over keys and over rows, the table's first, then smaller ones."""
    if device.type != "cuda":
        return [(INTERPRETED, INTERPRETED), (LEAST, LEAST)]
    single = [(tile, tile) for tile in SINGLE_BACKWARD.values()]
    if dtype == torch.float32:
        tile = pick(SINGLE_BACKWARD, 80, width)
        return _and_smaller((tile, tile), single, _sizes)
    first = pick(backward_table(spec), capability(device), width)
    return _and_smaller(first, [*BACKWARD.values(), *single], _sizes)


# `rows` is replaced by the queries of one group of heads.
DECODE = {
    (80, 64): Tile(16, 128, 4, 3),  # probe
    (80, 128): Tile(16, 64, 4, 3),  # probe
    (80, 256): Tile(16, 32, 4, 2),  # probe
    (SMALL, 64): Tile(16, 128, 4, 2),  # probe
    (SMALL, 128): Tile(16, 64, 4, 2),  # probe
    (SMALL, 256): Tile(16, 32, 4, 2),  # probe
    (90, 64): Tile(16, 128, 4, 3),  # probe
    (90, 128): Tile(16, 128, 4, 3),  # probe
    (90, 256): Tile(16, 64, 4, 3),  # probe
}


def decode_tiles(device: torch.device, dtype: torch.dtype, width: int, chosen: Tile | None = None) -> list[Tile]:
    """List the tiles to try for the decode kernel: the table's for a head dim padded to `width`, then smaller ones. On
    a GPU, `chosen` comes first."""
    if dtype == torch.float32:
        first = Tile(16, 32 if width <= 128 else 16, 4, 2)
    else:
        first = pick(DECODE, capability(device), width)
    return _tried(device, chosen, first, [*DECODE.values(), LEAST._replace(warps=4)])
