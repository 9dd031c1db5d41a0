"""Runs a row program in chunks of rows: nothing of the size of a whole score matrix exists, forward or backward.

Each chunk is the program's own ATen calls on a range of rows, so a chunk computes what eager would, to the last bit
where the operators round rows alike. The backward pass runs each chunk again under autograd, with the draws of the
forward pass, and adds the gradients of what all chunks read in float32 or better.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfx.ir.expr import Expr
from attnfx.ir.text import parse
from attnfx.kernels import bodies
from attnfx.kernels.bodies import Factor, Place
from attnfx.kernels.chunked import mix
from attnfx.kernels.heap import Heap
from attnfx.mask import key_ranges
from attnfx.rowprogram import Ref, RowProgram, from_json

# Elements of the largest value of one chunk, and the fewest rows of one. Measured on 2 cores of an AMD EPYC
# (benchmarks/rows.py: 12 heads x 4096 x 64, float32).
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
ROWS = 16
WIDTHS, NARROW = 4, 16  # how many numbers of keys chunks have, where masks leave some out: compiled, and call by call
GROWTH = 160 << 20  # bytes of freed memory that are left to the C library between chunks

Draw = Callable[[torch.Size, torch.dtype, float], Tensor]


class Chunk(NamedTuple):
    """`rows` rows from `start` on, and of what has keys the `columns` from `first` on; `inputs` are each input's
    own rows and keys, or the whole of it."""

    number: int
    rows: int
    columns: int
    start: int
    first: int
    inputs: list[Tensor]

    @property
    def place(self) -> Place:
        return Place(self.rows, self.columns, self.start, self.start - self.first)

    def of(self, x: Tensor, row: int | None, column: int | None = None) -> Tensor:
        """The chunk's part of a whole tensor, whose rows and keys lie along `row` and `column`."""
        x = x if row is None else x.narrow(row, self.start, self.rows)
        return x if column is None else x.narrow(column, self.first, self.columns)


