"""Hold the prediction for a step: the strategy, its timeline, its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from attnfx.memory.allocator import Cache
from attnfx.planning.limits import Limits
from attnfx.planning.peak import Moment, Resident, contents, total
from attnfx.planning.strategies import Strategy
from attnfx.report.records import Decision, Site
from attnfx.report.report import Report
from attnfx.targets import Target


@dataclass
class Prediction:
    """The predicted memory and time of a step under a memory budget, with its timeline, in bytes and milliseconds.

    target         the device that the plan is for
    budget         the memory budget in bytes, or None
    train          whether a backward pass follows the forward pass
    strategy       the chosen way to compile: the rewritten graphs, the values to recompute, the chunk size
    resident       bytes that stay between steps: parameters, buffers, inputs, optimizer state; and the scratch of the
                   optimizer's step
    peak_bytes     most bytes allocated at once: parameters, inputs, optimizer state, gradients, activations
    reserved_bytes on a GPU, the bytes that PyTorch's caching allocator reserves on the device; None on a CPU
    predicted_ms   time of the step's kernels by the roofline model, without the optimizer's step
    sites          the attention sites of all graphs, in order
    decisions      the decision on each site; None for a refused one
    saved          values kept for the backward pass, name -> bytes
    recomputed     values that are recomputed because of the budget, name -> bytes
    timeline       a Moment (phase, where, value, change, bytes) for each allocation and release, in order
    max_batch      the largest batch that fits with the given length; None if unlimited or unknown
    max_length     the largest length that fits with the given batch; None also if the inputs lack a length
    notes          the limits of the plan and, once `max_batch` or `max_length` is read, the reason if it is unknown

    The first use of `max_batch`, `max_length` or `bytes_at` traces the model at other sizes.
    """

    target: Target
    budget: int | None
    train: bool
    strategy: Strategy
    resident: Resident
    notes: list[str]
    limited: Callable[[], Limits]

    @property
    def peak_bytes(self) -> int:
        return total(self.strategy.events, self.resident, self.target)

    @property
    def reserved_bytes(self) -> int | None:
        if self.target.kind == "cpu":
            return None
        return Cache().replay(self.resident.around(self.strategy.events)).peak_reserved

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
        return self.limited().batch

    @property
    def max_length(self) -> int | None:
        return self.limited().length

    def bytes_at(self, batch: int, length: int | None = None) -> int | None:
        """Return the peak in bytes at other sizes, under a budget with as much recomputed as possible; None if unknown.

        The length is by default the given one, and is ignored if the inputs lack one. Raises RuntimeError for a
        negative size.
        """
        return self.limited().bytes_at(batch, length)

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
