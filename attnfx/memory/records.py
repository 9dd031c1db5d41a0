"""What the memory model knows of a graph: its operations as plain records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# input   a value that is there before the graph runs
# view    another look at its first operand's memory
# loop    one element of the result from a few of the operands: the compiler can inline it where it is read
# reduce  a loop that adds up (or takes the largest of) `inner` elements for each element of the result
# scatter a loop that writes to computed places, into a copy of its first operand
# kernel  anything else: it reads memory and writes memory
Kind = Literal["input", "view", "loop", "reduce", "scatter", "kernel"]


@dataclass(frozen=True)
class Result:
    """A tensor that an operation makes: its name, the bytes of its memory, if it has its own, and its dtype."""

    name: str
    bytes: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Op:
    """One operation.

    reads      names of the values it reads
    results    the values it makes: one of the operation's own name, or one for each part
    outer      elements of the result (of a loop: how often its body runs)
    inner      of a reduction: elements that go into one element of the result; else 1
    rows       the reduced dims are the last ones
    changes    names of the values that it writes into
    workspace  bytes that are alive only while it runs
    aside      of `reads`, those of which it reads not the very element that it writes: transposed, repeated, in part
    same       a copy in its operand's own layout: a compiler reads the operand instead
    heavy      an exponential or the like: a CPU does not compute it twice
    target     the operator's name
    flops      of a kernel: floating point operations
    dtype      of the result, without "torch."
    where      the module or line that it belongs to, for timelines
    """

    name: str
    kind: Kind
    reads: tuple[str, ...] = ()
    results: tuple[Result, ...] = ()
    outer: int = 1
    inner: int = 1
    rows: bool = True
    changes: tuple[str, ...] = ()
    workspace: int = 0
    aside: frozenset[str] = frozenset()
    same: bool = False
    heavy: bool = False
    target: str = ""
    flops: int = 0
    dtype: str = "float32"
    where: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its results that are read."""
        return tuple(r.name for r in self.results if not r.name.endswith("]"))


@dataclass(frozen=True)
class Graph:
    """A graph in the order of its operations. `outputs` are names; one may stand there twice."""

    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.kind == "input")

    def without_copies(self) -> Graph:
        """The graph with views in the place of copies that change nothing, as Inductor drops them: not where an output
        would come to lie in another's memory, or in an input's (remove_noop_ops in torch/_inductor/fx_passes)."""
        base = self.bases()
        outputs = {base[o] for o in self.outputs}
        apart = outputs | {op.name for op in self.inputs}

        def dropped(op: Op) -> Op:
            if not op.same or (op.name in outputs and base[op.reads[0]] in apart):
                return op
            return replace(op, kind="view", results=tuple(replace(r, bytes=0) for r in op.results))

        return Graph(tuple(map(dropped, self.ops)), self.outputs)

    def bases(self) -> dict[str, str]:
        """The value in whose memory each value lies: itself, or what it is a view of."""
        out: dict[str, str] = {}
        for op in self.ops:
            for r in op.results:
                out[r.name] = out[op.reads[0]] if op.kind == "view" and op.reads else r.name
        return out
