"""Find the rows of its operands that an operator needs for given rows of its result: dimension analysis of whole rows.

`split(at, row, extent)` returns the call that computes some rows of a result, which lie along its dimension `row` of
size `extent`. In the call, an operand is `Along(node, dim)` if the same rows of it are enough. It is the node itself if
it lacks these rows and every row reads all of it. `split` raises `NotSeparable` if the operator mixes rows, changes
their order, or is unknown.

Each family of operators has one rule. Without a rule, only operators that PyTorch tags as pointwise pass. The rules of
views are in `passes/lift/row_view_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.analysis import written_operands
from attnfx.passes.fx.nodes import Opaque, dims, is_tensor, label, op_name, shape, value, where_in_source
from attnfx.passes.lift.contraction import terms


class NotSeparable(Exception):
    """The rows cannot be computed one by one; the message gives the reason, and `node` the operator, if any."""

    def __init__(self, message: str, node: Node | None = None):
        super().__init__(message)
        self.node = node


@dataclass(frozen=True)
class Along:
    """The rows of a node, which lie along `dim`."""

    node: Node
    dim: int


@dataclass(frozen=True)
class Made:
    """A call that computes some rows; `op` is its name in a row program."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def operands(self) -> list[Along | Node]:
        """Return the operands that the call reads: a bare node is read as a whole."""
        out: list[Along | Node] = []

        def visit(x: Any) -> Any:
            if isinstance(x, Along | Node):
                out.append(x)
            return x

        map_aggregate((self.args, dict(self.kwargs)), visit)
        return out


class Use:
    """An operator in use, with its rows along `row`; `given` holds its arguments by name, for a rule to change."""

    def __init__(self, at: Node, row: int, extent: Expr):
        self.at, self.row, self.extent = at, row, extent
        schema = at.target._schema.arguments  # type: ignore[union-attr]
        self.defaults = {a.name: a.default_value for a in schema}
        self.given: dict[str, Any] = {a.name: x for a, x in zip(schema, at.args)} | dict(at.kwargs)
        self.op = f"{at.target._overloadpacket.__name__}.{at.target._overloadname}"  # type: ignore[union-attr]
        self.positional = set(list(self.given)[: len(at.args)])

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, self.defaults.get(name))

    def names(self, *wanted: str) -> str:
        """Return the first of these names that is a parameter of the operator."""
        return next(n for n in wanted if n in self.defaults)

    def rank(self) -> int:
        return len(shape(self.at))

    def along(self, x: Node, dim: int) -> Along | Node:
        """Return the rows of an operand, or the operand itself if it is broadcast over the rows."""
        if dim < 0:
            return x
        extent = dims(x)[dim]
        if extent is self.extent:
            return Along(x, dim)
        if extent is A.ONE:
            return x
        raise NotSeparable(f"{label(self.at)} reads {label(x)}, which has another number of rows")

    def broadcast(self, x: Any, rank: int | None = None) -> Any:
        """Return the rows of an operand that is aligned with the result from the last dimension on."""
        if not is_tensor(x):
            return x
        return self.along(x, self.row - (self.rank() if rank is None else rank) + len(shape(x)))

    def made(self) -> Made:
        args = tuple(v for k, v in self.given.items() if k in self.positional)
        return Made(self.op, args, {k: v for k, v in self.given.items() if k not in self.positional})

    def refuse(self, why: str) -> NotSeparable:
        return NotSeparable(f"{label(self.at)} {why}")


