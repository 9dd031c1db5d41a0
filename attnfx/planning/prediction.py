"""Hold what a step is predicted to take: the strategy, its timeline, its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from attnfx.memory.allocator import Cache
from attnfx.planning.limits import Limits
from attnfx.planning.peak import Moment, Resident, contents, on_gpu, total
from attnfx.planning.strategies import Strategy
from attnfx.report.records import Decision, Site
from attnfx.report.report import Report
from attnfx.targets import Target


@dataclass
class Prediction:
    """What a step takes under a memory budget, with its timeline. Bytes are bytes, times milliseconds.

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
    strategy: Strategy
    resident: Resident
    notes: list[str] = field(default_factory=list)
    limited: Callable[[], Limits] | None = None

    @cached_property
    def _allocator(self) -> Cache | None:
        return None if self.target.kind == "cpu" else on_gpu(self.resident, self.strategy.events)

    @cached_property
    def _limits(self) -> Limits | None:
        return None if self.limited is None else self.limited()

    @property
    def peak_bytes(self) -> int:
        return total(self.strategy.events, self.resident, self.target)

    @property
    def reserved_bytes(self) -> int | None:
        return None if self._allocator is None else self._allocator.peak_reserved

    @property
    def predicted_ms(self) -> float:
        return self.strategy.milliseconds

    @property
    def sites(self) -> list[Site]:
        return [site for c in self.strategy.captured for site in c.report.sites]

    @property
    def decisions(self) -> list[Decision | None]:
        return [site.decision for site in self.sites]

    @property
    def saved(self) -> Mapping[str, int]:
        return self.strategy.step.saved

    @property
    def recomputed(self) -> Mapping[str, int]:
        return self.strategy.recomputed

    @cached_property
    def timeline(self) -> list[Moment]:
        now, out = self.resident.total, []
        for e in self.strategy.events:
            now += e.bytes
            out.append(Moment(e.phase, e.where, e.value, e.bytes, now))
        return out

    @property
    def max_batch(self) -> int | None:
        return None if self._limits is None else self._limits.batch

    @property
    def max_length(self) -> int | None:
        return None if self._limits is None else self._limits.length

    def bytes_at(self, batch: int, length: int | None = None) -> int | None:
        """The peak at other sizes; under a budget with what can be computed again. None where it is not known."""
        return None if self._limits is None else self._limits.bytes_at(batch, length)

    def parts(self) -> dict[str, int]:
        """What is allocated at the peak, by kind, in bytes."""
        return contents(self.strategy.events, self.resident, self.saved, self.train)

    @cached_property
    def report(self) -> Report:
        """What was found and decided, over all graphs of the call."""
        whole = Report(graphs=0)
        for c in self.strategy.captured:
            whole.take(c.report)
        whole.notes.extend(n for n in self.notes if n not in whole.notes)
        return whole
