"""From captured graphs to the choices that a memory budget leaves: what each takes, and the first that fits.

The choices are in order of the time that they cost: the decisions as they are; every site rewritten that can be; then
more and more saved values computed again in the backward pass. The first that fits is taken, so that a smaller budget
never gives a larger peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from attnfx.capture import Captured
from attnfx.memory import knapsack
from attnfx.memory.clock import roofline_ms, step_ms
from attnfx.memory.liveness import Event, peak
from attnfx.memory.step import Part, Step, step
from attnfx.passes.liveness import flops, is_view, kind_of, near_readers, read, tensor_bytes
from attnfx.passes.recompute import closure, forward_nodes, partition
from attnfx.targets import Target

LEAST = 1 << 16  # bytes of a saved value that is worth a thought


@dataclass(frozen=True)
class Marks:
    """For one graph: names of forward values that are saved, and that are computed again. Empty: as PyTorch decides."""

    saved: frozenset[str] = frozenset()
    again: frozenset[str] = frozenset()
    dropped: Mapping[str, int] = field(default_factory=dict)  # value -> bytes that are no longer saved


@dataclass
class Choice:
    """One way to compile the graphs."""

    captured: Sequence[Captured]
    marks: Sequence[Marks]
    target: Target
    inlining: bool = True

    @cached_property
    def parts(self) -> list[Part]:
        cpu = self.target.kind == "cpu"
        return [_part(c, m, cpu, self.inlining) for c, m in zip(self.captured, self.marks)]

    @cached_property
    def step(self) -> Step:
        return step(self.parts, self.target.kind == "cpu", self.inlining)

    @cached_property
    def events(self) -> list[Event]:
        return self.step.events()

    @cached_property
    def peak(self) -> int:
        """Bytes over what is there before the step."""
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


def _part(captured: Captured, marks: Marks, cpu: bool, inlining: bool) -> Part:
    if captured.joint is None:
        assert captured.forward is not None
        return Part(read(near_readers(captured.forward) if inlining else captured.forward, cpu))
    forward, backward = partition(captured.joint, captured.arguments, marks.saved, marks.again)
    return Part(read(forward, cpu), read(backward, cpu), captured.arguments["num_fwd_outputs"])


def choices(captured: Sequence[Captured], target: Target, inlining: bool = True,
            more: Callable[[], Sequence[Captured]] | None = None) -> Iterator[Choice]:  # fmt: skip
    """The ways to compile, in order of the time they cost. `more` captures the graphs with every site rewritten."""
    first = Choice(captured, [Marks()] * len(captured), target, inlining)
    yield first
    if more is not None and any(
        s.decision is not None and s.decision.tier == "kept" for c in captured for s in c.report
    ):
        again = more()
        if len(again) == len(captured):
            second = Choice(again, [Marks()] * len(again), target, inlining)
            if second.peak < first.peak:
                yield second
                first = second
    for dropped in _steps(first):
        yield Choice(first.captured, dropped, target, inlining)


def _steps(base: Choice) -> Iterator[list[Marks]]:
    """Marks that recompute more and more."""
    sizes: dict[str, int] = {}  # "graph.base" -> bytes, of all graphs
    groups: dict[str, set[str]] = {}  # -> the saved names in that memory
    nodes = []
    for n, (captured, part) in enumerate(zip(base.captured, base.parts)):
        nodes.append({} if captured.joint is None else forward_nodes(captured.joint))
        if part.backward is None:
            continue
        bases, given = part.forward.bases(), {op.name for op in part.forward.inputs}
        size = {r.name: r.bytes for op in part.forward.ops for r in op.results}
        callers = {bases[o] for o in part.forward.outputs[: part.outputs]}
        for name in part.forward.outputs[part.outputs :]:
            where = bases[name]
            if where not in given | callers and name in nodes[n] and where in nodes[n] and size[where] >= LEAST:
                sizes[f"{n}.{where}"] = size[where]
                groups.setdefault(f"{n}.{where}", set()).add(name)
    saved = [
        set() if part.backward is None else {o for o in part.forward.outputs[part.outputs :]} for part in base.parts
    ]  # fmt: skip

    def again(dropped: frozenset[str]) -> list[tuple[set[str], set[str]]] | None:
        """For each graph (what is still saved, what runs again)."""
        out = []
        for n, names in enumerate(saved):
            gone = {x for d in dropped if d.startswith(f"{n}.") for x in groups[d]}
            kept = names - gone
            found = closure(nodes[n], gone, kept) if gone else []
            if found is None:
                return None
            out.append((kept, {f.name for f in found}))
        return out

    price: dict[str, float] = {}
    for n, held in enumerate(nodes):
        for name, node in held.items():
            if node.op == "call_function":
                price[f"{n}.{name}"] = _price(node, base.target)

    def cost(dropped: frozenset[str]) -> float | None:
        found = again(dropped)
        return None if found is None else sum(price.get(f"{n}.{x}", 0.0) for n, (_, r) in enumerate(found) for x in r)

    ordered = knapsack.order(sizes, cost)
    for prefix in knapsack.prefixes(ordered, sizes):
        made = again(frozenset(prefix))
        assert made is not None
        yield [
            Marks(frozenset(kept), frozenset(redone), {d: sizes[d] for d in prefix if d.startswith(f"{n}.")})
            if redone else Marks()
            for n, (kept, redone) in enumerate(made)
        ]  # fmt: skip


def _price(node, target: Target) -> float:  # type: ignore[no-untyped-def]
    """Milliseconds to run a node again: of a loop half the traffic, as most are inlined where they are read."""
    import torch

    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        parts = [x for x in value if isinstance(x, torch.Tensor)] if isinstance(value, (list, tuple)) else []
        if not parts:
            return 0.0
        value = parts[0]
    if is_view(node) or "getitem" in str(node.target):
        return 0.0
    moved = sum(
        tensor_bytes(x.meta["val"])
        for x in (*node.all_input_nodes, node)
        if isinstance(x.meta.get("val"), torch.Tensor)
    )
    dtype = str(value.dtype).removeprefix("torch.")
    if kind_of(node) in ("loop", "reduce"):
        return roofline_ms(0.0, moved / 2, dtype, target)
    return roofline_ms(flops(node), moved, dtype, target)


__all__ = ["Choice", "Marks", "choices"]
