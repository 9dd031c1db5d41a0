"""Hold the prediction for a step: the strategy, its timeline, its limits."""

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
    """The predicted memory and time of a step under a memory budget, with its timeline, in bytes and milliseconds.

    peak_bytes     most bytes allocated at once: parameters, inputs, optimizer state, gradients, activations
    reserved_bytes on a GPU, the bytes that PyTorch's caching allocator reserves on the device
    predicted_ms   time of the step's kernels, from their arithmetic and memory traffic
    decisions      of each attention site, in order
    saved          values kept for the backward pass, name -> bytes; `recomputed` has those dropped for the budget
    timeline       a Moment for each of the allocator's events
    max_batch      the largest batch that fits with the given length; None if unlimited or unknown
    max_length     the largest length that fits with the given batch; None also if the inputs lack a length
    notes          the limits of the plan, and the reasons for an unknown limit
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
        """Return the peak at other sizes, under a budget with as much recomputed as possible, or None if unknown."""
        return None if self._limits is None else self._limits.bytes_at(batch, length)

    def parts(self) -> dict[str, int]:
        """Return the bytes allocated at the peak, by kind."""
        return contents(self.strategy.events, self.resident, self.saved, self.train)

    @cached_property
    def report(self) -> Report:
        """The sites and decisions of all graphs of the call."""
        whole = Report(graphs=0)
        for c in self.strategy.captured:
            whole.take(c.report)
        whole.notes.extend(n for n in self.notes if n not in whole.notes)
        return whole
