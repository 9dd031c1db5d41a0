"""`attnfx.plan`: what a step of a model will take on a device, which need not be there, and what fits into a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from os import PathLike, fspath
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from attnfx import sizes
from attnfx.capture import Captured, capture
from attnfx.errors import BudgetError, OptionError
from attnfx.memory import budget as budgets
from attnfx.memory import optimizer as optimizers
from attnfx.memory.allocator import Cache, replay
from attnfx.memory.budget import text
from attnfx.memory.liveness import Event, peak
from attnfx.memory.step import Part, step
from attnfx.options import Options
from attnfx.planning import Choice, choices
from attnfx.report import Decision, Report, Site
from attnfx.targets import Target

FAR = 1 << 24  # a batch or length beyond which no limit is looked for


@dataclass(frozen=True)
class Moment:
    """What is allocated after one of the allocator's events. `bytes` is all of it, `change` this event's part."""

    phase: str
    where: str
    value: str
    change: int
    bytes: int


@dataclass(frozen=True)
class Resident:
    """Bytes that stay from one step to the next, and what the optimizer's own step takes.

    tensors   the bytes of each parameter, buffer and input
    """

    parameters: int
    buffers: int
    inputs: int
    state: int
    scratch: int
    tensors: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.inputs + self.state


@dataclass
class Plan:
    """Decisions for a model under a memory budget, with the predicted timeline. Bytes are bytes, times milliseconds.

    peak_bytes     the most that is allocated at once: parameters, inputs, optimizer state, gradients, activations
    reserved_bytes on a GPU, what PyTorch's caching allocator takes from the device for it
    predicted_ms   of the step's kernels, by their arithmetic and traffic
    decisions      of each attention site, in order
    saved          what is kept for the backward pass, name -> bytes; `recomputed` what the budget took from it
    timeline       a Moment for each of the allocator's events
    max_batch      the largest batch that fits, for the length given; None where nothing limits it or it is not known
    max_length     the largest length for the batch given; None also where the inputs have none
    notes          what the plan does not cover, and why a limit is not known
    """

    target: Target
    budget: int | None
    train: bool
    choice: Choice
    resident: Resident
    given: sizes.Sizes
    notes: list[str] = field(default_factory=list)
    again: Callable[[sizes.Sizes], list[Captured]] | None = None
    ways: Callable[[], Iterable[Choice]] | None = None

    @cached_property
    def _lowest(self) -> Choice | None:
        """The way that computes most again, where a budget allows that."""
        if self.budget is None or self.ways is None or not self.train:
            return None
        *_, last = self.ways()
        return last

    @cached_property
    def _allocator(self) -> Cache | None:
        return None if self.target.kind == "cpu" else _on_gpu(self.resident, self.choice.events)

    @property
    def peak_bytes(self) -> int:
        return total(self.choice.events, self.resident, self.target)

    @property
    def reserved_bytes(self) -> int | None:
        return None if self._allocator is None else self._allocator.peak_reserved

    @property
    def predicted_ms(self) -> float:
        return self.choice.milliseconds

    @property
    def sites(self) -> list[Site]:
        return [site for c in self.choice.captured for site in c.report.sites]

    @property
    def decisions(self) -> list[Decision | None]:
        return [site.decision for site in self.sites]

    @property
    def saved(self) -> Mapping[str, int]:
        return self.choice.step.saved

    @property
    def recomputed(self) -> Mapping[str, int]:
        return self.choice.recomputed

    @cached_property
    def timeline(self) -> list[Moment]:
        now, out = self.resident.total, []
        for e in self.choice.events:
            now += e.bytes
            out.append(Moment(e.phase, e.where, e.value, e.bytes, now))
        return out

    @cached_property
    def max_batch(self) -> int | None:
        return self._largest(lambda n: replace(self.given, batch=n), self.given.batch)

    @cached_property
    def max_length(self) -> int | None:
        if not self.given.length:
            return None
        return self._largest(lambda n: replace(self.given, length=n), self.given.length)

    @cached_property
    def _table(self) -> sizes.Table | None:
        if self.again is None or not self.given.batch:
            return None
        then = sizes.other(self.given)
        try:
            return sizes.Table(self.choice.captured, self.again(then), self.given, then)
        except Exception as problem:  # a model may refuse other sizes in any way
            self.notes.append(f"max_batch and max_length are not known: {str(problem).splitlines()[0]}")
            return None

    def bytes_at(self, batch: int, length: int | None = None) -> int | None:
        """The least peak at other sizes, with as much computed again as can be; None where it is not known."""
        table = self._table
        if table is None:
            return None
        at = sizes.Sizes(batch, self.given.length if length is None else length)
        ways = [self.choice] if self._lowest is None else [self.choice, self._lowest]
        share = float(table.share_of_inputs(at))
        resident = replace(self.resident, inputs=round(self.resident.inputs * share))
        return min(total(_events_at(way, table, at), resident, self.target) for way in ways)

    def _largest(self, at: Callable[[int], sizes.Sizes], start: int) -> int | None:
        limit = self.budget if self.budget is not None else self.target.memory
        if self._table is None:
            return None

        def fits(n: int) -> bool:
            s = at(n)
            found = self.bytes_at(s.batch, s.length)
            return found is not None and found <= limit

        low, high = 0, max(start, 1)
        while fits(high):
            low, high = high, high * 2
            if high > FAR:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def parts(self) -> dict[str, int]:
        """What is allocated at the peak, by kind, in bytes."""
        return contents(self.choice.events, self.resident, self.saved, self.train)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, force_terminal=False, no_color=True)
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get().rstrip()

    def __rich__(self):  # type: ignore[no-untyped-def]
        from attnfx.drawing import table

        return table(self)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the timeline into an image file. Needs the extra "plot"."""
        from attnfx.drawing import plot

        plot(self, path)

    @cached_property
    def report(self) -> Report:
        """What was found and decided, over all graphs of the call."""
        whole = Report(graphs=0)
        for c in self.choice.captured:
            whole.take(c.report)
        whole.notes.extend(n for n in self.notes if n not in whole.notes)
        return whole

    def to_html(self, path: str | PathLike[str], force: bool = False) -> None:
        """Write the report with the timeline as one page for a browser, which needs no network.

        Raises FileExistsError where there is a file of that name, unless `force`.
        """
        from attnfx.html import write
        from attnfx.reportjson import data

        step = "a training step" if self.train else "a forward pass"
        caption = f"Bytes allocated over {step} on {self.target.name}; {text(self.peak_bytes)} at the peak."
        write(data(self.report), fspath(path), force, [m.bytes for m in self.timeline], caption)

    def snapshot(self, path: str | PathLike[str]) -> None:
        """Write the timeline as a file that PyTorch's memory viewer (pytorch.org/memory_viz) opens."""
        from attnfx.drawing import snapshot

        snapshot(self, path)


