"""Compute the peak of a whole step: the bytes that stay between steps, plus the events of the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attnfx.errors import BudgetError
from attnfx.memory.allocator import Cache
from attnfx.memory.byte_size import text
from attnfx.memory.liveness import Event, peak
from attnfx.planning.strategies import Strategy
from attnfx.targets import Target

# Margin of error, as a share of a step's predicted bytes beyond the resident ones. It is above the worst recorded
# error: benchmarks/results/budget.json and, if dead memory waits for later values, benchmarks/results/plan.json.
ERROR, ERROR_WAITING = 0.03, 0.1


@dataclass(frozen=True)
class Resident:
    """Bytes that stay from one step to the next, and the scratch of the optimizer's step.

    held      of each parameter and buffer
    given     of each input
    scratch   of the optimizer's step, while it runs
    """

    parameters: int = 0
    buffers: int = 0
    state: int = 0
    scratch: int = 0
    held: tuple[int, ...] = ()
    given: tuple[int, ...] = ()

    @property
    def inputs(self) -> int:
        return sum(self.given)

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.inputs + self.state

    def around(self, events: Iterable[Event]) -> list[Event]:
        """Return a step's events, the allocations of all tensors before it, and the optimizer's step after it."""
        sizes = {"a parameter or buffer": self.held, "an input": self.given, "optimizer state": (self.state,)}
        before = [Event(name, size, "before the step") for name in sizes for size in sizes[name] if size]
        after = [Event("scratch", size, "the optimizer's step") for size in (self.scratch, -self.scratch) if size]
        return [*before, *events, *after]


def total(events: Sequence[Event], resident: Resident, target: Target) -> int:
    """Return the most bytes at once, over the step and the optimizer's step after it."""
    if target.kind != "cpu":
        return Cache().replay(resident.around(events)).peak
    return resident.total + max(peak(events), sum(e.bytes for e in events) + resident.scratch)


def reserve(way: Strategy, size: int, resident: Resident) -> int:
    """Return the bytes to keep free under a budget, in addition to a predicted peak of `size`."""
    return round((ERROR_WAITING if way.waits and way.inlining else ERROR) * (size - resident.total))


def contents(events: Sequence[Event], resident: Resident, saved: Mapping[str, int], train: bool) -> dict[str, int]:
    """Return the bytes allocated at the peak, by kind."""
    alive: dict[str, int] = {}
    best: dict[str, int] = {}
    now = most = 0
    for e in events:
        now += e.bytes
        alive[e.value] = alive.get(e.value, 0) + e.bytes
        if now > most:
            most, best = now, dict(alive)
    kept = {v for v, b in alive.items() if b}
    out = {"parameters": resident.parameters, "buffers": resident.buffers, "inputs": resident.inputs,
           "optimizer state": resident.state}  # fmt: skip
    scratch = 0
    if now + resident.scratch > most:  # the peak is in the optimizer's step
        best, scratch = {v: b for v, b in alive.items() if b}, resident.scratch
    gradients = sum(b for v, b in best.items() if train and v in kept and ".backward." in v)
    activations = sum(b for v, b in best.items() if v in saved)
    out |= {"gradients": gradients, "saved for the backward pass": activations, "the optimizer's step": scratch}
    out["outputs and temporaries at the peak"] = sum(best.values()) - gradients - activations
    return {name: size for name, size in out.items() if size}


def fitting(ways: Iterable[Strategy], limit: int | None, resident: Resident, target: Target, train: bool) -> Strategy:
    """Return the first way that fits with its reserve. Raises BudgetError, with the smallest peak, if none fits."""
    best: tuple[int, int, Strategy] | None = None
    for way in ways:
        size = total(way.events, resident, target)
        kept = reserve(way, size, resident)
        if limit is None or size + kept <= limit:
            return way
        if best is None or size + kept < best[0]:
            best = size + kept, kept, way
    assert best is not None
    least, kept, way = best
    inside = contents(way.events, resident, way.step.saved, train) | {"reserve for errors of the prediction": kept}
    raise BudgetError(
        f"memory_budget: the step does not fit into {text(limit or 0)}; the smallest possible peak is {text(least)} "
        f"({', '.join(f'{name} {text(size)}' for name, size in inside.items())}); raise the budget or shrink the step"
    )


@dataclass(frozen=True)
class Moment:
    """The memory allocated after one event, an allocation or a release.

    phase   "forward" or "backward", with a number if there are several graphs
    where   the module or source line of the operation, if known
    value   the number of the graph and the name of the value, such as "0.addmm"
    change  bytes that the event allocates, or releases if negative
    bytes   bytes allocated after the event, including those that stay between steps
    """

    phase: str
    where: str
    value: str
    change: int
    bytes: int
