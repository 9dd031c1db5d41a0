"""List the strategies to compile captured graphs under a memory budget, in order of the time that they cost.

The strategies are: the decisions as they are; every possible site rewritten; dead memory released at once; then more
and more of the forward pass recomputed in the backward pass. Each of the last two is tried with smaller and smaller
chunks of attention. The first strategy that fits is chosen, so a smaller budget never gives a larger peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from attnfx.memory.liveness import Event, peak
from attnfx.memory.partition import Joint
from attnfx.memory.records import Op
from attnfx.memory.rematerialize import Solution, Trades, together
from attnfx.memory.roofline import roofline_ms, step_ms
from attnfx.memory.step import Part, Step, step
from attnfx.passes.joint.chunk_limit import workspaces
from attnfx.passes.joint.mark_recompute import partition
from attnfx.passes.joint.read_graph import near_readers, read
from attnfx.passes.joint.read_joint import joint_records
from attnfx.planning.capture import Captured
from attnfx.targets import Target

# Chunk sizes to try, in scores, by device: an eighth and a thirty-second of a tile of kernels/chunked/blocks.py. On a
# CPU the former took as long as the whole tile, the latter 1.0 to 2.1 times as long (256 and 2048 keys).
CHUNKS = {"cpu": (1 << 17, 1 << 15), "cuda": (1 << 23, 1 << 21)}


@dataclass(frozen=True)
class Marks:
    """Names of the forward values that one graph saves, and of the operations that it recomputes. If empty, PyTorch
    decides."""

    saved: frozenset[str] = frozenset()
    again: frozenset[str] = frozenset()
    dropped: Mapping[str, int] = field(default_factory=dict)  # value -> bytes that are no longer saved


@dataclass
class Strategy:
    """One way to compile the graphs; `parts` has the results.

    chunk   the most scores that the chunked tier computes at once; 0 for its own choice
    waits   whether dead memory may wait for a later value of its size and dtype, which is Inductor's default
    """

    captured: Sequence[Captured]
    parts: Sequence[Part]
    marks: Sequence[Marks]
    target: Target
    inlining: bool = True
    chunk: int = 0
    waits: bool = True

    def step_of(self, parts: Sequence[Part]) -> Step:
        """Return the step of such graphs, possibly at other sizes."""
        made = step(parts, self.target.kind == "cpu", self.inlining)
        return made if self.waits else replace(made, phases=tuple(replace(p, alive=()) for p in made.phases))

    @cached_property
    def step(self) -> Step:
        return self.step_of(self.parts)

    @cached_property
    def events(self) -> list[Event]:
        return self.step.events()

    @cached_property
    def peak(self) -> int:
        """Most bytes beyond those allocated before the step."""
        return peak(self.events)

    @cached_property
    def milliseconds(self) -> float:
        sizes = {
            f"{n}.{op.name}": op.results[0].bytes for n, part in enumerate(self.parts) for op in part.forward.inputs
        }
        return step_ms(self.step.phases, sizes, self.target)

    @property
    def recomputed(self) -> dict[str, int]:
        return {name: size for m in self.marks for name, size in m.dropped.items()}


def strategies(captured: Sequence[Captured], target: Target, inlining: bool,
               more: Callable[[], Sequence[Captured]]) -> Iterator[Strategy]:  # fmt: skip
    """Yield the ways to compile, in order of the time they cost. Each has a smaller peak than all before it; only the
    way that releases dead memory at once is always included. `more` captures the graphs with every site rewritten."""
    best = as_decided(captured, target, inlining)
    yield best
    least = best.peak
    if any(s.decision is not None and s.decision.tier == "kept" for c in captured for s in c.report):
        again = more()
        if len(again) == len(captured):
            other = as_decided(again, target, inlining)
            if other.peak < least:
                yield other
                best, least = other, other.peak
    base, sizes = replace(best, waits=False) if inlining else best, _chunks(best)
    if base is not best:
        yield base  # its predicted peak is closer to measurements
        least = min(least, base.peak)

    def ways() -> Iterator[Strategy]:
        yield base
        for marks, parts in _recomputing(base):
            yield replace(base, parts=parts, marks=marks)

    for way in ways():
        for one in (way, *(_in_chunks(way, size, found) for size, found in sizes)):
            if one.peak < least:
                least = one.peak
                yield one


def _chunks(base: Strategy) -> list[tuple[int, list[dict[str, int]]]]:
    """Return (chunk size, workspaces of each graph's chunked attention) for the sizes that reduce a workspace."""
    cpu, out = base.target.kind == "cpu", []
    for size in CHUNKS["cpu" if cpu else "cuda"]:
        found = [workspaces(c.graph, size, cpu) for c in base.captured]
        if any(found):
            out.append((size, found))
    return out


def _in_chunks(way: Strategy, size: int, found: Sequence[Mapping[str, int]]) -> Strategy:
    def limited(taken: Mapping[str, int], op: Op) -> Op:
        return replace(op, workspace=taken.get(op.name, op.workspace))

    parts = [part.resized(partial(limited, taken)) for part, taken in zip(way.parts, found)]
    return replace(way, parts=parts, chunk=size)


def as_decided(captured: Sequence[Captured], target: Target, inlining: bool) -> Strategy:
    """Return the strategy with the graphs as they are, and with the saved values chosen by PyTorch."""
    cpu, parts = target.kind == "cpu", []
    for c in captured:
        if c.arguments is None:
            parts.append(Part(read(near_readers(c.graph) if inlining else c.graph, cpu)))
        else:
            forward, backward = partition(c.graph, c.arguments)
            parts.append(Part(read(forward, cpu), read(backward, cpu), c.arguments["num_fwd_outputs"]))
    return Strategy(captured, parts, [Marks()] * len(parts), target, inlining)


def _recomputing(base: Strategy) -> Iterator[tuple[list[Marks], list[Part]]]:
    """Yield marks and graphs with more and more recomputation, always at the least time per byte."""
    joints: dict[int, Joint] = {}
    solutions: list[list[Solution]] = []
    for n, (captured, part) in enumerate(zip(base.captured, base.parts)):
        solutions.append([])
        if captured.arguments is not None and part.backward is not None:
            joints[n], fixed = joint_records(captured.graph, captured.arguments, base.target.kind == "cpu")
            solutions[n] = Trades(joints[n], _prices(joints[n], fixed, part, base.target)).solutions()
    parts, marks = list(base.parts), list(base.marks)
    for n, found in together(solutions):
        joint = joints[n]
        parts[n] = made = joint.split(found.saved)
        assert made.backward is not None
        again = [op for op in made.backward.ops if op.name not in joint.later and op.kind != "input"]
        prefix = f"{n}."
        before = {v.removeprefix(prefix): size for v, size in base.step.saved.items() if v.startswith(prefix)}
        dropped = {f"{prefix}{v}": size for v, size in before.items() if v not in found.saved}
        names = frozenset(x for op in again for x in (op.name, *op.parts))
        marks[n] = Marks(found.saved, names, dropped)
        yield list(marks), list(parts)


def _prices(joint: Joint, fixed: frozenset[str], part: Part, target: Target) -> Callable[[Op], float | None]:
    """Return a function for the milliseconds to run an operation again, None for one that may not run again. An
    operation that PyTorch recomputes anyway costs nothing. A loop costs half its traffic: most are inlined in their
    readers."""
    assert part.backward is not None
    twice = {op.name for op in part.forward.ops} & {op.name for op in part.backward.ops if op.kind != "input"}

    def price(op: Op) -> float | None:
        if op.name in fixed:
            return None
        if op.name in twice:
            return 0.0
        moved = sum(joint.size[joint.bases[r]] for r in op.reads) + sum(r.bytes for r in op.results)
        if op.kind in ("loop", "reduce"):
            return roofline_ms(0.0, moved / 2, op.dtype, target)
        return roofline_ms(op.flops, moved, op.dtype, target)

    return price
