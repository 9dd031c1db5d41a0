"""Turn programs into functions of one element, as the operator takes them: score_mod, mask_mod, and values by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild
from attnfx.ir.expr import Expr, walk
from attnfx.ir.reach import reach
from attnfx.kernels.evaluate import Evaluator, Value
from attnfx.spec import AXES

Size: TypeAlias = Any  # an int or a torch.SymInt


@dataclass(frozen=True)
class Program:
    """A program whose loads are numbered by operand.

    body      the program; the slot of a load is a position in `slots`
    slots     the slot of each operand in the spec. An operand that needs a gradient is loaded from once, because
              PyTorch's backward pass takes one load of a tensor that requires a gradient
    symbolic  the names of the symbolic sizes it uses, which are operands after the slots: tensors of one int64
    """

    body: Expr
    slots: tuple[int, ...]
    symbolic: tuple[str, ...]


def program_of(body: Expr, learns: Callable[[int], bool], sizes: Mapping[str, Size]) -> Program:
    """Number the loads of a program. `learns` tells whether a slot needs a gradient."""
    numbers: dict[object, int] = {}
    slots: list[int] = []
    place: dict[Expr, int] = {}
    for e in walk(body):
        if e.op == "load":
            slot = int(e.value)  # type: ignore[call-overload]
            key = e if learns(slot) else slot
            if key not in numbers:
                numbers[key] = len(slots)
                slots.append(slot)
            place[e] = numbers[key]
    made = rebuild(body, lambda old, args: A.load(place[old], args, old.kind) if old.op == "load" else None)
    read = reach([made], lambda e: () if e.op == "var" else e.args)  # the extent of a variable is not read
    named = sorted({str(e.value) for e in read if e.op == "size"})
    return Program(made, tuple(slots), tuple(n for n in named if not isinstance(sizes[n], int)))


class _Element(Evaluator):
    """An evaluator at one index, given as a tensor per variable. `bounds` are the sizes as they are known while a graph
    is traced: they tell which loads need no bounds check."""

    def __init__(self, operands: Sequence[Tensor], sizes: Mapping[str, int | Tensor], at: Mapping[str, Tensor],
                 compute: torch.dtype, bounds: Mapping[str, Size]) -> None:  # fmt: skip
        super().__init__(operands, sizes, {}, compute, next(iter(at.values())).device)  # type: ignore[arg-type]
        self.at, self.bounds = at, bounds

    def _evaluate(self, e: Expr) -> Value:
        return self.at[str(e.value)] if e.op == "var" else super()._evaluate(e)

    def _load(self, e: Expr) -> Tensor:
        tensor = self.captures[e.value]  # type: ignore[call-overload]
        if tensor.ndim:  # an operand of one element stands for a scalar that needs a gradient
            at = e.args or (A.ZERO,)
            index = [self._index_of(a, n) for a, n in zip(at, tensor.shape)]
            tensor = torch.ops.aten.index.Tensor(tensor, index)
        kinds = {"f": self.compute, "i": torch.int64, "b": torch.bool}
        return tensor.to(kinds[e.kind])

    def _index_of(self, index: Expr, extent: Size) -> Tensor:
        """Return an index, clamped unless it is a variable that stays in range: at masked elements it may not."""
        found = self.tensor(index)
        if index.op == "var" and _within(self.bounds[AXES[str(index.value)]], extent):
            return found
        if index.op == "const" and isinstance(extent, int) and 0 <= int(index.value) < extent:  # type: ignore[call-overload]
            return found
        return found.clamp(0, extent - 1)


def _within(count: Size, extent: Size) -> bool:
    """Return whether count <= extent is known without a guard on symbolic sizes."""
    if isinstance(count, int) and isinstance(extent, int):
        return count <= extent
    return str(count) == str(extent)


def function(program: Program, variables: Sequence[str], sizes: Mapping[str, Size], compute: torch.dtype,
             scored: bool = False) -> Callable[..., Tensor]:  # fmt: skip
    """Return the program as a function of its variables, in this order, then its operands. With `scored`, the first
    argument is the value of `dot`."""

    def element(*given: Tensor) -> Tensor:
        score, given = (given[0], given[1:]) if scored else (None, given)
        at = dict(zip(variables, given))
        operands = given[len(variables) :]
        known = {name: n for name, n in sizes.items() if isinstance(n, int)}
        known.update(zip(program.symbolic, operands[len(program.slots) :]))  # type: ignore[arg-type]
        made = _Element(operands[: len(program.slots)], known, at, compute, sizes)
        if score is not None:
            made.bind(A.DOT, score.to(compute))
        return made.tensor(program.body)

    return element
