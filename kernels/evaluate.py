"""Evaluate expressions as tensors over a block of indices, and accumulate the gradients of their captures.

A value is a tensor that broadcasts over the block: dim -4 is b, -3 is h, -2 is i, -1 is j. An expression that does not
depend on an index has size 1 in its dim. Constants and sizes stay Python scalars until they meet a tensor. ATen's own
operators compute floats in the compute type and in the program's order. An integer computed through floats therefore
rounds as in the original graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir.expr import FLOAT, INT, Expr, walk
from attnfx.ir.toeplitz import OPAQUE, SPAN, opaque, toeplitz

Value = Tensor | bool | int | float


class Axis(NamedTuple):
    """The range [start, stop) of a variable, and its dim (negative, counted from the end)."""

    start: int
    stop: int
    dim: int


def block_axes(b: tuple[int, int], h: tuple[int, int], i: tuple[int, int], j: tuple[int, int]) -> dict[str, Axis]:
    return {"b": Axis(*b, -4), "h": Axis(*h, -3), "i": Axis(*i, -2), "j": Axis(*j, -1)}


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "recip": torch.reciprocal, "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log,
    "log2": torch.log2, "log1p": torch.log1p, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sqrt": torch.sqrt,
    "sin": torch.sin, "cos": torch.cos, "erf": torch.erf, "floor": torch.floor, "ceil": torch.ceil,
    "round": torch.round, "trunc": torch.trunc, "atan": torch.atan, "softplus": torch.nn.functional.softplus,
    "abs": torch.abs, "sign": torch.sign,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "floordiv": torch.floor_divide, "mod": torch.remainder, "pow": torch.pow, "min": torch.minimum,
    "max": torch.maximum, "lt": torch.lt, "le": torch.le, "eq": torch.eq,
}  # fmt: skip
_PLAIN: dict[str, Callable] = {"add": operator.add, "mul": operator.mul, "and": operator.and_, "or": operator.or_}
_SINGLE: dict[str, Callable] = {"detach": lambda x: x, "ge0": lambda x: x >= 0, "eq0": lambda x: x == 0}
_INTEGER: dict[str, Callable] = {"floordiv": operator.floordiv, "mod": operator.mod, "min": min, "max": max}


@lru_cache(maxsize=10_000)
def _offset(index: Expr) -> tuple[str | None, Expr] | None:
    """Split an index into (variable, index - variable), or (None, index) without a variable; else return None."""
    variables = [x for x in walk(index) if x.op == "var"]
    if len(variables) > 1 or any(x.op == "load" or x.op in OPAQUE for x in walk(index)):
        return None
    if not variables:
        return None, index
    offset = A.sub(index, variables[0])
    return None if offset.free else (str(variables[0].value), offset)


@lru_cache(maxsize=256)
def _has_overload(packet: torch._ops.OpOverloadPacket, tensors: tuple[bool, ...]) -> bool:
    """Return whether an overload takes tensors in these positions and Python scalars in the others."""

    kinds = {True: ("Tensor",), False: ("number", "Optional[number]", "float")}

    def fits(overload: str) -> bool:
        given = [str(a.type) for a in getattr(packet, overload)._schema.arguments[: len(tensors)]]
        return len(given) == len(tensors) and all(t in kinds[x] for t, x in zip(given, tensors))

    return any(map(fits, packet.overloads()))


class Evaluator:
    """An evaluator of expressions over one block.

    captures  the captured tensors by slot, the source of the loads
    sizes     every size by name
    axes      the range and dim of each variable
    leaves    known values of `dot`, `prob` or any other expression
    compute   float32 or float64
    shared    a memo that outlives this block, for expressions without b, h and leaves (or None)
    """

    def __init__(
        self,
        captures: Sequence[Tensor],
        sizes: Mapping[str, int],
        axes: Mapping[str, Axis],
        compute: torch.dtype,
        device: torch.device,
        leaves: Mapping[Expr, Tensor] | None = None,
        shared: dict[Expr, Value] | None = None,
    ):
        self.captures, self.sizes, self.axes = captures, sizes, dict(axes)
        self.compute, self.device = compute, device
        self.memo: dict[Expr, Value] = dict(leaves or {})
        self.shared = shared
        self._diagonal: Evaluator | None = None

    def __call__(self, e: Expr) -> Value:
        found = self.memo.get(e)
        if found is not None:
            return found
        memo = self.memo
        if self.shared is not None and e not in memo and not {"b", "h"} & e.free and not opaque(e):
            memo = self.shared
        if e not in memo:
            memo[e] = self._evaluate(e)
        return memo[e]

    def tensor(self, e: Expr) -> Tensor:
        """Return the value as a tensor with only the dims that it needs."""
        return self._tensor(self(e), e.kind)

    def bind(self, leaf: Expr, value: Tensor) -> None:
        self.memo[leaf] = value

    # -- one node -------------------------------------------------------------------------------
    def _tensor(self, value: Value, kind: str) -> Tensor:
        if isinstance(value, Tensor):
            return value
        dtype = self.compute if kind == FLOAT else torch.int64 if kind == INT else torch.bool
        return torch.full((), value, dtype=dtype, device=self.device)  # a copy from the host cannot be captured

    def _evaluate(self, e: Expr) -> Value:
        if e.op == "const":
            return self._constant(e)
        if e.op == "size":
            return self.sizes[str(e.value)]
        if e.op == "var":
            return self._index(self.axes[str(e.value)])
        if e.op in OPAQUE:
            raise KeyError(f"{e.op} has no value in this block")
        if (along := self._along_diagonals(e)) is not None:
            return along
        if e.op == "load":
            return self._load(e)
        if e.op in ("rsum", "rmax"):
            return self._reduce(e)
        if e.op == "where":
            return self._where(e)
        args = [self(a) for a in e.args]
        if e.op == "aten":
            return self._exactly(e, args)
        if e.op in _PLAIN:
            if e.kind == FLOAT and not any(isinstance(a, Tensor) for a in args):
                args[0] = self._tensor(args[0], FLOAT)
            return reduce(_PLAIN[e.op], args)
        x = args[0]
        match e.op:
            case "detach" | "ge0" | "eq0":
                return _SINGLE[e.op](x)
            case "not":
                return x.logical_not() if isinstance(x, Tensor) else not x
            case "float":
                return self._tensor(x, e.args[0].kind).to(self.compute)
            case "int":
                return self._tensor(x, FLOAT).to(torch.int64)
            case "half":
                return self._tensor(x, FLOAT).to(torch.float16).to(self.compute)
            case "floordiv" | "mod" | "min" | "max" if e.kind == INT and not any(isinstance(a, Tensor) for a in args):
                return _INTEGER[e.op](*args)
        tensors = [self._tensor(v, a.kind) for v, a in zip(args, e.args)]
        return reduce(_BINARY[e.op], tensors) if e.op in _BINARY else _UNARY[e.op](tensors[0])

    def _exactly(self, e: Expr, args: list[Value]) -> Tensor:
        """Run the user's own operator on its original dtypes, because its rounding decides an integer."""
        name, dtype = str(e.value).split(":")
        to = getattr(torch, dtype)
        if name == "to":
            return self._tensor(args[0], e.args[0].kind).to(to)
        packet = getattr(torch.ops.aten, name)
        if not _has_overload(packet, tuple(isinstance(a, Tensor) for a in args)):
            args = [a if isinstance(a, Tensor) else torch.full((), a, dtype=to, device=self.device) for a in args]
        return packet(*args).to(to)

    def _constant(self, e: Expr) -> bool | int | float:
        value = e.value
        assert isinstance(value, (bool, int, float))
        if e.kind == FLOAT and self.compute == torch.float32 and abs(value) > 3.4028235677973366e38:
            return math.copysign(math.inf, value)  # rounds to infinity; ATen rejects such a scalar
        return value

    def _index(self, axis: Axis) -> Tensor:
        return torch.arange(axis.start, axis.stop, device=self.device).view(-1, *[1] * (-axis.dim - 1))

    def _where(self, e: Expr) -> Value:
        keep = self(e.args[0])
        if not isinstance(keep, Tensor):
            return self(e.args[1] if keep else e.args[2])
        x, y = self(e.args[1]), self(e.args[2])
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            x = self._tensor(x, e.kind)
        return torch.where(keep, x, y)

    def _reduce(self, e: Expr) -> Tensor:
        body, extent = e.args
        length = int(self(extent))
        if opaque(body):
            raise ValueError(f"a reduction of the scores cannot be evaluated block by block: {e}")
        dim = min(-5, min(a.dim for a in self.axes.values()) - 1)
        inner = self._like({**self.axes, str(e.value): Axis(0, length, dim)})
        x = inner.tensor(body)
        x = x.expand(torch.broadcast_shapes(x.shape, (length, *[1] * (-dim - 1))))
        if e.op == "rsum":
            return x.sum(dim)
        return x.amax(dim) if length else x.new_full(x.shape[1:], -math.inf)

    def _like(self, axes: Mapping[str, Axis]) -> Evaluator:
        return Evaluator(self.captures, self.sizes, axes, self.compute, self.device)

    def without(self, name: str) -> Evaluator:
        """Return an evaluator for expressions that do not depend on the variable."""
        return self._like({n: a for n, a in self.axes.items() if n != name})

    # -- diagonals ------------------------------------------------------------------------------
    def diagonal(self) -> Evaluator:
        """Return the evaluator over the block's diagonals: axis `w` in dim -1, and dim -2 of size 1."""
        if self._diagonal is None:
            i, j = self.axes["i"], self.axes["j"]
            first = j.start - (i.stop - 1) + self.sizes["T"] - 1
            length = (j.stop - j.start) + (i.stop - i.start) - 1
            axes = {name: a for name, a in self.axes.items() if name not in ("i", "j")}
            self._diagonal = self._like({**axes, SPAN: Axis(first, first + length, -1)})
        return self._diagonal

    def _diagonal_form(self, e: Expr) -> Expr | None:
        i, j = self.axes.get("i"), self.axes.get("j")
        if i is None or j is None or (i.dim, j.dim) != (-2, -1) or i.start >= i.stop or j.start >= j.stop:
            return None
        return toeplitz(e)

    def _along_diagonals(self, e: Expr) -> Tensor | None:
        form = self._diagonal_form(e)
        if form is None:
            return None
        values = self.diagonal()(form)
        if not isinstance(values, Tensor) or SPAN not in form.free:
            return self._tensor(values, e.kind)
        i, j = self.axes["i"], self.axes["j"]
        if i.stop - i.start == 1:
            return values
        line = values.squeeze(-2) if values.ndim > 1 else values
        return line.unfold(-1, j.stop - j.start, 1).flip(-2)  # row i starts at diagonal t - 1 - i

    # -- loads and their gradients --------------------------------------------------------------
    def _view(self, e: Expr, tensor: Tensor) -> Tensor | None:
        """Return the load as a view of the tensor if each index is a constant or variable + constant, in range."""
        at: dict[int, Axis] = {}
        dims: list[int] = []  # the axis's dim, for each dim that is kept
        for n, index in enumerate(e.args):
            split = _offset(index)
            if split is None:
                return None
            variable, offset_of = split
            offset = self(offset_of)
            if isinstance(offset, Tensor):
                return None
            if variable is None:
                if not 0 <= offset < tensor.shape[n]:
                    return None
                at[n] = Axis(int(offset), int(offset) + 1, 0)
                continue
            axis = self.axes[variable]
            if axis.dim in dims:
                return None
            low, high = axis.start + int(offset), axis.stop + int(offset)
            if low < 0 or high > tensor.shape[n]:
                return None
            at[n] = Axis(low, high, axis.dim)
            dims.append(axis.dim)
        for n in reversed(range(len(e.args))):
            low, high, dim = at[n]
            tensor = tensor.narrow(n, low, high - low) if dim else tensor.select(n, low)
        order = sorted(range(len(dims)), key=lambda n: dims[n])
        tensor = tensor.permute(order)
        for n, dim in enumerate(range(min(dims, default=0), 0)):
            if dim not in dims:
                tensor = tensor.unsqueeze(n)
        return tensor

    def _indices(self, e: Expr, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the indices clamped into range: at masked elements an index may point outside the tensor."""
        return tuple(self.tensor(a).clamp(0, n - 1) for a, n in zip(e.args, shape))

    def _load(self, e: Expr) -> Tensor:
        tensor = self.captures[e.value]  # type: ignore[call-overload]
        found = self._view(e, tensor)
        if found is None:
            if tensor.numel() == 0:
                shape = torch.broadcast_shapes(*(self.tensor(a).shape for a in e.args))
                found = tensor.new_zeros(shape)
            else:
                # not tensor[..], which reads an index without dims on the host
                found = torch.ops.aten.index.Tensor(tensor, list(self._indices(e, tensor.shape)))
        return found.to(self.compute if e.kind == FLOAT else torch.int64 if e.kind == INT else torch.bool)

    def add_gradient(self, e: Expr, slope: Tensor, total: Tensor) -> None:
        """Add the gradient of load `e`, `slope` over the whole block, to `total`, which has the capture's shape."""
        shape = [1] * slope.ndim
        for name, axis in self.axes.items():
            if name in e.free:
                shape[axis.dim] = axis.stop - axis.start
        unused = [a.dim for n, a in self.axes.items() if n not in e.free and slope.shape[a.dim] != 1]
        if unused:
            slope = slope.sum(unused, keepdim=True)
        slope = slope.expand(shape)
        view = self._view(e, total)
        if view is not None:
            view.add_(slope.reshape(slope.shape[slope.ndim - view.ndim :]))
            return
        form = self._diagonal_form(e)
        if form is not None:
            self.diagonal()._scatter(form, diagonal_sums(slope), total)
        else:
            self._scatter(e, slope, total)

    def _scatter(self, e: Expr, slope: Tensor, total: Tensor) -> None:
        if total.numel():
            indices = torch.broadcast_tensors(slope, *self._indices(e, total.shape))[1:]
            total.index_put_(indices, slope, accumulate=True)


def diagonal_sums(tile: Tensor) -> Tensor:
    """Sum (..., t, s) along its diagonals to (..., 1, t + s - 1): entry w sums j - i = w - (t - 1)."""
    t, s = tile.shape[-2:]
    padded = torch.nn.functional.pad(tile.flip(-2), (0, t))  # width t + s; re-cut to t + s - 1, row m shifts by m
    skewed = padded.reshape(*tile.shape[:-2], t * (t + s))[..., : t * (t + s - 1)]
    return skewed.reshape(*tile.shape[:-2], t, t + s - 1).sum(-2, keepdim=True)
