"""Compute when each stored value of a step is allocated and released, and the bytes alive at each moment.

A phase is the kernels of one compiled graph. A value is allocated before the kernel that writes it and released after
the last kernel that reads it or a view of it, so a kernel's operands and results are alive at the same time. Inductor
adds three things: it reorders kernels (`schedule.py`); a loop overwrites an operand that dies in it; and dead memory
may wait for a later value of the same size and dtype (torch/_inductor/codegen/wrapper.py, AllocateLine).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from attnfx.memory.fusion import Kernel
from attnfx.memory.records import Result


@dataclass(frozen=True)
class Phase:
    """One run of a compiled graph.

    name      "forward" or "backward", with a number if there are several graphs
    kernels   in the order in which they run
    kept      values that stay after it: its outputs
    released  earlier values that it owns: each is released after its last reader in this phase
    arrives   values that come with its call (the gradients of the outputs); it owns them too
    batched   whether consecutive loops run as one function, which releases dead values at its end: Inductor compiles
              them this way for a CPU (torch/_inductor/codegen/cpp.py, KernelGroup)
    places    index of each kernel in the compiler's schedule; if empty, the order of `kernels`
    alive     bytes alive at each place, by the compiler's estimate; if empty, dead memory is not reused
    """

    name: str
    kernels: tuple[Kernel, ...]
    kept: frozenset[str]
    released: tuple[Result, ...] = ()
    arrives: Mapping[str, int] = field(default_factory=dict)
    batched: bool = False
    places: tuple[int, ...] = ()
    alive: tuple[int, ...] = ()


@dataclass(frozen=True)
class Event:
    """An allocation (bytes > 0) or a release (bytes < 0) of a value in a phase, at a kernel's module or source line.

    If a value takes the memory of another, a release is directly followed by an allocation.
    """

    value: str
    bytes: int
    phase: str
    where: str = ""


def events(phases: Sequence[Phase]) -> list[Event]:
    """Return the allocator's events of a step, in order."""
    return [e for phase in phases for e in _Lines(phase).events()]


def peak(found: Iterable[Event]) -> int:
    """Return the most bytes alive at once."""
    now = most = 0
    for e in found:
        now += e.bytes
        most = max(most, now)
    return most


@dataclass
class _Line:
    """A line of a compiled graph's code: `value` is allocated, freed, or takes the memory of `old`.

    at     the place in the compiler's schedule
    where  the kernel's module or source line
    """

    value: Result
    at: int
    where: str = ""
    frees: bool = False
    old: Result | None = None
    void: bool = False


class _Lines:
    """The lines of a phase, and their events."""

    def __init__(self, phase: Phase):
        self.phase = phase
        self.order = list(zip(phase.places or range(len(phase.kernels)), phase.kernels))
        arrives = (Result(v, size) for v, size in phase.arrives.items())
        self.alive = {r.name: r for r in (*phase.released, *arrives)}
        self.own = {w.name for k in phase.kernels if k.own for w in k.writes}
        read = {r for k in phase.kernels for r in (*k.reads, *k.changes)}
        self.waiting = {w.name for k in phase.kernels if not k.joins for w in k.writes if k.own or w.name in read}
        if phase.batched:
            self.waiting -= self._unaligned()
        self.lines: list[_Line] = []
        self._write()
        if phase.alive:
            self._reuse(list(phase.alive))

    def _unaligned(self) -> set[str]:
        """Return the results of calls that read an input or such a result. On a CPU, Inductor does not assume that
        inputs and results of calls on them are aligned; its own values are (FallbackKernel.create in
        torch/_inductor/ir.py)."""
        made = {w.name for k in self.phase.kernels for w in k.writes}
        out: set[str] = set()
        for k in self.phase.kernels:
            if k.parts and any(r not in made or r in out for r in k.reads):
                out.update(w.name for w in k.writes)
        return out

    def _write(self) -> None:
        phase = self.phase
        last = {
            v: n for n, (_, k) in enumerate(self.order) for v in (*k.reads, *k.changes, *(w.name for w in k.writes))
        }
        self.lines += [_Line(self.alive[value], 0) for value in phase.arrives]
        for value in [v for v in self.alive if v not in last and v not in phase.kept]:
            self.lines.append(_Line(self.alive.pop(value), 0, frees=True))
        late: list[tuple[Result, str]] = []

        def flush(at: int) -> None:
            self.lines.extend(_Line(value, at, where, frees=True) for value, where in late)
            late.clear()

        before = 0
        for n, (at, k) in enumerate(self.order):
            if not (k.loop and phase.batched):
                flush(before)
            before = at
            dying = [v for v in dict.fromkeys((*k.reads, *k.changes)) if last[v] == n and v in self.alive]
            dying = [v for v in dying if v not in phase.kept]
            for w in k.writes:
                taken = next((v for v in k.over.get(w.name, ()) if v in dying and self._fits(self.alive[v], w)), None)
                old = None
                if taken is not None:
                    dying.remove(taken)
                    old = self.alive.pop(taken)
                    if taken not in self.waiting:
                        self.waiting.discard(w.name)
                    w = Result(w.name, old.bytes, w.dtype)
                self.lines.append(_Line(w, at, k.where, old=old))
                self.alive[w.name] = w
            if k.workspace:
                room = Result(f"workspace of {k.name}", k.workspace)
                self.lines += [_Line(room, at, k.where), _Line(room, at, k.where, frees=True)]
            dying += [w.name for w in k.writes if last[w.name] == n and w.name not in phase.kept]
            late += [(self.alive.pop(v), k.where) for v in dying]
            if not (k.loop and phase.batched):
                flush(at)
        flush(before)

    def _fits(self, old: Result, new: Result) -> bool:
        """Return whether `new` may overwrite `old`, by can_match_buffer_size in torch/_inductor/codegen/wrapper.py. A
        value that came with the call is never overwritten."""
        return (
            old.name not in self.phase.arrives and old.dtype == new.dtype and 0.95 * old.bytes <= new.bytes <= old.bytes
        )

    def _reuse(self, alive: list[int]) -> None:
        """Let values take the memory of the last dead value of their size and dtype.

        `alive` has the compiler's estimate of the bytes at each place; a reuse must not raise its peak.
        """
        most = max(alive, default=0)
        dead: dict[tuple[str, int], list[_Line]] = defaultdict(list)
        for line in self.lines:
            key = line.value.dtype, line.value.bytes
            if line.frees:
                if line.value.name in self.waiting:
                    dead[key].append(line)
            elif line.value.name in self.own and line.old is None and dead[key]:
                before = dead[key][-1]
                between = range(before.at + 1, line.at)
                if not between or max(alive[n] for n in between) + line.value.bytes <= most:
                    for n in between:
                        alive[n] += line.value.bytes
                    dead[key].pop()
                    before.void, line.old = True, before.value

    def events(self) -> list[Event]:
        out: list[Event] = []
        for line in self.lines:
            size = line.value.bytes
            if line.void or not size:
                continue
            if line.old is not None:
                out.append(Event(line.old.name, -size, self.phase.name, line.where))
            out.append(Event(line.value.name, -size if line.frees else size, self.phase.name, line.where))
        return out
