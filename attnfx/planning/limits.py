"""Find the largest batch and the largest length that fit, without running or tracing at each size.

The graphs are captured once more at a batch near the expected largest one, given the present peak. This second capture
makes the decisions, and chooses the values to recompute, that apply to large batches. If it decides like the first
capture, the two captures determine how each size depends on batch and length. Otherwise, or if a batch of one makes
another graph, a third capture uses the decisions of the second. The size found in this way is captured itself, and so
is the next one. If other decisions are made there, the search continues from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from torch.utils._pytree import tree_leaves

from attnfx.memory.liveness import Event
from attnfx.options import Options
from attnfx.planning.capture import Captured
from attnfx.planning.peak import Resident, reserve, total
from attnfx.planning.scaling import Roles, Scaled, Sizes, Unknown, near, position_rows, prime, roles
from attnfx.planning.strategies import Strategy, as_decided
from attnfx.report.report import Report

FAR = 1 << 24  # a batch or length at which the search for a limit stops
MOST = 1 << 13  # the largest batch that is traced
ATTEMPTS = 6  # interpretations of the inputs' dims to try


class Capture(Protocol):
    """A function that captures the graphs for inputs, with the decisions of `told`, if any: reports of other sizes."""

    def __call__(self, inputs: Any, options: Options, told: Sequence[Report] = ()) -> list[Captured]: ...


# (captured graphs, a function that captures them with every site rewritten) -> the ways to compile them
Ways = Callable[[Sequence[Captured], Callable[[], Sequence[Captured]]], Iterable[Strategy]]


@dataclass
class Limits:
    """A step's peak at other sizes, and the largest sizes that fit.

    strategy  the chosen way to compile
    inputs    (args, kwargs)
    limit     bytes into which the step must fit
    ways      returns the ways to compile captured graphs
    lowest    under a budget, the last way for the given graphs; a size must then fit with its reserve
    notes     receives the reasons for unknown limits
    """

    strategy: Strategy
    inputs: Any
    resident: Resident
    limit: int
    capture: Capture
    ways: Ways
    lowest: Strategy | None
    notes: list[str]

    @property
    def _extremes(self) -> list[Strategy]:
        """The chosen way and, under a budget, the last one."""
        return [self.strategy] if self.lowest is None else [self.strategy, self.lowest]

    @cached_property
    def _scaled(self) -> tuple[Roles, list[Scaled]] | None:
        refused = ""
        for chosen, _ in zip(roles(self.inputs), range(ATTEMPTS)):
            at = chosen.sizes
            try:
                found = [
                    self._scale(way, chosen, near(at, self._expected(way, at.batch)), at.length)
                    for way in self._extremes
                ]
            except Exception as problem:  # a model may refuse other sizes in any way
                refused = refused or (str(problem).splitlines() or [type(problem).__name__])[0]
                continue
            if refused and not chosen.sizes.length:
                self.notes.append(f"max_length could not be determined: {refused}")
            return chosen, found
        self.notes.append(f"max_batch and max_length could not be determined: {refused}")
        return None

    @cached_property
    def _long(self) -> list[Scaled]:
        """The ways at the given batch, with decisions made near the largest length: few rewrites pay at short ones."""
        assert self._scaled is not None
        chosen, scaled = self._scaled
        s = chosen.sizes
        longest = self._largest(lambda n: self._asked(chosen, scaled, replace(s, length=n)), s.length)
        if longest is None or longest <= s.length:
            return scaled if s.batch > 1 else self._both(chosen, near(s, s.batch).length)
        try:
            return self._both(chosen, prime(longest, -1))
        except Exception as problem:  # e.g. beyond a table of positions
            said = (str(problem).splitlines() or [type(problem).__name__])[0]
            self.notes.append(
                f"max_length is the limit of memory alone; the model fails at a length of {longest}: {said}"
            )
            return scaled

    def _both(self, chosen: Roles, length: int) -> list[Scaled]:
        s = chosen.sizes
        return [self._scale(way, chosen, Sizes(s.batch, length), near(s, 2).length) for way in self._extremes]

    def _scale(self, way: Strategy, chosen: Roles, then: Sizes, length: int) -> Scaled:
        """Scale a way with the decisions of a capture at `then`, fitted with the given capture or one at `length`."""
        at, options = chosen.sizes, way.captured[0].options
        there = self._captured(chosen, then, options)
        if way is self.lowest:
            *_, strategy = self._ways(chosen, then, there, options)
            there = strategy.captured
        else:
            strategy = as_decided(there, way.target, way.inlining)
        if _decided(way.captured) == _decided(there):
            with suppress(Unknown):
                return Scaled(strategy, way.captured, then, at)
        base = Sizes(then.batch if then.batch == at.batch else prime(then.batch + 1, 1), length)
        first = self._captured(chosen, base, options, [c.report for c in there])
        return Scaled(strategy, first, then, base)

    def _ways(self, chosen: Roles, s: Sizes, there: Sequence[Captured], options: Options) -> Iterable[Strategy]:
        return self.ways(there, lambda: self._captured(chosen, s, replace(options, rewrite="always")))

    def _captured(self, chosen: Roles, s: Sizes, options: Options, told: Sequence[Report] = ()) -> list[Captured]:
        found = self.capture(chosen.resized(self.inputs, s), options, told)
        if any(c.problem for c in found):
            raise Unknown("the graph at other sizes could not be compiled for planning")
        return found

    def _expected(self, way: Strategy, batch: int) -> int:
        """Estimate the batch that fills the memory, if a step's peak grows in proportion to it."""
        stays = self._stays(way)
        grows = max(total(way.events, self.resident, way.target) - stays, 1)
        return min(max(batch * (self.limit - stays) // grows, 2), MOST)

    def _stays(self, way: Strategy) -> int:
        """Return the bytes of parameters, buffers, optimizer state and, after a training step, gradients."""
        training = any(c.arguments is not None for c in way.captured)
        left = max(sum(e.bytes for e in way.events), 0) if training else 0
        return self.resident.total - self.resident.inputs + left

    def bytes_at(self, batch: int, length: int | None = None) -> int | None:
        """Return the least peak at other sizes, with as much recomputed as possible, or None if unknown."""
        if self._scaled is None:
            return None
        chosen, scaled = self._scaled
        s = Sizes(batch, chosen.sizes.length if length is None else length)
        if chosen.sizes.length and batch == chosen.sizes.batch:
            scaled = self._long
        return self._least(chosen, s, (x.at(s) for x in scaled), reserved=False)

    def _least(self, chosen: Roles, s: Sizes, steps: Iterable[tuple[Strategy, Sequence[Event]]],
               reserved: bool = True) -> int:  # fmt: skip
        """Return the least peak of some steps; `reserved` adds its reserve under a budget."""
        given = tuple(x.numel() * x.element_size() for x in tree_leaves(chosen.resized(self.inputs, s)))
        resident = replace(self.resident, given=given)
        found = [(way, total(events, resident, self.strategy.target)) for way, events in steps]
        reserved = reserved and self.lowest is not None
        return min(size + (reserve(way, size, resident) if reserved else 0) for way, size in found)

    def _asked(self, chosen: Roles, scaled: Sequence[Scaled], s: Sizes) -> int:
        return self._least(chosen, s, (x.at(s) for x in scaled))

    def _last(self, chosen: Roles, scaled: Sequence[Scaled], at: Callable[[int], Sizes], start: int) -> int | None:
        """Return the last size that fits with the decisions and the recomputation made at that size itself. `scaled`
        gives the start of the search; if it is right, two captures suffice."""
        found = self._largest(lambda n: self._asked(chosen, scaled, at(n)), start)
        options = self.strategy.captured[0].options
        if not found:
            return found

        def own(n: int) -> int:
            try:
                there = self._captured(chosen, at(n), options)
            except Exception:  # e.g. beyond a table of positions
                return self._asked(chosen, scaled, at(n))
            if self.lowest is None:
                ways: Iterable[Strategy] = [as_decided(there, self.strategy.target, self.strategy.inlining)]
            else:
                ways = self._ways(chosen, at(n), there, options)
            return self._least(chosen, at(n), ((way, way.events) for way in ways))

        return self._largest(own, found)

    @cached_property
    def batch(self) -> int | None:
        """The largest batch for the given length; None if unlimited or unknown."""
        if self._scaled is None or not self._scaled[0].sizes.batch:
            return None
        chosen, scaled = self._scaled
        return self._last(chosen, scaled, lambda n: replace(chosen.sizes, batch=n), chosen.sizes.batch)

    @cached_property
    def length(self) -> int | None:
        """The largest length for the given batch; None if unlimited or unknown, or if the inputs lack a length."""
        if self._scaled is None or not (s := self._scaled[0].sizes).length:
            return None
        chosen = self._scaled[0]
        rows = min((r for c in self.strategy.captured for r in position_rows(c)), default=None)
        found = self._last(chosen, self._long, lambda n: replace(s, length=n), s.length)
        if rows is None or (found is not None and found <= rows):
            return found
        self.notes.append(
            f"max_length is limited by a table of {rows} positions; memory allows {found or 'any length'}"
        )
        return rows

    def _largest(self, at: Callable[[int], int], start: int) -> int | None:
        """Return the last size that fits, by interpolation between both sides and, every third step, by bisection."""
        stays = self._stays(self.strategy)
        if stays > self.limit:
            return 0
        low, high = (0, stays), None
        n, steps = max(start, 1), 0
        while high is None or high[0] - low[0] > 1:
            size = at(n)
            if size <= self.limit:
                low = n, size
            else:
                high = n, size
            steps += 1
            if high is None:
                if n >= FAR:
                    return None
                grown = n * (self.limit - stays) // max(size - stays, 1)
                n = min(max(grown, n + 1), 64 * n, FAR)
            else:
                guess = low[0] + (self.limit - low[1]) * (high[0] - low[0]) // max(high[1] - low[1], 1)
                n = (low[0] + high[0]) // 2 if steps % 3 == 0 else guess
                n = min(max(n, low[0] + 1), high[0] - 1)
        return low[0]


def _decided(captured: Sequence[Captured]) -> list[dict[tuple[str, int], str]]:
    return [{place: d.tier for place, d in c.report.decided.items()} for c in captured]
