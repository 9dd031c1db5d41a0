"""Which saved values to compute again instead: those whose bytes cost the least time, step by step."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

STEPS = 8  # choices between saving all and recomputing all that can be


def order(items: Mapping[str, int], cost: Callable[[frozenset[str]], float | None]) -> list[str]:
    """The items to drop, in order: each time the one that costs least for a byte, given those dropped before it.

    items  name -> bytes won
    cost   the time that it takes to have all of a set again; None where that cannot be
    """
    dropped: list[str] = []
    spent = 0.0
    heap = []
    for name, size in items.items():
        price = cost(frozenset([name]))
        if size > 0 and price is not None:
            heap.append((price / size, name))
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        price = cost(frozenset([*dropped, name]))
        if price is None:
            continue
        rate = (price - spent) / items[name]
        if heap and rate > heap[0][0] * (1 + 1e-9):  # it has become dearer: what it needs has been dropped too
            heapq.heappush(heap, (rate, name))
            continue
        dropped.append(name)
        spent = price
    return dropped


def prefixes(dropped: Sequence[str], items: Mapping[str, int], steps: int = STEPS) -> list[list[str]]:
    """Growing parts of the list, at equal shares of the bytes."""
    total, now, out = sum(items[d] for d in dropped), 0, []
    for n, name in enumerate(dropped):
        now += items[name]
        while len(out) < steps and now * steps >= total * (len(out) + 1):
            if not out or len(out[-1]) != n + 1:
                out.append(list(dropped[: n + 1]))
            else:
                out.append(out[-1])
    return [p for n, p in enumerate(out) if n == 0 or len(p) > len(out[n - 1])]
