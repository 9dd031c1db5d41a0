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


def postorder(starts: Iterable[T], before: Callable[[T], Iterable[T]]) -> list[T]:
    """Return the starts and all nodes reachable from them, each once, after the nodes that `before` names for it."""
    seen: set[T] = set()
    found: list[T] = []
    path: list[tuple[T | None, Iterator[T]]] = [(None, iter(starts))]
    while path:
        at, rest = path[-1]
        for x in rest:
            if x not in seen:
                seen.add(x)
                path.append((x, iter(before(x))))
                break
        else:
            path.pop()
            if at is not None:
                found.append(at)
    return found
