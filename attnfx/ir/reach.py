"""Traverse the nodes of any graph: expressions, FX nodes, operations of a memory plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def reach(starts: Iterable[T], following: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """Yield the starts and all nodes reachable from them, each once, depth first and lazily."""
    stack, seen = list(starts), set()
    while stack:
        at = stack.pop()
        if at not in seen:
            seen.add(at)
            yield at
            stack.extend(following(at))
