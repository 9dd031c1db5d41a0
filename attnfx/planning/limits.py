"""The largest batch and the largest length that fit, found without running or tracing at each size.

The graphs are captured once more with the batch near what the peak at hand lets expect, where decisions are made, and
values are chosen to be computed again, as they would be there. Where the decisions are the same, the two captures say
how each size depends on batch and length; else (and where a batch of one makes another graph) there is a third, with
the decisions of the second. The size that is found so is captured itself, and the one above it: where other decisions
are made there, it is looked for from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from torch.utils._pytree import tree_leaves

from attnfx.memory.liveness import Event
from attnfx.options import Options
from attnfx.planning.capture import Captured
from attnfx.planning.peak import Resident, reserve, total
from attnfx.planning.scaling import Roles, Sizes, Table, Unknown, near, position_rows, prime, roles
from attnfx.planning.strategies import Strategy, as_decided
from attnfx.report.report import Report

FAR = 1 << 24  # a batch or length beyond which no limit is looked for
MOST = 1 << 13  # the largest batch that is traced
ATTEMPTS = 6  # readings of what the dims of the inputs are


class Capture(Protocol):
    """Captures the graphs for inputs, deciding as in the reports of other sizes where there are some."""

    def __call__(self, inputs: Any, options: Options, told: Sequence[Report] = ()) -> list[Captured]: ...


# the ways to compile some captured graphs, and those that the function captures with every site rewritten
Ways = Callable[[Sequence[Captured], Callable[[], Sequence[Captured]]], Iterable[Strategy]]


@dataclass
class Scaled:
    """One way to compile, at any sizes."""

    strategy: Strategy
    table: Table

    def events(self, s: Sizes) -> list[Event]:
        cpu = self.strategy.target.kind == "cpu"
        parts = self.table.parts(self.strategy.parts, s, cpu, self.strategy.chunk)
        return self.strategy.step_of(parts).events()


@dataclass
class Limits:
    """What is needed to know a step's peak at other sizes.

    strategy    the way that was taken
    inputs    (args, kwargs)
    limit     bytes that the step must fit
    ways      the ways to compile some captured graphs; None where what was decided stays
    lowest    under a budget, the last of them for the graphs at hand; what fits is then held against the reserve too
    notes     takes why a limit is not known
    """

    strategy: Strategy
    inputs: Any
    resident: Resident
    limit: int
    capture: Capture
    ways: Ways | None = None
    lowest: Strategy | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def _scaled(self) -> tuple[Roles, list[Scaled]] | None:
        refused = ""
        for chosen, _ in zip(roles(self.inputs), range(ATTEMPTS)):
            try:
                found = [self._near(self.strategy, chosen, last=False)]
                if self.lowest is not None:
                    found.append(self._near(self.lowest, chosen, last=True))
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
        """At the batch given, with the decisions of a length near the longest: few rewrites pay where it is short."""
        assert self._scaled is not None
        chosen, scaled = self._scaled
        s = chosen.sizes
        longest = self._largest(lambda n: self._asked(chosen, scaled, replace(s, length=n)), s.length)
        if longest is None or longest <= s.length:
            return scaled if s.batch > 1 else self._both(chosen, near(s, s.batch).length)
        try:
            return self._both(chosen, prime(longest, -1))
        except Exception as problem:  # as a table of positions does
            said = (str(problem).splitlines() or [type(problem).__name__])[0]
            self.notes.append(
                f"max_length is the limit of memory alone; the model fails at a length of {longest}: {said}"
            )
            return scaled

    def _near(self, way: Strategy, chosen: Roles, last: bool) -> Scaled:
        at = chosen.sizes
        return self._scale(way, chosen, last, near(at, self._expected(way, at.batch)), at.length)

    def _both(self, chosen: Roles, length: int) -> list[Scaled]:
        ways = [(self.strategy, False), *([] if self.lowest is None else [(self.lowest, True)])]
        s = chosen.sizes
        return [self._scale(way, chosen, last, Sizes(s.batch, length), near(s, 2).length) for way, last in ways]

    def _scale(self, way: Strategy, chosen: Roles, last: bool, then: Sizes, length: int) -> Scaled:
        """With the decisions of a capture at `then`, held against the one at hand or else one of that `length`."""
        at, options = chosen.sizes, way.captured[0].options
        assert options is not None
        there = self._captured(chosen, then, options)
        if last:
            *_, strategy = self._ways(chosen, then, there, options)
            there = strategy.captured
        else:
            strategy = as_decided(there, way.target, way.inlining)
        if _decided(way.captured) == _decided(there):
            with suppress(Unknown):
                return Scaled(strategy, Table(there, way.captured, then, at))
        base = Sizes(then.batch if then.batch == at.batch else prime(then.batch + 1, 1), length)
        first = self._captured(chosen, base, options, [c.report for c in there])
        return Scaled(strategy, Table(there, first, then, base))

    def _ways(self, chosen: Roles, s: Sizes, there: Sequence[Captured], options: Options) -> Iterable[Strategy]:
        assert self.ways is not None
        return self.ways(there, lambda: self._captured(chosen, s, replace(options, rewrite="always")))

    def _captured(self, chosen: Roles, s: Sizes, options: Options, told: Sequence[Report] = ()) -> list[Captured]:
        found = self.capture(chosen.resized(self.inputs, s), options, told)
        if any(c.problem for c in found):
            raise Unknown("the graph at other sizes could not be compiled for planning")
        return found

    def _expected(self, way: Strategy, batch: int) -> int:
        """About the batch whose step takes all that there is, if a step's peak grows with it."""
        stays = self._stays(way)
        grows = max(total(way.events, self.resident, way.target) - stays, 1)
        return min(max(batch * (self.limit - stays) // grows, 2), MOST)

    def _stays(self, way: Strategy) -> int:
        """Parameters, buffers, the optimizer's state, and what is left when a training step has run: the gradients."""
        training = any(c.joint is not None for c in way.captured)
        left = max(sum(e.bytes for e in way.events), 0) if training else 0
        return self.resident.total - self.resident.inputs + left

    def bytes_at(self, batch: int, length: int | None = None) -> int | None:
        """The least peak at other sizes, with as much computed again as can be; None where it is not known."""
        if self._scaled is None:
            return None
        chosen, scaled = self._scaled
        s = Sizes(batch, chosen.sizes.length if length is None else length)
        if chosen.sizes.length and batch == chosen.sizes.batch:
            scaled = self._long
        return self._least(chosen, s, self._events(scaled, s), reserved=False)

    def _events(self, scaled: Sequence[Scaled], s: Sizes) -> list[tuple[Strategy, list[Event]]]:
        return [(x.strategy, x.events(s)) for x in scaled]

    def _least(self, chosen: Roles, s: Sizes, steps: Iterable[tuple[Strategy, Sequence[Event]]], reserved: bool) -> int:
        given = tuple(x.numel() * x.element_size() for x in tree_leaves(chosen.resized(self.inputs, s)))
        resident = replace(self.resident, given=given)
        found = [(way, total(events, resident, self.strategy.target)) for way, events in steps]
        return min(size + (reserve(way, size, resident) if reserved else 0) for way, size in found)

    def _asked(self, chosen: Roles, scaled: Sequence[Scaled], s: Sizes) -> int:
        """What must fit: the least peak, and its reserve where there is a budget."""
        return self._least(chosen, s, self._events(scaled, s), self.lowest is not None)

    def _last(self, chosen: Roles, scaled: Sequence[Scaled], at: Callable[[int], Sizes], start: int) -> int | None:
        """The last size that fits by what is decided, and chosen to be computed again, at that size itself. `scaled`
        says where to look; where it is right, that is two captures."""
        found = self._largest(lambda n: self._asked(chosen, scaled, at(n)), start)
        options = self.strategy.captured[0].options
        assert options is not None
        if not found:
            return found

        def own(n: int) -> int:
            try:
                there = self._captured(chosen, at(n), options)
            except Exception:  # as where a table of positions ends
                return self._asked(chosen, scaled, at(n))
            if self.lowest is None:
                ways: Iterable[Strategy] = [as_decided(there, self.strategy.target, self.strategy.inlining)]
            else:
                ways = self._ways(chosen, at(n), there, options)
            steps = ((way, way.events) for way in ways)
            return self._least(chosen, at(n), steps, self.lowest is not None)

        return self._largest(own, found)

    @cached_property
    def batch(self) -> int | None:
        """The largest batch for the length given; None where nothing limits it or it is not known."""
        if self._scaled is None or not self._scaled[0].sizes.batch:
            return None
        chosen, scaled = self._scaled
        return self._last(chosen, scaled, lambda n: replace(chosen.sizes, batch=n), chosen.sizes.batch)

    @cached_property
    def length(self) -> int | None:
        """The largest length for the batch given; None also where the inputs have none."""
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
        """The last size that fits: guessed from the sizes on both sides of it, and every third time from the middle."""
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