def _on_gpu(resident: Resident, events: Sequence[Event]) -> Cache:
    cache = replay([*resident.tensors, resident.state], events)
    if resident.scratch:
        cache.take(resident.scratch)
    return cache


def total(events: Sequence[Event], resident: Resident, target: Target) -> int:
    """The most bytes at once: of the step, and of the optimizer's after it."""
    if target.kind != "cpu":
        return _on_gpu(resident, events).peak
    return resident.total + max(peak(events), sum(e.bytes for e in events) + resident.scratch)


def _events_at(way: Choice, table: sizes.Table, at: sizes.Sizes) -> list[Event]:
    def resized(n: int, part: Part) -> Part:
        return part.resized(lambda name, size: round(size * table.share(f"{n}.{name}", at)))

    parts = [resized(n, part) for n, part in enumerate(way.parts)]
    return step(parts, way.target.kind == "cpu", way.inlining).events()


def contents(events: Sequence[Event], resident: Resident, saved: Mapping[str, int], train: bool) -> dict[str, int]:
    """What is allocated at the peak of a step, by kind, in bytes."""
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
    gradients = sum(b for v, b in best.items() if train and v in kept and ".backward." in v)
    activations = sum(b for v, b in best.items() if v in saved)
    out |= {"gradients": gradients, "saved for the backward pass": activations}
    out["outputs and what is computed there"] = sum(best.values()) - gradients - activations
    return {name: size for name, size in out.items() if size}


