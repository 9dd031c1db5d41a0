"""Tile shapes, warps and stages by architecture and head dim: a table with a source for each row.

"probe" is the machine code of ahead-of-time compilation (benchmarks/sass.py): no spill in the steady loop and the
fewest instructions per FLOP among the shapes that were tried. None of these was timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

Row = TypeVar("Row")


class Tile(NamedTuple):
    """Rows and keys of one tile, warps of a program, and stages of its loads' pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# (compute capability, head dim padded to a power of two): the first row whose capability is not above the device's
FORWARD = {
    (90, 32): Tile(128, 64, 4, 3),  # as 64
    (90, 64): Tile(128, 64, 4, 3),  # probe
    (90, 128): Tile(128, 128, 8, 2),  # probe
    (90, 256): Tile(128, 64, 8, 2),  # probe
    (80, 32): Tile(128, 64, 4, 3),  # as 64
    (80, 64): Tile(128, 64, 4, 3),  # probe
    (80, 128): Tile(128, 64, 8, 3),  # probe
    (80, 256): Tile(64, 32, 4, 2),  # shared memory of 99 KiB on sm_86 and sm_89
}
SINGLE = Tile(64, 32, 4, 2)  # float32 inputs: twice the bytes, and no matrix instructions of that width
INTERPRETED = Tile(32, 32, 1, 1)


def pick(table: dict[tuple[int, int], Row], capability: int, width: int) -> Row:
    fitting = [key for key in table if key[0] <= capability] or [key for key in table if key[0] == 80]
    arch = max(key[0] for key in fitting)
    dims = sorted(key[1] for key in table if key[0] == arch)
    return table[arch, next((d for d in dims if d >= width), dims[-1])]


def forward_tile(device: torch.device, dtype: torch.dtype, width: int) -> Tile:
    """The tile of the forward kernel for a head dim padded to `width`."""
    if device.type != "cuda":
        return INTERPRETED
    if dtype == torch.float32:
        return SINGLE
    major, minor = torch.cuda.get_device_capability(device)
    return pick(FORWARD, 10 * major + minor, width)


# of the pass over keys, then of the pass over rows
BACKWARD = {
    (90, 32): (Tile(64, 64, 4, 2), Tile(64, 128, 4, 2)),  # as 64
    (90, 64): (Tile(64, 64, 4, 2), Tile(64, 128, 4, 2)),  # probe
    (90, 128): (Tile(64, 128, 8, 2), Tile(128, 128, 8, 2)),  # probe
    (90, 256): (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),  # probe
    (80, 32): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),  # as 64
    (80, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),  # probe
    (80, 128): (Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),  # probe
    (80, 256): (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),  # probe; more than the 99 KiB of sm_86 and sm_89
}


def backward_tiles(device: torch.device, dtype: torch.dtype, width: int) -> tuple[Tile, Tile]:
    """The tiles of the pass over keys and of the pass over rows, for a head dim padded to `width`."""
    if device.type != "cuda":
        return INTERPRETED, INTERPRETED
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)
    major, minor = torch.cuda.get_device_capability(device)
    return pick(BACKWARD, 10 * major + minor, width)


# `rows` is not of the table: it is the queries of one group of heads
DECODE = {
    (80, 64): Tile(16, 128, 4, 3),  # probe
    (80, 128): Tile(16, 64, 4, 3),  # probe
    (80, 256): Tile(16, 32, 4, 2),  # probe
    (90, 64): Tile(16, 128, 4, 3),  # probe
    (90, 128): Tile(16, 128, 4, 3),  # probe
    (90, 256): Tile(16, 64, 4, 3),  # probe
}


def decode_tile(device: torch.device, dtype: torch.dtype, width: int) -> Tile:
    """The tile of the decode kernel for a head dim padded to `width`."""
    if device.type != "cuda":
        return INTERPRETED
    if dtype == torch.float32:
        return Tile(16, 32, 4, 2)
    major, minor = torch.cuda.get_device_capability(device)
    return pick(DECODE, 10 * major + minor, width)