Rule = Callable[[Use], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return add


def split(at: Node, row: int, extent: Expr) -> Made:
    """Return the call that computes some rows of a result, as the module's docstring describes."""
    try:
        return _split(at, row, extent)
    except NotSeparable as problem:
        place = where_in_source(at)
        raise NotSeparable(f"{problem} ({place})" if place else str(problem), at) from None


def _split(at: Node, row: int, extent: Expr) -> Made:
    name = op_name(at)
    if name == "getitem":
        return Made("getitem", (Along(at.args[0], _row_of_tuple(at, row)), at.args[1]), {})  # type: ignore[arg-type]
    if not isinstance(at.target, torch._ops.OpOverload) or at.target.namespace != "aten":
        raise NotSeparable(f"{label(at)} is not known to keep rows separate")
    if written_operands(at):
        raise NotSeparable(f"{name} writes in place")
    use = Use(at, row, extent)
    if name in RULES:
        RULES[name](use)
    elif torch.Tag.pointwise in at.target.tags and torch.Tag.nondeterministic_seeded not in at.target.tags:
        _pointwise(use)
    else:
        raise NotSeparable(f"{name} is not known to keep rows separate")
    return use.made()


def _row_of_tuple(at: Node, row: int) -> int:
    source = at.args[0]
    if op_name(source) == "unbind":  # type: ignore[arg-type]
        dim = Use(source, 0, A.ONE)["dim"] % (len(value(at).shape) + 1)  # type: ignore[arg-type]
        return row if row < dim else row + 1
    return row


# -- pointwise operators ---------------------------------------------------------------------------
@rule("to", "_to_copy", "detach", "contiguous", "lift_fresh_copy", "__and__", "__or__", "floor_divide", "where",
      "masked_fill", "zeros_like", "ones_like", "full_like", "true_divide", "subtract", "multiply", "divide", "greater",
      "greater_equal", "less", "less_equal", "not_equal", "square", "float_power", "clip", "log_sigmoid",
      "fix", "absolute", "negative", "leaky_relu")  # fmt: skip
def _pointwise(use: Use) -> None:
    for name, x in use.given.items():
        if name != "other" or not use.op.startswith("to."):
            use.given[name] = map_aggregate(x, use.broadcast)


@rule("type_as")
def _type_as(use: Use) -> None:
    use.op = "to.dtype"
    use.given = {"self": use.broadcast(use["self"]), "dtype": value(use.at).dtype}


@rule("dropout")
def _dropout(use: Use) -> None:
    x, p, training = use.broadcast(use["input"]), use["p"], use["train"]
    if not isinstance(p, int | float) or not isinstance(training, bool):
        raise use.refuse("has a probability that is not a number")
    if training and p > 0:
        use.op, use.given = "dropout", {"input": x, "p": float(p)}
    else:
        use.op, use.given = "alias.default", {"input": x}


# -- along other dimensions than the rows ---------------------------------------------------------
def _apart(use: Use, operand: Node, which: Any) -> list[int]:
    """Return the dimensions that an operator works along, counted from the front; refuse an operator over all."""
    rank = len(shape(operand))
    if which is None or (isinstance(which, list | tuple) and not which):
        raise use.refuse("works over all dimensions, including the rows")
    return [int(d) % max(rank, 1) for d in (which if isinstance(which, list | tuple) else [which])]


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp",
      "cummax", "cummin", "sort", "argsort", "topk", "flip", "roll")  # fmt: skip
def _keeps_shape(use: Use) -> None:
    x = use[use.names("self", "input")]
    if use.row in _apart(use, x, use[use.names("dim", "dims")]):
        raise use.refuse("works along the rows")
    use.given[use.names("self", "input")] = use.along(x, use.row)


@rule("sum", "mean", "amax", "amin", "max", "min", "logsumexp", "prod", "var", "std", "var_mean", "std_mean", "norm",
      "linalg_vector_norm", "any", "all", "argmax", "argmin", "median", "mode", "kthvalue", "count_nonzero",
      "nansum", "nanmean", "aminmax")  # fmt: skip