def plan(model: Callable[..., Any], *, target: str | Target = "auto", memory_budget: int | float | str | None = None,
         train: bool | None = None, optimizer: str | int = "none", **options: Any) -> Callable[..., Plan]:  # fmt: skip
    """Plan a step of `model` on example inputs, running nothing: parameters and inputs may be on "meta".

    `attnfx.plan(model, target="rtx4090", memory_budget="24GiB", train=True)(*args, **kwargs)` gives a `Plan`.

    target          a device's name, or an `attnfx.Target`; "auto" is the device at hand
    memory_budget   bytes, "16GiB", or a fraction of the target's memory; None is all of it, and nothing is changed for
                    it; "auto" is the free memory of the device at hand
    train           whether a backward pass follows; None is whether the model is in training mode
    optimizer       none, sgd, momentum, adam, adamw, adam8bit, adamw8bit, or the bytes of its state
    options         those of `Options`

    Raises:
        OptionError: an option is unknown or has a bad value, or the budget is more than the target has.
        BudgetError: nothing fits; it names the smallest peak that can be had, and what is in it.
    """
    chosen = Options.make({**options, "target": target})
    wanted = budgets.check("memory_budget", memory_budget)
    keeps = optimizer if isinstance(optimizer, int) else optimizers.by_name(optimizer)

    def run(*args: Any, **kwargs: Any) -> Plan:
        device = chosen.target if isinstance(chosen.target, Target) else detected(_device(model))
        training = train if train is not None else bool(getattr(model, "training", False))
        limit = None
        if wanted is not None:
            limit = budgets.in_bytes(wanted, device.memory, free_bytes(device), device.name)

        def captured(options: Options = chosen, inputs: Any = (args, kwargs)) -> list[Captured]:
            return capture(model, inputs[0], inputs[1], options, training)

        first = captured()
        if not first:
            raise OptionError("Dynamo made no graph of this call: there is nothing to plan")
        notes = [f"graph {n}: {note}" for n, c in enumerate(first) for note in c.report.notes]
        if len(first) > 1:
            notes.append(f"Dynamo made {len(first)} graphs; what Python does between them is not planned")
        notes += [f"graph {n} {c.problem}" for n, c in enumerate(first) if c.problem]
        first = [c for c in first if not c.problem]
        resident = _resident(model, (args, kwargs), keeps, training, device.kind == "cpu")
        inlining = chosen.inner == "inductor"
        more = lru_cache(lambda: captured(replace(chosen, rewrite="always")))

        def ways() -> Iterable[Choice]:
            return choices(first, device, inlining, more)

        way = fitting(ways(), limit, resident, device, training)
        at = sizes.sizes_of((args, kwargs))
        return Plan(
            device, limit, training, way, resident, at, notes,
            lambda new: captured(way.captured[0].options or chosen, sizes.resized((args, kwargs), at, new)),
            ways,
        )  # fmt: skip

    return run


def fitting(ways: Iterable[Choice], limit: int | None, resident: Resident, target: Target, train: bool) -> Choice:
    """The first way that fits. Raises BudgetError, naming the least, where none does."""
    best: tuple[int, Choice] | None = None
    for way in ways:
        size = total(way.events, resident, target)
        if limit is None or size <= limit:
            return way
        if best is None or size < best[0]:
            best = size, way
    assert best is not None
    inside = contents(best[1].events, resident, best[1].step.saved, train)
    raise BudgetError(
        f"memory_budget: the step does not fit into {text(limit or 0)}; the smallest peak that can be had is "
        f"{text(best[0])} ({', '.join(f'{name} {text(size)}' for name, size in inside.items())})"
    )


def detected(device: torch.device | str | None) -> Target:
    """The device at hand. A busy CPU may be measured out of all bounds once."""
    for _ in range(3):
        try:
            return Target.detect(device)
        except OptionError:
            if torch.device(device or "cpu").type != "cpu":
                raise
    return Target.detect(device)


def _device(model: Any) -> str | None:
    if isinstance(model, nn.Module):
        kinds = {p.device.type for p in model.parameters()}
        if "cpu" in kinds or "meta" in kinds:
            return "cpu"
    return None


def free_bytes(target: Target) -> int:
    """What this process can still have of the device at hand, which is all of an absent one."""
    if target.kind == "cpu":
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return target.memory


def _resident(model: Any, inputs: Any, keeps: int | optimizers.Optimizer, train: bool, cpu: bool) -> Resident:
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    given = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]

    def size(tensors: Sequence[torch.Tensor]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    wanted = [(p.numel(), p.numel() * p.element_size()) for p in parameters if p.requires_grad] if train else []
    state, scratch = (keeps, 0) if isinstance(keeps, int) else (
        optimizers.state_bytes(keeps, wanted), optimizers.step_bytes(keeps, wanted, cpu)
    )  # fmt: skip
    each = tuple(x.numel() * x.element_size() for x in (*parameters, *buffers, *given))
    return Resident(size(parameters), size(buffers), size(given), state if train else 0, scratch, each)


__all__ = ["Moment", "Plan", "plan"]
