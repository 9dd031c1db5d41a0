"""Runs a row program in chunks of rows: nothing of the size of a whole score matrix exists, forward or backward.

Each chunk is the program's own ATen calls on a range of rows, so a chunk computes what eager would, to the last bit
where the operators round rows alike. The backward pass runs each chunk again under autograd, with the draws of the
forward pass, and adds the gradients of what all chunks read in float32 or better.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfx.kernels.chunked import mix
from attnfx.kernels.heap import Heap
from attnfx.rowprogram import Ref, RowProgram, from_json

# Elements of the largest value of one chunk, and the fewest rows of one. Measured on 2 cores of an AMD EPYC
# (benchmarks/rows.py: 12 heads x 4096 x 64, float32).
TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
ROWS = 16
GROWTH = 160 << 20  # bytes of freed memory that are left to the C library between chunks


class Step(NamedTuple):
    """One call made ready. `done` are the values that no later call reads."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    done: tuple[int, ...]


@dataclass(frozen=True)
class RowCall:
    """The operands of the operator, checked; `generator` is made anew for each chunk."""

    program: RowProgram
    steps: tuple[Step, ...]
    inputs: Sequence[Tensor]
    sizes: Sequence[int]
    seed: Tensor | None

    @property
    def length(self) -> int:
        return next(x.shape[d] for x, d in zip(self.inputs, self.program.inputs) if d is not None)

    def number(self, x: int | Ref, rows: int) -> int:
        if not isinstance(x, Ref):
            return x
        return rows if x.kind == "rows" else self.sizes[int(x.what)]

    def shapes(self) -> list[list[int]]:
        length = self.length
        return [[self.number(n, length) for n in r.shape] for r in self.program.results]


def prepare(program: str, inputs: Sequence[Tensor], sizes: Sequence[int], seed: Tensor | None) -> RowCall:
    """Raises ValueError for operands that do not fit the program."""
    made = from_json(program)
    if len(inputs) != len(made.inputs):
        raise ValueError(f"attnfx.attention_rows: {len(inputs)} inputs, the program needs {len(made.inputs)}")
    lengths: list[int] = []
    for n, (x, d) in enumerate(zip(inputs, made.inputs)):
        if d is not None:
            if d >= x.ndim:
                raise ValueError(
                    f"attnfx.attention_rows: inputs[{n}] has {x.ndim} dims, and its rows should lie along {d}"
                )
            lengths.append(x.shape[d])
    if not lengths or any(n != lengths[0] for n in lengths):
        raise ValueError(f"attnfx.attention_rows: the inputs have different numbers of rows: {lengths}")
    if made.random and seed is None:
        raise ValueError("attnfx.attention_rows: seed is None, but the program has dropout")
    return RowCall(made, steps(program), inputs, sizes, seed)


@lru_cache(maxsize=512)
def steps(text: str) -> tuple[Step, ...]:
    """The calls of a program, their operators looked up."""
    program = from_json(text)
    first = len(program.inputs)
    last: dict[int, int] = {}
    for n, call in enumerate(program.calls):
        for v in _values((call.args, tuple(v for _, v in call.kwargs))):
            last[v] = n
    kept = {r.value for r in program.results}
    done: dict[int, list[int]] = {}
    for v, n in last.items():
        if v not in kept and v >= first:
            done.setdefault(n, []).append(v)
    return tuple(
        Step(_operator(c.op), c.args, dict(c.kwargs), tuple(done.get(n, ()))) for n, c in enumerate(program.calls)
    )


def _values(x: Any) -> Iterator[int]:
    if isinstance(x, Ref) and x.kind in ("value", "number"):
        yield int(x.what)
    elif isinstance(x, tuple):
        for a in x:
            yield from _values(a)


