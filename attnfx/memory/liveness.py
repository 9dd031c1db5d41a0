"""When each stored value of a step is allocated and released, and what is alive at each moment.

A phase is one compiled graph: its kernels in the order they run. A value is allocated before the kernel that writes it
and released after the last kernel that reads it or a view of it, so that a kernel's operands and results are alive
together. A loop whose operand dies in it writes its result over the operand, where both are of one size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnfx.memory.fusion import Kernel

WORKSPACE = "workspace of "


@dataclass(frozen=True)
class Phase:
    """One run of a compiled graph.

    name      "forward" or "backward", with a number where there are several graphs
    kernels   in the order they run
    kept      values that stay when it has run: its outputs
    released  values from before that it owns: each is released after its last reader here
    arrives   values that come with its call (the gradients of the outputs); it owns them too
    batched   loops that follow each other run as one function, and what dies in one is released after the last: so
              Inductor compiles them for a CPU (torch/_inductor/codegen/cpp.py, KernelGroup)
    hands_on  what dies waits to be written over by a later value of its size, where that does not raise the peak
    """

    name: str
    kernels: tuple[Kernel, ...]
    kept: frozenset[str]
    released: Mapping[str, int] = field(default_factory=dict)
    arrives: Mapping[str, int] = field(default_factory=dict)
    batched: bool = False
    hands_on: bool = False


@dataclass(frozen=True)
class Event:
    """An allocation (bytes > 0) or a release (bytes < 0) of a value, at a kernel of a phase.

    own   the compiler allocates it, so it may hand it the memory of a value that died before
    """

    value: str
    bytes: int
    kernel: str
    phase: str
    where: str = ""
    own: bool = False


def events(phases: Sequence[Phase]) -> list[Event]:
    """The allocator's events of a step, in order."""
    out: list[Event] = []
    gone: set[int] = set()
    for phase in phases:
        found = _phase(phase)
        if phase.hands_on:
            gone |= {len(out) + n for n in _handed_on(found, sum(phase.released.values()))}
        out += found
    return _renamed(out, gone)


def peak(found: Iterable[Event], start: int = 0) -> int:
    """The most bytes alive at once, from `start` on."""
    now = most = start
    for e in found:
        now += e.bytes
        most = max(most, now)
    return most


def _last_readers(kernels: Sequence[Kernel]) -> dict[str, int]:
    last: dict[str, int] = {}
    for n, k in enumerate(kernels):
        for value in (*k.reads, *k.changes, *(w.name for w in k.writes)):
            last[value] = n
    return last


def _phase(phase: Phase) -> list[Event]:
    last = _last_readers(phase.kernels)
    alive = {**phase.released, **phase.arrives}
    out: list[Event] = []

    own = {w.name for k in phase.kernels if k.own for w in k.writes}

    def event(value: str, size: int, kernel: Kernel | None) -> None:
        name, where = (kernel.name, kernel.where) if kernel else ("", "")
        if size:
            out.append(Event(value, size, name, phase.name, where, value in own))

    for value, size in phase.arrives.items():
        event(value, size, None)
    for value in list(alive):
        if value not in last and value not in phase.kept:
            event(value, -alive.pop(value), None)
    fixed = {v for k in phase.kernels for v in k.scatters}
    late: list[tuple[str, Kernel]] = []

    def release(value: str, kernel: Kernel) -> None:
        if phase.batched and kernel.loop:
            late.append((value, kernel))
        else:
            event(value, -alive.pop(value), kernel)

    def flush() -> None:
        for value, kernel in late:
            event(value, -alive.pop(value), kernel)
        late.clear()

    for n, k in enumerate(phase.kernels):
        if not k.loop:
            flush()
        dying = [v for v in dict.fromkeys((*k.reads, *k.changes)) if last[v] == n and v in alive]
        dying = [v for v in dying if v not in phase.kept]
        free = [v for v in dying if v not in fixed] if k.loop else []
        for w in k.writes:
            taken = next((v for v in free if alive[v] == w.bytes and w.name not in fixed), None)
            if taken is not None:  # written in place: the memory changes its name
                free.remove(taken)
                dying.remove(taken)
                del alive[taken]
                event(taken, -w.bytes, k)
            event(w.name, w.bytes, k)
            alive[w.name] = w.bytes
        event(f"{WORKSPACE}{k.name}", k.workspace, k)
        event(f"{WORKSPACE}{k.name}", -k.workspace, k)
        for v in dying:
            release(v, k)
        for w in k.writes:
            if last[w.name] == n and w.name not in phase.kept:
                release(w.name, k)
    flush()
    return out


def _handed_on(found: list[Event], start: int) -> set[int]:
    """Where a value takes over the memory of the last one of its size that died: neither is an event then.

    As torch/_inductor/codegen/wrapper.py does it (AllocateLine.should_reuse_buffer), which knows nothing of workspaces.
    """
    level, known = [], start
    for e in found:
        unseen = e.value.startswith(WORKSPACE) or e.value.endswith("]")  # a part of a kernel's result that none reads
        known += 0 if unseen else e.bytes
        level.append(known)
    most = max(level, default=0)
    dead: dict[int, list[int]] = defaultdict(list)
    gone: set[int] = set()
    for n, e in enumerate(found):
        if e.value.startswith(WORKSPACE):
            continue
        if e.bytes < 0 and e.own:
            dead[-e.bytes].append(n)
        elif e.bytes > 0 and e.own and dead[e.bytes]:
            before = dead[e.bytes][-1]
            if max(level[before:n]) + e.bytes <= most:
                dead[e.bytes].pop()
                gone |= {before, n}
                for m in range(before, n):
                    level[m] += e.bytes
    return gone


def _renamed(found: list[Event], gone: set[int]) -> list[Event]:
    """Without the events that are gone; a release bears the name that its memory was allocated under."""
    out: list[Event] = []
    free: dict[int, list[str]] = defaultdict(list)
    first: dict[str, str] = {}
    for n, e in enumerate(found):
        if n in gone:
            if e.bytes < 0:
                free[-e.bytes].append(first.pop(e.value, e.value))
            else:
                first[e.value] = free[e.bytes].pop()
        else:
            out.append(replace(e, value=first.pop(e.value, e.value)) if e.bytes < 0 else e)
    return out