class Step(NamedTuple):
    """One call made ready. `done` are the values that no later call reads."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    done: tuple[int, ...]


@dataclass(frozen=True)
class RowCall:
    """The operands of the operator, checked; `text` is the program's."""

    text: str
    program: RowProgram
    steps: tuple[Step, ...]
    inputs: Sequence[Tensor]
    sizes: Sequence[int]
    seed: Tensor | None

    @property
    def length(self) -> int:
        return next(x.shape[d] for x, d in zip(self.inputs, self.program.inputs) if d is not None)

    @property
    def columns(self) -> Sequence[int | None]:
        """For each input the dimension that its keys lie along, where chunks take some keys only."""
        return self.program.live.columns if self.program.live else [None] * len(self.inputs)

    def keys(self, rows: int) -> list[tuple[int, int]] | None:
        """For each chunk of `rows` rows its first key and how many it takes, None where it takes all. Of few different
        numbers: a body is made for each."""
        live = self.program.live
        if live is None or not self.length:
            return None
        count = next(x.shape[d] for x, d in zip(self.inputs, live.columns) if d is not None)
        step = -(-count // (WIDTHS if self.program.compiled else NARROW)) or 1
        least = min(max(live.least, 1), count)
        found = []
        for r in key_ranges(_score(live.score), {"B": 1, "H": 1, "T": self.length, "S": count}, rows):
            first = min(r.j0 // step * step, count - least)
            last = min(max(-(-r.j1 // step) * step, first + -(-least // step) * step), count)
            found.append((first, last - first))
        return found

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
    return RowCall(program, made, steps(program), inputs, sizes, seed)


@lru_cache(maxsize=512)
def _score(text: str) -> Expr:
    return parse(json.loads(text))[0]


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
    if name in OWN:
        return OWN[name]
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _dropout(x: Tensor, p: float, factor: Factor) -> Tensor:
    return x * factor(x, p)


def _triangle(lower: bool, x: Tensor, diagonal: int | Tensor = 0) -> Tensor:
    """Of rows whose first one decides the diagonal: a tensor in a body, which is one for all chunks."""
    if not isinstance(diagonal, Tensor):
        return x.tril(diagonal) if lower else x.triu(diagonal)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape[-2:])
    distance = columns - rows[:, None] - diagonal
    return torch.where(distance <= 0 if lower else distance >= 0, x, 0)


OWN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "dropout": _dropout,
    "tril.default": partial(_triangle, True),
    "triu.default": partial(_triangle, False),
}


def evaluate(call: RowCall, place: Place, inputs: Sequence[Tensor], factor: Factor) -> list[Tensor]:
    """Some rows of each result, from the same rows of the inputs."""
    values: list[Any] = list(inputs)

    def given(x: Any) -> Any:
        if isinstance(x, tuple):
            return [given(a) for a in x]
        if not isinstance(x, Ref):
            return x
        match x.kind:
            case "value":
                return values[int(x.what)]
            case "size":
                return call.sizes[int(x.what)]
            case "number":
                return values[int(x.what)].item()
            case "rows":
                return place.rows
            case "columns":
                return place.columns
            case "start":
                return place.start + int(x.what)
            case "corner":
                return place.corner + int(x.what)
            case "device":
                return torch.device(str(x.what))
        return getattr(torch, str(x.what))

    for step in call.steps:
        args = [given(a) for a in step.args]
        if step.call is _dropout:
            args.append(factor)
        values.append(step.call(*args, **{k: given(a) for k, a in step.kwargs.items()}))
        for n in step.done:
            values[n] = None
    return [values[r.value] for r in call.program.results]


class Runner:
    """One pass over the chunks of a call."""

    def __init__(self, call: RowCall):
        self.call = call
        self.length = call.length
        self.device = next(x.device for x in call.inputs)
        self.first_seed = int(call.seed.item()) if call.program.random and call.seed is not None else 0
        self.rows = self._rows()

    def _rows(self) -> int:
        weight = max(int(self.call.number(self.call.program.weight, self.length)), 1)
        most = max(TILE_ELEMENTS.get(self.device.type, 1 << 22) // weight, ROWS)
        count = max(-(-self.length // most), 1)
        return max(-(-self.length // count), 1)

    def chunks(self) -> Iterator[Chunk]:
        """All of `rows` rows, but for the last."""
        call, several = self.call, self.rows < self.length
        heap = Heap(GROWTH) if self.device.type == "cpu" and several else None
        keys = call.keys(self.rows)
        for n, start in enumerate(range(0, max(self.length, 1), self.rows)):
            rows = min(self.rows, self.length - start)
            first, columns = keys[n] if keys else (0, 0)
            chunk = Chunk(n, rows, columns, start, first, [])
            yield chunk._replace(
                inputs=[chunk.of(x.detach(), d, c) for x, d, c in zip(call.inputs, call.program.inputs, call.columns)]
            )
            if heap is not None:
                heap.trim()

    def forward(self, chunk: Chunk) -> Sequence[Tensor | None]:
        """The chunk's rows of each result."""
        draw = self._draw(chunk)
        if self._has_body(chunk):
            body = bodies.forward(self.call.text, self._evaluate, chunk.place, chunk.inputs)
            if body is not None:
                return body(chunk.place, chunk.inputs, [], draw)
        with torch.no_grad():
            return self._evaluate(chunk.place, chunk.inputs, _factor(draw))

    def backward(self, chunk: Chunk, wanted: list[int], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients of the chunk's inputs `wanted`, from those of whole results; None where none of these depends on
        one."""
        of_rows = [None if g is None else chunk.of(g, r.row) for g, r in zip(grads, self.call.program.results)]
        draw = self._draw(chunk)
        if self._has_body(chunk):
            body = bodies.backward(self.call.text, self._evaluate, chunk.place, chunk.inputs, wanted, of_rows)
            if body is not None:
                with torch.no_grad():
                    return body(chunk.place, chunk.inputs, [g for g in of_rows if g is not None], draw)
        with _recorded():
            factor = _factor(draw)
            return bodies.gradients(lambda x: self._evaluate(chunk.place, x, factor), chunk.inputs, wanted, of_rows)

    def _has_body(self, chunk: Chunk) -> bool:
        """The last chunk's rows may be fewer: it runs without, which costs less than to compile another."""
        return self.call.program.compiled and chunk.rows == self.rows

    def _evaluate(self, place: Place, inputs: Sequence[Tensor], factor: Factor) -> list[Tensor]:
        return evaluate(self.call, place, inputs, factor)

    def _draw(self, chunk: Chunk) -> Draw:
        """Gives the factors of a dropout, call for call those of the other pass."""
        generator: torch.Generator | None = None

        def draw(shape: torch.Size, dtype: torch.dtype, p: float) -> Tensor:
            nonlocal generator
            if generator is None:
                generator = torch.Generator(device=self.device)
                generator.manual_seed(mix(self.first_seed, chunk.number))
            if p >= 1.0:
                return torch.zeros(shape, dtype=dtype, device=self.device)
            kept = torch.empty(shape, dtype=dtype, device=self.device).bernoulli_(1.0 - p, generator=generator)
            return kept.div_(1.0 - p)

        return draw


def _factor(draw: Draw) -> Factor:
    return lambda x, p: draw(x.shape, x.dtype, p)


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
        for chunk in run.chunks():
            for out, part, r in zip(outs, run.forward(chunk), call.program.results):
                chunk.of(out, r.row).copy_(part)
    return outs


def backward(call: RowCall, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of the inputs whose `grads` is True, each as its input is, contiguous. A result without a gradient is
    None."""
    run, program = Runner(call), call.program
    wanted = [n for n, g in enumerate(program.grads) if g]
    sums: dict[int, Tensor] = {}
    with _plainly():
        for chunk in run.chunks():
            for n, part in zip(wanted, run.backward(chunk, wanted, grads)):
                if part is None:
                    continue
                d, c = program.inputs[n], call.columns[n]
                if n not in sums and d is None and c is None:
                    sums[n] = part.to(_wide(part.dtype), copy=True)
                    continue
                if n not in sums:
                    like = call.inputs[n]
                    made = torch.empty if c is None else torch.zeros
                    sums[n] = made(
                        like.shape, dtype=like.dtype if d is not None else _wide(like.dtype), device=like.device
                    )
                own = chunk.of(sums[n], d, c)
                own.add_(part) if d is None else own.copy_(part)
    return [
        sums[n].to(x.dtype).contiguous() if n in sums else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for n, x in ((n, call.inputs[n]) for n in wanted)
    ]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What gradients are added up in."""
    return torch.float32 if dtype.itemsize < 4 else dtype


__all__ = ["RowCall", "backward", "forward", "prepare"]
