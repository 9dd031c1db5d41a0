"""Simulate PyTorch's caching allocator on a GPU: the bytes it counts as allocated, and the bytes it reserves.

The rules follow c10/cuda/CUDACachingAllocator.cpp. Sizes are rounded up to 512 bytes. A block of at most 1 MiB comes
from a segment of 2 MiB, a block under 10 MiB from a segment of 20 MiB, and a larger block from its own segment, rounded
up to 2 MiB. A request takes the smallest free block that fits, and splits it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from attnfx.memory.liveness import Event

BLOCK, SMALL, SMALL_SEGMENT, LARGE, LARGE_SEGMENT, ROUND = 512, 1 << 20, 2 << 20, 10 << 20, 20 << 20, 2 << 20


def rounded(size: int) -> int:
    return max(BLOCK, -(-size // BLOCK) * BLOCK) if size else 0


@dataclass
class Block:
    """A piece of a segment of the pool for small or large blocks; `before` and `after` are its neighbors."""

    segment: int
    start: int
    size: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None


class Cache:
    """The allocator's state. `allocated` and `reserved` are the current bytes, `peak` and `peak_reserved` the most so
    far. `heads` has the first block of each segment, in the order of their allocation on the device."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak = self.peak_reserved = 0
        self.heads: list[Block] = []
        self.pools: dict[bool, list[tuple[int, int, int, Block]]] = {True: [], False: []}
        self.held: dict[str, list[Block]] = defaultdict(list)  # value -> its blocks

    def replay(self, events: Iterable[Event]) -> Cache:
        """Replay allocations and releases; return the allocator itself."""
        for e in events:
            self.run(e)
        return self

    def run(self, event: Event) -> Block:
        """Allocate or release a value; return its block."""
        held = self.held[event.value]
        if event.bytes > 0:
            held.append(self.take(event.bytes))
            return held[-1]
        self.give(held[-1])
        return held.pop()

    def take(self, size: int) -> Block:
        size = rounded(size)
        small = size <= SMALL
        pool = self.pools[small]
        at = bisect_left(pool, (size, -1, -1))
        if at < len(pool):
            block = pool.pop(at)[3]
            block.free = False
        else:
            length = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND
            self.reserved += length
            self.peak_reserved = max(self.peak_reserved, self.reserved)
            block = Block(len(self.heads), 0, length, small)
            self.heads.append(block)
        rest = block.size - size
        if rest >= BLOCK if small else rest > SMALL:  # should_split
            other = Block(block.segment, block.start + size, rest, small, True, block, block.after)
            if block.after is not None:
                block.after.before = other
            block.after, block.size = other, size
            self._keep(other)
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def give(self, block: Block) -> None:
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                self.pools[block.small].remove((other.size, other.segment, other.start, other))
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        block.free = True
        self._keep(block)

    def _keep(self, block: Block) -> None:
        insort(self.pools[block.small], (block.size, block.segment, block.start, block), key=lambda e: e[:3])