def _operator(name: str) -> Callable[..., Any]:
    if name == "getitem":
        return operator.getitem
    if name == "dropout":
        return _dropout
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _dropout(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    if p >= 1.0:
        return x * torch.zeros_like(x)
    return x * torch.empty_like(x).bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


class Runner:
    """One pass over the chunks of a call."""

    def __init__(self, call: RowCall):
        self.call = call
        self.length = call.length
        self.device = next(x.device for x in call.inputs)
        self.first_seed = int(call.seed.item()) if call.program.random and call.seed is not None else 0

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(number, first row, rows): of equal size, but for the last."""
        weight = max(int(self.call.number(self.call.program.weight, self.length)), 1)
        most = max(TILE_ELEMENTS.get(self.device.type, 1 << 22) // weight, ROWS)
        count = max(-(-self.length // most), 1)
        rows = max(-(-self.length // count), 1)
        heap = Heap(GROWTH) if self.device.type == "cpu" and count > 1 else None
        for n, start in enumerate(range(0, max(self.length, 1), rows)):
            yield n, start, min(rows, self.length - start)
            if heap is not None:
                heap.trim()

    def inputs(self, start: int, rows: int) -> list[Tensor]:
        """Each input's own rows, or the whole of it."""
        along = self.call.program.inputs
        return [x if d is None else x.narrow(d, start, rows) for x, d in zip(self.call.inputs, along)]

    def run(self, number: int, start: int, rows: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The rows of each result."""
        values: list[Any] = list(inputs)
        generator = None
        if self.call.program.random:
            generator = torch.Generator(device=self.device)
            generator.manual_seed(mix(self.first_seed, number))

        def given(x: Any) -> Any:
            if isinstance(x, tuple):
                return [given(a) for a in x]
            if not isinstance(x, Ref):
                return x
            match x.kind:
                case "value":
                    return values[int(x.what)]
                case "size":
                    return self.call.sizes[int(x.what)]
                case "number":
                    return values[int(x.what)].item()
                case "rows":
                    return rows
                case "start":
                    return start + int(x.what)
                case "device":
                    return torch.device(str(x.what))
            return getattr(torch, str(x.what))

        for step in self.call.steps:
            args = [given(a) for a in step.args]
            if step.call is _dropout:
                args.append(generator)
            values.append(step.call(*args, **{k: given(a) for k, a in step.kwargs.items()}))
            for n in step.done:
                values[n] = None
        return [values[r.value] for r in self.call.program.results]


@contextmanager
def _plainly() -> Iterator[None]:
    """Casts were recorded when the program was: autocast has nothing to add."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd works, as it does not by itself inside an operator."""
    guard = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality),
    )
    with guard, torch.enable_grad():
        yield


def forward(call: RowCall) -> list[Tensor]:
    """Each result whole, contiguous."""
    run = Runner(call)
    like = call.inputs[0]
    outs = [
        torch.empty(shape, dtype=getattr(torch, r.dtype), device=like.device)
        for shape, r in zip(call.shapes(), call.program.results)
    ]
    with _plainly(), torch.no_grad():
        for number, start, rows in run.chunks():
            parts = run.run(number, start, rows, run.inputs(start, rows))
            for out, part, r in zip(outs, parts, call.program.results):
                out.narrow(r.row, start, rows).copy_(part)
    return outs


def backward(call: RowCall, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of the inputs whose `grads` is True, each as its input is, contiguous. A result without a gradient is
    None."""
    run, program = Runner(call), call.program
    wanted = [n for n, g in enumerate(program.grads) if g]
    sums = [_zeros(call.inputs[n], program.inputs[n] is None) for n in wanted]
    with _plainly():
        for number, start, rows in run.chunks():
            found = _chunk_gradients(run, grads, wanted, number, start, rows)
            if found is None:
                break
            for n, total in zip(wanted, sums):
                part, d = found.pop(n), program.inputs[n]
                if part is None:
                    continue
                if d is None:
                    total.add_(part)
                else:
                    total.narrow(d, start, rows).copy_(part)
    return [x.to(call.inputs[n].dtype) for n, x in zip(wanted, sums)]


def _chunk_gradients(
    run: Runner, grads: Sequence[Tensor | None], wanted: list[int], number: int, start: int, rows: int
) -> dict[int, Tensor | None] | None:
    """Of the inputs `wanted`, from one chunk, whose graph dies on return; None where no result depends on them."""
    program = run.call.program
    inputs = [x.detach().requires_grad_(g) for x, g in zip(run.inputs(start, rows), program.grads)]
    with _recorded():
        outs = run.run(number, start, rows, inputs)
        pairs = [
            (o, g.narrow(r.row, start, rows))
            for o, g, r in zip(outs, grads, program.results)
            if g is not None and o.requires_grad
        ]
        if not pairs:
            return None
        sources, of_outs = [inputs[n] for n in wanted], [g for _, g in pairs]
        found = torch.autograd.grad([o for o, _ in pairs], sources, of_outs, allow_unused=True)
    return dict(zip(wanted, found))


def _zeros(x: Tensor, added_up: bool) -> Tensor:
    narrow = added_up and x.dtype.itemsize < 4
    return torch.zeros(x.shape, dtype=torch.float32 if narrow else x.dtype, device=x.device)


__all__ = ["RowCall", "backward", "forward", "prepare"]
