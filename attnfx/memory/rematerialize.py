"""Choose the forward values that a step saves or recomputes: the best trades of bytes for time, in order.

At a price of `rate` picoseconds per byte, a minimum cut is the cheapest way to provide all values that the backward
pass reads:

    source -> operation     its time: cut if it runs again
    operation -> value      rate * bytes: cut if the value is saved
    value -> reader         infinite: an operation that runs again has its operands
    value -> sink           infinite: a value that the backward pass reads is available

As the rate grows, minimum cuts are nested: more and more is recomputed (G. Gallo, M. Grigoriadis, R. Tarjan, "A fast
parametric maximum flow algorithm and applications", 1989). So the solutions for all rates are one sequence, the lower
hull of time over bytes. Between two known solutions, the search solves the cut at the rate at which both cost the same
(M. Eisner, D. Severance, "Mathematical techniques for efficient record segmentation", 1976). Decisions on which both
agree are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import networkx

from attnfx.memory.partition import Joint
from attnfx.memory.records import Op

STEPS = 24  # the search stops between two solutions that differ by at most 1 / STEPS of the range of bytes
# A value that is computed earlier lives longer: it is alive whenever a later one is. To break ties, its bytes count
# more, by up to this share.
LONGER = 1 / 16


@dataclass(frozen=True)
class Solution:
    """A choice of values to save.

    again          operations that run again
    there          values that are available in the backward pass
    saved          the saved ones among them
    milliseconds   time of the operations that run again
    bytes          of the saved values
    """

    again: frozenset[str]
    there: frozenset[str]
    saved: frozenset[str]
    milliseconds: float
    bytes: int


@dataclass(frozen=True)
class Trades:
    """The problem: a joint graph, and the price of running its operations again.

    price   milliseconds of an operation; None if it may not run again
    """

    joint: Joint
    price: Callable[[Op], float | None]

    @cached_property
    def ops(self) -> dict[str, Op]:
        """The operations that compute the values that the backward pass reads."""
        found = self.joint.closure(self.joint.needed, ())
        return {op.name: op for op in found if op.kind not in ("input", "view")}

    @cached_property
    def cost(self) -> dict[str, int | None]:
        """Picoseconds of each operation."""
        priced = {name: self.price(op) for name, op in self.ops.items()}
        return {name: None if ms is None else round(ms * 1e9) for name, ms in priced.items()}

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """The values of each operation that own memory."""
        bases = self.joint.bases
        return {name: [r.name for r in op.results if bases[r.name] == r.name] for name, op in self.ops.items()}

    @cached_property
    def weight(self) -> dict[str, int]:
        """The weight of each value's bytes; values that the caller keeps anyway weigh nothing."""
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
        """Return the solutions, from the least recomputation to the fewest saved bytes."""
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
        """Return the best solution if a picosecond costs `time` and a unit of weight costs `rate`. It contains all of
        `again` and `there`, and beyond these only members of `may_again` and `may_there`."""
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
        again |= {x[1] for x in after if x[0] == "run"}
        there |= {x[1] for x in after if x[0] == "value"}
        made = {v for name in again for v in self.values[name]}
        wanted = self.needed | {r for name in again for r in self.reads[name]}
        saved = (there & wanted) - made
        size = sum(self.joint.size[v] for v in saved if self.weight[v])
        return Solution(again, there, saved, sum(self.cost[a] or 0 for a in again) / 1e9, size)


def together(graphs: Sequence[Sequence[Solution]]) -> Iterator[tuple[int, Solution]]:
    """Merge the solutions of several graphs into one sequence of (index of the graph, its next solution). The first
    solution of each graph comes first, then always the one that costs the least time per byte."""
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
