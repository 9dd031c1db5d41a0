"""Check the operands of `attnfx::attention_rows`, and evaluate its row program on one chunk."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfx.ir.expr import Expr
from attnfx.ir.serialize import parse
from attnfx.kernels.rows.compiled_body import Factor, Place
from attnfx.mask import key_ranges
from attnfx.spec.rows import Ref, RowProgram, from_json

WIDTHS, NARROW = 4, 16  # distinct key counts of chunks if a mask leaves keys out: compiled, and call by call


class Step(NamedTuple):
    """One call of the program with its operator looked up. `done` lists the values that no later call reads."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    done: tuple[int, ...]


@dataclass(frozen=True)
class RowCall:
    """The checked operands of one call. `text` is the program's JSON text."""

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
        """Return each input's key dim if chunks take only some keys, else None."""
        return self.program.live.columns if self.program.live else [None] * len(self.inputs)

    def keys(self, rows: int) -> list[tuple[int, int]] | None:
        """Return the first key and the number of keys of each chunk of `rows` rows, or None if chunks take all keys.
        There are few distinct numbers of keys, because each needs its own compiled body."""
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

    def outputs(self) -> list[Tensor]:
        """Allocate the whole results."""
        like, length, out = self.inputs[0], self.length, []
        for r in self.program.results:
            shape = [self.number(n, length) for n in r.shape]
            order = r.order or range(len(shape))
            made = like.new_empty([shape[d] for d in order], dtype=getattr(torch, r.dtype))
            out.append(made.permute([list(order).index(d) for d in range(len(shape))]) if r.order else made)
        return out


def prepare(program: str, inputs: Sequence[Tensor], sizes: Sequence[int], seed: Tensor | None) -> RowCall:
    """Check the operands of a program and prepare its calls. Raise ValueError for operands that do not fit."""
    made = from_json(program)
    if len(inputs) != len(made.inputs):
        raise ValueError(f"attnfx.attention_rows: inputs has {len(inputs)} tensors, expected {len(made.inputs)}")
    lengths: list[int] = []
    for n, (x, d) in enumerate(zip(inputs, made.inputs)):
        if d is not None:
            if d >= x.ndim:
                raise ValueError(
                    f"attnfx.attention_rows: inputs[{n}] has {x.ndim} dims, but its rows should be dim {d}"
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
    """Parse a program into its calls and look up their operators."""
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
    """Compute tril or triu of some rows. In a compiled body, which all chunks share, the diagonal is a tensor."""
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
    """Compute some rows of each result from the same rows of the inputs."""
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
