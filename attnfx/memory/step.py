"""A whole step as phases: every graph's forward pass, then their backward passes in reverse, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnfx.memory.fusion import Kernel, fused, unfused
from attnfx.memory.liveness import Event, Phase, events
from attnfx.memory.ops import Graph, Result


@dataclass(frozen=True)
class Part:
    """What one graph of Dynamo is compiled to.

    forward   its forward pass
    backward  its backward pass, or None; an input of it bears the name of the forward value that it is
    outputs   how many of the forward pass's outputs are the caller's; the rest is saved for the backward pass
    """

    forward: Graph
    backward: Graph | None = None
    outputs: int = 0

    def resized(self, size: Callable[[str, int], int]) -> Part:
        """The same with other sizes: `size(name, bytes)` gives a value's bytes."""
        backward = None if self.backward is None else _resized(self.backward, size)
        return Part(_resized(self.forward, size), backward, self.outputs)


def _resized(graph: Graph, size: Callable[[str, int], int]) -> Graph:
    ops = tuple(
        replace(
            op, results=tuple(replace(r, bytes=size(r.name, r.bytes)) for r in op.results),
            workspace=size(op.results[0].name, op.workspace) if op.results else 0,
        )
        for op in graph.ops
    )  # fmt: skip
    return Graph(ops, graph.outputs)


@dataclass(frozen=True)
class Step:
    """The phases of a step, and its kernels' bytes that are written and read."""

    phases: tuple[Phase, ...]
    saved: Mapping[str, int]  # what is kept for backward passes, in bytes

    def events(self) -> list[Event]:
        return events(self.phases)


def step(parts: Sequence[Part], cpu: bool, inlining: bool = True) -> Step:
    """The phases of the graphs' passes. `inlining` is whether the compiler fuses (else each operation is a kernel)."""
    forward: list[Phase] = []
    backward: list[Phase] = []
    saved: dict[str, int] = {}
    for n, part in enumerate(parts):
        prefix, number = f"{n}.", f" {n}" if len(parts) > 1 else ""
        base = part.forward.bases()
        values = {r.name: r for op in part.forward.ops for r in op.results}
        given = {op.name for op in part.forward.inputs}
        kept = {base[o] for o in part.forward.outputs} - given
        callers = {base[o] for o in part.forward.outputs[: part.outputs]} if part.backward is not None else kept

        def forward_name(value: str, prefix: str = prefix) -> str:
            return prefix + value

        kernels = _kernels(part.forward, cpu, inlining, forward_name)
        how: dict[str, Any] = dict(batched=cpu and inlining, reuses=inlining)
        forward.append(Phase(f"forward{number}", kernels, frozenset(map(forward_name, kept)), **how))
        if part.backward is None:
            continue
        leaves = sorted(kept - callers)
        saved |= {forward_name(v): values[v].bytes for v in leaves}
        own = part.backward.bases()
        held = {op.name: base[op.name] for op in part.backward.inputs if op.name in base}

        def backward_name(value: str, held: dict[str, str] = held, prefix: str = prefix) -> str:
            return prefix + held.get(value, f"backward.{value}")

        arrive = {
            backward_name(op.name): op.results[0].bytes for op in part.backward.inputs if op.name not in held
        }  # fmt: skip
        stays = {backward_name(own[o]) for o in part.backward.outputs} | set(map(forward_name, callers | given))
        backward.append(Phase(
            f"backward{number}", _kernels(part.backward, cpu, inlining, backward_name), frozenset(stays),
            tuple(replace(values[v], name=forward_name(v)) for v in leaves), arrive, **how,
        ))  # fmt: skip
    return Step((*forward, *reversed(backward)), saved)


def _kernels(graph: Graph, cpu: bool, inlining: bool, name: Callable[[str], str]) -> tuple[Kernel, ...]:
    def renamed(results: Iterable[Result]) -> tuple[Result, ...]:
        return tuple(replace(r, name=name(r.name)) for r in results)

    made = fused(graph, cpu) if inlining else unfused(graph)
    return tuple(
        replace(
            k, reads=tuple(map(name, k.reads)), changes=tuple(map(name, k.changes)), writes=renamed(k.writes),
            inner=renamed(k.inner), over={name(w): tuple(map(name, v)) for w, v in k.over.items()},
        )
        for k in made
    )  # fmt: skip
