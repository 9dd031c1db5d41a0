"""Build a whole step from phases: every graph's forward pass, then the backward passes in reverse order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from attnfx.memory.fusion import fused, unfused
from attnfx.memory.liveness import Event, Phase, events
from attnfx.memory.records import Graph, Op, Result
from attnfx.memory.schedule import best

# torch/_inductor/utils.py, is_nonfreeable_buffers
NEVER_FREED = ("primals_", "arg", "fwd_rng_state", "bwd_rng_state", "tangents")


@dataclass(frozen=True)
class Part:
    """The graphs to which one graph of Dynamo is compiled.

    forward   its forward pass
    backward  its backward pass, or None; an input that is a forward value has that value's name
    outputs   number of the forward pass's outputs that are the caller's; the rest is saved for the backward pass
    """

    forward: Graph
    backward: Graph | None = None
    outputs: int = 0

    def resized(self, other: Callable[[Op], Op]) -> Part:
        """Replace each operation by `other(op)`."""
        return self.converted(lambda graph: Graph(tuple(map(other, graph.ops)), graph.outputs))

    def converted(self, of: Callable[[Graph], Graph]) -> Part:
        """Replace each graph by `of(graph)`."""
        return Part(of(self.forward), None if self.backward is None else of(self.backward), self.outputs)


@dataclass(frozen=True)
class Step:
    """The phases of a step, and the values that it saves."""

    phases: tuple[Phase, ...]
    saved: Mapping[str, int]  # value kept for a backward pass -> bytes

    def events(self) -> list[Event]:
        return events(self.phases)


def step(parts: Sequence[Part], cpu: bool, inlining: bool = True) -> Step:
    """Return the phases of the graphs' passes; without `inlining`, each operation is a kernel."""
    forward: list[Phase] = []
    backward: list[Phase] = []
    saved: dict[str, int] = {}
    for n, part in enumerate(parts):
        if inlining:
            part = part.converted(Graph.without_copies)
        prefix, number = f"{n}.", f" {n}" if len(parts) > 1 else ""
        base = part.forward.bases()
        values = {r.name: r for op in part.forward.ops for r in op.results}
        given = {op.name for op in part.forward.inputs}
        kept = {base[o] for o in part.forward.outputs} - given
        callers = {base[o] for o in part.forward.outputs[: part.outputs]} if part.backward is not None else kept
        forward_name = partial(operator.add, prefix)
        stays = frozenset(map(forward_name, kept))
        forward.append(_phase(f"forward{number}", part.forward, stays, cpu, inlining, forward_name))
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
        gradients = {backward_name(own[o]) for o in part.backward.outputs}
        backward.append(_phase(
            f"backward{number}", part.backward, frozenset(gradients | set(map(forward_name, callers | given))), cpu,
            inlining, backward_name,
            released=tuple(replace(values[v], name=forward_name(v)) for v in leaves), arrives=arrive,
        ))  # fmt: skip
    return Step((*forward, *reversed(backward)), saved)


def _phase(name: str, graph: Graph, kept: frozenset[str], cpu: bool, inlining: bool, rename: Callable[[str], str],
           **more: Any) -> Phase:  # fmt: skip
    """Return the phase of a graph, its kernels in the compiler's order; names in `kept` and `more` are final."""

    def renamed(results: Iterable[Result]) -> tuple[Result, ...]:
        return tuple(replace(r, name=rename(r.name)) for r in results)

    if inlining:
        base = graph.bases()
        # Inductor only goes by the names of inputs, so it counts saved views of parameters as memory that it will free
        given = {op.name: op.results[0].bytes for op in graph.inputs if not op.name.startswith(NEVER_FREED)}
        schedule = best(fused(graph, cpu), given, {base[o] for o in graph.outputs})
        made, more = schedule.kernels(), more | {"alive": tuple(schedule.alive()), "batched": cpu}
    else:
        made = dict(enumerate(unfused(graph)))
    kernels = tuple(
        replace(
            k, reads=tuple(map(rename, k.reads)), changes=tuple(map(rename, k.changes)), writes=renamed(k.writes),
            inner=renamed(k.inner), over={rename(w): tuple(map(rename, v)) for w, v in k.over.items()},
        )
        for k in made.values()
    )  # fmt: skip
    return Phase(name, kernels, kept, places=tuple(made), **more)