def _reduces(use: Use) -> None:
    x = use["self"]
    if "dim" not in use.defaults:
        if use.op in ("max.other", "min.other"):
            return _pointwise(use)
        raise use.refuse("works over all dimensions, including the rows")
    gone = _apart(use, x, use["dim"])
    kept = list(range(len(shape(x)))) if use["keepdim"] else [d for d in range(len(shape(x))) if d not in gone]
    if use.row >= len(kept) or kept[use.row] in gone:
        raise use.refuse("works along the rows")
    use.given["self"] = use.along(x, kept[use.row])


@rule("layer_norm", "native_layer_norm", "rms_norm")
def _layer_norm(use: Use) -> None:
    x = use["input"]
    if use.row >= len(shape(x)) - len(use["normalized_shape"]):
        raise use.refuse("works along the rows")
    use.given["input"] = use.along(x, use.row)


@rule("batch_norm")
def _batch_norm(use: Use) -> None:
    if use["training"] is not False or use["running_mean"] is None:
        raise use.refuse("combines rows in training")
    if use.row == 1:
        raise use.refuse("has a separate factor for each row")
    use.given["input"] = use.along(use["input"], use.row)


@rule("conv1d", "conv2d", "conv3d")
def _convolution(use: Use) -> None:
    """Accept a kernel of one element along the rows."""
    d = use.row - 2
    x, weight = use["input"], use["weight"]
    if len(shape(x)) != len(shape(weight)) or d < 0:
        raise use.refuse("combines rows")

    def at(name: str) -> Any:
        given = use[name]
        return given[d if len(given) > 1 else 0] if isinstance(given, list | tuple) else given

    if dims(weight)[use.row] is not A.ONE or at("stride") != 1 or at("padding") not in (0, "valid", "same"):
        raise use.refuse("combines rows")
    use.given["input"] = use.along(x, use.row)


# -- products --------------------------------------------------------------------------------------
@rule("matmul", "__matmul__", "bmm", "mm")
def _matmul(use: Use) -> None:
    left, right = use.names("self"), use.names("other", "mat2")
    use.given[left], use.given[right] = _factors(use, use[left], use[right])


def _factors(use: Use, x: Node, y: Node) -> tuple[Along | Node, Along | Node]:
    rank, a, b = use.rank(), len(shape(x)), len(shape(y))
    if a < 2 or b < 2:
        if a >= 2:
            return use.along(x, use.row), y
        raise use.refuse("of a vector is not known to keep rows separate")
    if use.row == rank - 2:
        return use.along(x, a - 2), y
    if use.row == rank - 1:
        return x, use.along(y, b - 1)
    return use.broadcast(x), use.broadcast(y)


@rule("cdist", "_cdist_forward")
def _cdist(use: Use) -> None:
    x, y = use["x1"], use["x2"]
    if use.row < use.rank() - 1:
        use.given["x1"], use.given["x2"] = _factors(use, x, y)
    else:
        use.given["x2"] = use.along(y, len(shape(y)) - 2)


@rule("baddbmm", "addmm")
def _baddbmm(use: Use) -> None:
    left, right = use.names("batch1", "mat1"), use.names("batch2", "mat2")
    use.given["self"] = use.broadcast(use["self"])
    use.given[left], use.given[right] = _factors(use, use[left], use[right])


@rule("linear", "embedding")
def _linear(use: Use) -> None:
    if use.row == use.rank() - 1:
        raise use.refuse("takes its rows from the weight")
    name = use.names("input", "indices")
    use.given[name] = use.along(use[name], use.row)


@rule("einsum")
def _einsum(use: Use) -> None:
    operands: Sequence[Node] = use["tensors"]
    try:
        inputs, out = terms(use["equation"], [len(shape(x)) for x in operands])
    except Opaque:
        raise use.refuse("does not name each dimension") from None
    letter = out[use.row]
    if any(len(set(t)) != len(t) for t in (*inputs, out)):
        raise use.refuse("reads a diagonal")
    use.given["tensors"] = [
        use.along(x, term.index(letter)) if letter in term else x for x, term in zip(operands, inputs)
    ]
