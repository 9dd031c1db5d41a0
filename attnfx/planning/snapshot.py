"""Write a plan's timeline as a file for PyTorch's memory viewer, in the format of `torch.cuda.memory._dump_snapshot`.

Addresses are synthetic: blocks are placed as PyTorch's caching allocator would place them, in consecutive segments.
Times are the indices of the events.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from os import PathLike
from typing import Any

from attnfx.memory.allocator import Block, Cache
from attnfx.memory.liveness import Event

START = 1 << 40  # the first segment's address
PROTOCOL = 4  # the latest pickle protocol that the viewer reads

Frames = list[dict[str, Any]]


def snapshot(events: Iterable[Event], path: str | PathLike[str]) -> None:
    """Write the events of a step as a pickle, with the allocations of resident memory before it."""
    recorder = _Recorder()
    recorder.replay(events)
    made = {"segments": recorder.segments(), "device_traces": [recorder.trace], "allocator_settings": {}}
    with open(path, "wb") as file:
        pickle.dump(made, file, protocol=PROTOCOL)


def _frame(name: str, where: str = "") -> dict[str, Any]:
    return {"name": name, "filename": where or "plan", "line": 0}


class _Recorder(Cache):
    """The simulated allocator and the trace that it would record."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[dict[str, Any]] = []
        self.addresses: list[int] = []  # of each segment
        self.known: dict[int, tuple[int, Frames]] = {}  # address -> requested bytes and their frames

    def run(self, event: Event) -> Block:
        before, frames = self.reserved, [_frame(event.value, event.where), _frame(event.phase)]
        block = super().run(event)
        if self.reserved > before:
            self.addresses.append(START + before)
            self._record("segment_alloc", START + before, self.reserved - before, frames)
        address = self._address(block)
        if event.bytes > 0:
            self.known[address] = event.bytes, frames
            self._record("alloc", address, event.bytes, frames)
        else:
            size, _ = self.known.pop(address)
            self._record("free_requested", address, size, frames)
            self._record("free_completed", address, size, frames)
        return block

    def _address(self, block: Block) -> int:
        return self.addresses[block.segment] + block.start

    def _record(self, action: str, address: int, size: int, frames: Frames) -> None:
        entry = {"action": action, "addr": address, "size": size, "stream": 0, "time_us": len(self.trace)}
        self.trace.append({**entry, "frames": frames})

    def segments(self) -> list[dict[str, Any]]:
        """Return the final segments, in the format of `torch.cuda.memory_snapshot`."""
        out = []
        for address, head in zip(self.addresses, self.heads):
            blocks, at = [], head
            while at is not None:
                asked, frames = self.known.get(self._address(at), (0, []))
                blocks.append({
                    "address": self._address(at), "size": at.size, "requested_size": asked,
                    "state": "inactive" if at.free else "active_allocated", "frames": frames,
                })  # fmt: skip
                at = at.after
            active = sum(b["size"] for b in blocks if b["state"] != "inactive")
            total = sum(b["size"] for b in blocks)
            out.append({
                "device": 0, "address": address, "total_size": total, "allocated_size": active, "active_size": active,
                "requested_size": sum(b["requested_size"] for b in blocks), "stream": 0, "is_expandable": False,
                "segment_type": "small" if head.small else "large", "segment_pool_id": (0, 0),
                "frames": [], "blocks": blocks,
            })  # fmt: skip
        return out
