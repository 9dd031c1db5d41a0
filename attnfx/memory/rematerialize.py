"""Which forward values a step saves and which it computes again: the best trades of bytes for time, in order.

For a price of `rate` picoseconds for a byte, a minimum cut is the cheapest way to have what the backward pass reads:

    source -> operation     its time: cut where it runs again
    operation -> value      rate * bytes: cut where the value is saved
    value -> reader         infinite: what runs again has its operands
    value -> sink           infinite: what the backward pass reads is there

As the rate grows, minimum cuts are nested: ever more is computed again (G. Gallo, M. Grigoriadis, R. Tarjan, "A fast
parametric maximum flow algorithm and applications", 1989). So the solutions for all rates are one sequence, the lower
hull of time over bytes. It is found by asking, between two of them, for the rate at which both cost the same
(M. Eisner, D. Severance, "Mathematical techniques for efficient record segmentation", 1976); what both have decided
alike is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import networkx

from attnfx.memory.partition import Joint
from attnfx.memory.records import Op

STEPS = 24  # solutions are looked for where two that are known lie further apart than this part of all bytes
# A value that is made earlier lives longer: at each moment at which a later one is alive, it is too. Of two that
# cost the same, its bytes count more, by up to this part.
LONGER = 1 / 16


@dataclass(frozen=True)
class Solution:
    """What runs again, the values that are there in the backward pass, and those of them that are saved.

    milliseconds   that it takes to run it
    bytes          of what is saved
    """

    again: frozenset[str]
    there: frozenset[str]
    saved: frozenset[str]
    milliseconds: float
    bytes: int


@dataclass(frozen=True)
class Trades:
    """A problem: a joint graph, and what it takes to run an operation again.

    price   milliseconds of an operation, None for one that may not run again
    """

    joint: Joint
    price: Callable[[Op], float | None]

    @cached_property
    def ops(self) -> dict[str, Op]:
        """The operations that what the backward pass reads comes from."""
        found = self.joint.closure(self.joint.needed, ())
        return {op.name: op for op in found if op.kind not in ("input", "view")}

    @cached_property
    def cost(self) -> dict[str, int | None]:
        """Picoseconds of each operation."""
        priced = {name: self.price(op) for name, op in self.ops.items()}
        return {name: None if ms is None else round(ms * 1e9) for name, ms in priced.items()}

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """The values of each operation that lie in memory of their own."""
        bases = self.joint.bases
        return {name: [r.name for r in op.results if bases[r.name] == r.name] for name, op in self.ops.items()}

    @cached_property
    def weight(self) -> dict[str, int]:
        """What the bytes of each value count; those of the caller's own cost nothing to save."""
        joint, parts = self.joint, 1 << 10
        callers = {joint.bases[o] for o in joint.graph.outputs[: joint.outputs]}
        last = max((joint.order[name] for name in self.ops), default=0) + 1
        longer = {name: round(parts * (1 + LONGER * (1 - joint.order[name] / last))) for name in self.ops}
        return {
            v: 0 if v in callers else joint.size[v] * longer[name] for name, held in self.values.items() for v in held
        }  # fmt: skip

    @cached_property
    def needed(self) -> frozenset[str]:
        return frozenset(b for v in self.joint.needed if (b := self.joint.bases[v]) in self.weight)

    @cached_property
    def reads(self) -> dict[str, list[str]]:
        bases = self.joint.bases
        return {
            name: list(dict.fromkeys(b for r in op.reads if (b := bases[r]) in self.weight))
            for name, op in self.ops.items()
        }

    def solutions(self) -> list[Solution]:
        """From the least that must run again to the least that can be saved."""
        if not self.needed:
            return []
        most = sum(self.weight.values()) + 1
        least = self._cut(most, 1, frozenset(), frozenset(), frozenset(self.ops), frozenset(self.weight))
        time = sum(c or 0 for c in self.cost.values()) + 1
        last = self._cut(1, time, least.again, least.there, frozenset(self.ops), frozenset(self.weight))
        return [least, *self._between(least, last, (least.bytes - last.bytes) / STEPS), last]

    def _between(self, one: Solution, other: Solution, gap: float) -> list[Solution]:
        (t1, w1), (t2, w2) = self._worth(one), self._worth(other)
        if one.bytes - other.bytes <= gap or w1 <= w2 or t2 <= t1:
            return []
        p, q = t2 - t1, w1 - w2  # picoseconds for a weight: p / q
        found = self._cut(q, p, one.again, one.there, other.again, other.there)
        t, w = self._worth(found)
        if t * q + w * p >= t1 * q + w1 * p:
            return []
        return [*self._between(one, found, gap), found, *self._between(found, other, gap)]

    def _worth(self, s: Solution) -> tuple[int, int]:
        return sum(self.cost[a] or 0 for a in s.again), sum(self.weight[v] for v in s.saved)

    def _cut(self, time: int, rate: int, again: frozenset[str], there: frozenset[str], may_again: Collection[str],
             may_there: Collection[str]) -> Solution:  # fmt: skip
        """The solution that is best where a picosecond counts `time` and a weight `rate`, among those that hold
        `again` and `there` and no more than `may_again` and `may_there`."""
        graph = networkx.DiGraph()
        graph.add_nodes_from(["source", "sink"])

        def run(name: str) -> object:
            return "sink" if name in again else ("run", name) if name in may_again else "source"

        def value(name: str) -> object:
            return "sink" if name in there else ("value", name) if name in may_there else "source"

        def arc(start: object, end: object, capacity: float) -> None:
            if start != end and start != "sink" and end != "source" and capacity:
                held = graph.get_edge_data(start, end, {"capacity": 0})["capacity"]
                graph.add_edge(start, end, capacity=held + capacity)

        for name in self.ops:
            cost = self.cost[name]
            arc("source", run(name), inf if cost is None else cost * time)
            for v in self.values[name]:
                arc(run(name), value(v), self.weight[v] * rate)
            for r in self.reads[name]:
                arc(value(r), run(name), inf)
        for v in self.needed:
            arc(value(v), "sink", inf)
        _, (_, after) = networkx.minimum_cut(graph, "source", "sink")
        redone = again | {x[1] for x in after if x[0] == "run"}
        held = there | {x[1] for x in after if x[0] == "value"}
        return self._solution(redone, held)

    def _solution(self, again: frozenset[str], there: frozenset[str]) -> Solution:
        made = {v for name in again for v in self.values[name]}
        wanted = self.needed | {r for name in again for r in self.reads[name]}
        saved = (there & wanted) - made
        size = sum(self.joint.size[v] for v in saved if self.weight[v])
        return Solution(again, there, saved, sum(self.cost[a] or 0 for a in again) / 1e9, size)


def together(graphs: Sequence[Sequence[Solution]]) -> Iterator[tuple[int, Solution]]:
    """The solutions of several graphs as one sequence, (which graph, its next solution): always the one that costs the
    least time for a byte. The first of each graph come first."""
    at = [0] * len(graphs)
    for n, found in enumerate(graphs):
        if found:
            yield n, found[0]
    while True:
        ready = [n for n, found in enumerate(graphs) if at[n] + 1 < len(found)]
        if not ready:
            return

        def rate(n: int) -> float:
            now, then = graphs[n][at[n]], graphs[n][at[n] + 1]
            return (then.milliseconds - now.milliseconds) / max(now.bytes - then.bytes, 1)

        best = min(ready, key=rate)
        at[best] += 1
        yield best, graphs[best][at[best]]
