"""Plain records of a graph's operations, the input of the memory model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# input   a value that exists before the graph runs
# view    a view of its first operand's memory
# loop    computes an element of the result from a few elements of the operands: the compiler can inline it in readers
# reduce  a loop that reduces `inner` elements (sum, maximum) to each element of the result
# scatter a loop that writes to computed indices, in a copy of its first operand
# kernel  any other operation: it reads memory and writes memory
Kind = Literal["input", "view", "loop", "reduce", "scatter", "kernel"]


@dataclass(frozen=True)
class Result:
    """A tensor computed by an operation: its name, the bytes of its own memory (0 for a view), and its dtype."""

    name: str
    bytes: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Op:
    """One operation.

    reads      names of the values it reads
    results    its results: one with the operation's name, or one for each part
    outer      elements of the result; for a loop, the number of iterations
    inner      elements that a reduction combines into one element of the result; else 1
    rows       whether the reduced dims are the last ones
    changes    names of the values that it writes into
    workspace  bytes that are alive only while it runs
    aside      values in `reads` that it reads at other elements than it writes: transposed, repeated, in part
    same       whether it is a copy in its operand's layout: a compiler reads the operand instead
    heavy      whether it is expensive, like an exponential: on a CPU it is not recomputed
    target     the operator's name
    flops      floating point operations of a kernel
    dtype      of the result; its name without "torch."
    where      its module or source line, for timelines
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
        """The names of its results that are read; the unread parts are named "name[i]"."""
        return tuple(r.name for r in self.results if not r.name.endswith("]"))


@dataclass(frozen=True)
class Graph:
    """A graph in the order of its operations. `outputs` are names, possibly repeated."""

    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.kind == "input")

    def without_copies(self) -> Graph:
        """Replace copies that change nothing by views, as Inductor drops them. A copy stays if an output would
        otherwise share the memory of another output or an input (remove_noop_ops in torch/_inductor/fx_passes)."""
        base = self.bases()
        outputs = {base[o] for o in self.outputs}
        apart = outputs | {op.name for op in self.inputs}

        def dropped(op: Op) -> Op:
            if not op.same or (op.name in outputs and base[op.reads[0]] in apart):
                return op
            return replace(op, kind="view", results=tuple(replace(r, bytes=0) for r in op.results))

        return Graph(tuple(map(dropped, self.ops)), self.outputs)

    def bases(self) -> dict[str, str]:
        """Return the value that owns each value's memory: itself, or the base of a view."""
        out: dict[str, str] = {}
        for op in self.ops:
            for r in op.results:
                out[r.name] = out[op.reads[0]] if op.kind == "view" and op.reads else r.name
        return out
