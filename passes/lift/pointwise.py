"""Lift pointwise operators. Each rule respects `alpha`, `beta`, rounding modes and result dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.expr import BOOL, FLOAT, INT, Expr, node
from attnfx.passes.fx.nodes import Opaque, argument, arguments, op_name, value
from attnfx.passes.lift.lifter import Lifter, exact_node
from attnfx.passes.lift.tables import POINTWISE, REDUCTIONS, Index, rule

ROUNDING_ONLY = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float16's range is kept by `half`
NARROW = (torch.uint8, torch.int8, torch.int16)  # arithmetic on these may wrap around: not lifted


def _arithmetic(at: Node) -> torch.dtype:
    dtype = value(at).dtype  # type: ignore[union-attr]
    if dtype in NARROW or dtype.is_complex:
        raise Opaque
    return dtype


def _operands(lifter: Lifter, at: Node, index: Index, count: int = 2) -> list[Expr]:
    dtype = _arithmetic(at)
    xs = [lifter.operand(a, index) for a in at.args[:count]]
    if lifter.exact and dtype.is_floating_point:
        return xs
    return [A.to_float(x) for x in xs] if dtype.is_floating_point else xs


def _exact(lifter: Lifter, at: Node, name: str, xs: list[Expr]) -> Expr | None:
    if lifter.exact and value(at).dtype.is_floating_point and any(x.op != "const" for x in xs):  # type: ignore[union-attr]
        return exact_node(at, name, tuple(xs))
    return None


def _name(at: Node) -> str:
    """Return an operator's name without the underscores of its in-place or method form."""
    return op_name(at).strip("_")


def _number(e: Expr) -> Expr:
    return A.to_int(e) if e.kind == BOOL else e


@rule(POINTWISE, "add", "add_", "sub", "sub_", "rsub", "__add__", "__sub__")
def _add(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = _name(at)
    x, y = _operands(lifter, at, index)
    alpha = argument(at, 2, "alpha", 1)
    exact = _exact(lifter, at, name, [x, y])
    if exact is not None:
        if alpha != 1:
            raise Opaque
        return exact
    if x.kind == BOOL and y.kind == BOOL:
        if name == "add" and value(at).dtype == torch.bool:  # type: ignore[union-attr]
            return A.or_(x, y)
        raise Opaque
    first, second = (y, x) if name == "rsub" else (x, y)
    scaled = _number(second) if alpha == 1 else A.mul(_number(second), lifter.operand(alpha, ()))
    return A.add(_number(first), scaled) if name == "add" else A.sub(_number(first), scaled)


@rule(POINTWISE, "div", "div_", "true_divide", "floor_divide")
def _div(lifter: Lifter, at: Node, index: Index) -> Expr:
    mode = "floor" if _name(at) == "floor_divide" else argument(at, 2, "rounding_mode")
    x, y = _operands(lifter, at, index)
    if mode is None:
        return _exact(lifter, at, "div", [x, y]) or A.div(x, y)
    if x.kind == INT and y.kind == INT and (mode == "floor" or _nonnegative(x, y)):
        return A.floordiv(x, y)
    raise Opaque


def _nonnegative(*xs: Expr) -> bool:
    return all(poly.nonnegative(poly.bounds(x)[0]) for x in xs)


@rule(POINTWISE, "remainder", "fmod")
def _mod(lifter: Lifter, at: Node, index: Index) -> Expr:
    x, y = _operands(lifter, at, index)
    if x.kind == INT and y.kind == INT and (_name(at) == "remainder" or _nonnegative(x, y)):
        return A.mod(x, y)
    raise Opaque


# -- functions of the operands alone ----------------------------------------------------------
def _mul(x: Expr, y: Expr) -> Expr:
    return A.and_(x, y) if x.kind == BOOL and y.kind == BOOL else A.mul(_number(x), _number(y))


def _relu(x: Expr) -> Expr:
    return A.maximum(x, A.ZERO if x.kind == INT else A.const(0.0))


def _gelu(x: Expr, approximate: str = "none") -> Expr:
    """Return x times the normal distribution function, or its approximation by tanh."""
    if approximate == "none":
        inner = A.unary("erf", A.mul(A.const(math.sqrt(0.5)), x))
    else:
        inner = A.mul(A.const(math.sqrt(2 / math.pi)), A.add(x, A.mul(A.const(0.044715), x, x, x)))
        inner = A.unary("tanh", inner)
    return A.mul(A.const(0.5), x, A.add(A.const(1.0), inner))


def _prelu(x: Expr, slope: Expr) -> Expr:
    return A.where(A.lt(A.ZERO, x), x, A.mul(slope, x))


SAME = (
    "exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "sigmoid", "sqrt", "sin", "cos", "erf", "floor", "ceil",
    "round", "trunc", "abs", "atan", "sign", "softplus",
)  # fmt: skip
OTHER = {"reciprocal": "recip", "sgn": "sign", "special_erf": "erf", "special_expm1": "expm1"}
UNARY: dict[str, Callable[..., Expr]] = {
    **{name: partial(A.unary, OTHER.get(name, name)) for name in (*SAME, *OTHER)},
    "neg": A.neg,
    "relu": _relu,
    "rsqrt": lambda x: A.unary("recip", A.unary("sqrt", x)),
    "square": lambda x: A.power(x, A.const(2)),
    "silu": lambda x: A.mul(x, A.unary("sigmoid", x)),
    "gelu": _gelu,
}
BINARY = {"mul": _mul, "pow": A.power, "minimum": A.minimum, "maximum": A.maximum, "min": A.minimum, "max": A.maximum,
          "fmin": A.minimum, "fmax": A.maximum, "prelu_kernel": _prelu}  # fmt: skip


@rule(POINTWISE, *UNARY, *(f"{name}_" for name in UNARY))
def _unary(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = _name(at)
    (x,) = _operands(lifter, at, index, 1)
    if len(at.args) > 1 or (at.kwargs and name != "gelu"):
        raise Opaque
    return _exact(lifter, at, name, [x]) or UNARY[name](x, **at.kwargs)


@rule(POINTWISE, *BINARY, "mul_", "pow_", "__mul__", "_prelu_kernel")
def _binary(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = _name(at)
    if name in ("min", "max") and (len(at.args) != 2 or not isinstance(at.args[1], Node)):
        if name == "min":
            raise Opaque
        return REDUCTIONS["amax"](lifter, at, index)
    x, y = _operands(lifter, at, index)
    made = _exact(lifter, at, name, [x, y]) or BINARY[name](x, y)
    if made.kind == FLOAT and not value(at).dtype.is_floating_point:  # type: ignore[union-attr]
        raise Opaque
    return made


@rule(POINTWISE, "clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "clip")
def _clamp(lifter: Lifter, at: Node, index: Index) -> Expr:
    dtype, given = _arithmetic(at), arguments(at)
    x = lifter.operand(at.args[0], index)
    for bound, op, name in (("min", A.maximum, "clamp_min"), ("max", A.minimum, "clamp_max")):
        if given.get(bound) is None:
            continue
        y = lifter.operand(given[bound], index)
        if lifter.exact and dtype.is_floating_point and x.op != "const":
            x = exact_node(at, name, (x, y))
        else:
            x = op(x, A.to_float(y) if dtype.is_floating_point else y)
    return x


@rule(POINTWISE, "where")
def _where(lifter: Lifter, at: Node, index: Index) -> Expr:
    if len(at.args) != 3:
        raise Opaque
    c, x, y = (lifter.operand(a, index) for a in at.args)
    return A.where(c, x, y)


@rule(POINTWISE, "masked_fill", "masked_fill_")
def _masked_fill(lifter: Lifter, at: Node, index: Index) -> Expr:
    x, c, y = (lifter.operand(a, index) for a in at.args)
    if x.kind == FLOAT:
        y = A.to_float(y)
    elif y.kind == FLOAT:
        y = A.to_int(y)
    return A.where(c, y, x)


@rule(POINTWISE, "lt", "le", "gt", "ge", "eq", "ne", "lt_", "le_", "gt_", "ge_", "eq_", "ne_")
def _compare(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = _name(at)
    x, y = (lifter.integer_source(a, index) for a in at.args[:2])
    if name == "ne":
        return A.not_(A.eq(x, y))
    return {"lt": A.lt, "le": A.le, "gt": A.gt, "ge": A.ge, "eq": A.eq}[name](x, y)


_LOGIC = ("bitwise_and", "__and__", "logical_and", "__iand__", "bitwise_and_", "logical_and_")
_OR = ("bitwise_or", "__or__", "logical_or", "__ior__", "bitwise_or_", "logical_or_")
_XOR = ("bitwise_xor", "__xor__", "logical_xor", "logical_xor_", "bitwise_xor_")


@rule(POINTWISE, *_LOGIC, *_OR, *_XOR)
def _logic(lifter: Lifter, at: Node, index: Index) -> Expr:
    if value(at).dtype != torch.bool:  # type: ignore[union-attr]
        raise Opaque
    name = op_name(at)
    x, y = (A.to_bool(lifter.operand(a, index)) for a in at.args[:2])
    if name in _XOR:
        return A.not_(A.eq(x, y))
    return A.and_(x, y) if name in _LOGIC else A.or_(x, y)


@rule(POINTWISE, "bitwise_not", "logical_not", "bitwise_not_", "logical_not_", "__invert__")
def _not(lifter: Lifter, at: Node, index: Index) -> Expr:
    if value(at).dtype != torch.bool:  # type: ignore[union-attr]
        raise Opaque
    return A.not_(A.to_bool(lifter.operand(at.args[0], index)))


@rule(POINTWISE, "to", "_to_copy", "type_as", "float", "half", "bool", "long", "int", "convert_element_type", "to_copy")
def _cast(lifter: Lifter, at: Node, index: Index) -> Expr:
    before, after = value(at.args[0]).dtype, value(at).dtype  # type: ignore[union-attr]
    if (after.is_floating_point and after not in ROUNDING_ONLY) or before.is_complex or after.is_complex:
        raise Opaque
    if not after.is_floating_point and before.is_floating_point:
        x = lifter.integer_source(at.args[0], index)
        if after in NARROW:
            raise Opaque
        return A.to_bool(x) if after == torch.bool else A.to_int(x)
    x = lifter.operand(at.args[0], index)
    if after in NARROW and before != torch.bool:
        raise Opaque
    if lifter.exact and after.is_floating_point and x.op != "const":
        return exact_node(at, "to", (x,))
    return x


@rule(POINTWISE, "isnan", "isinf", "isneginf")
def _is(lifter: Lifter, at: Node, index: Index) -> Expr:
    x = A.to_float(lifter.operand(at.args[0], index))
    name = op_name(at)
    if name == "isnan":
        return A.not_(A.eq(x, x)) if x.op != "const" else A.const(x.value != x.value)
    inf = A.const(float("inf"))
    low = A.eq(x, A.neg(inf))
    return low if name == "isneginf" else A.or_(low, A.eq(x, inf))


# A detached value stays the same and loses its gradient.
@rule(POINTWISE, "detach", "detach_")
def _detach(lifter: Lifter, at: Node, index: Index) -> Expr:
    return A.detach(lifter.operand(at.args[0], index))


@rule(POINTWISE, "dropout", "dropout_")
def _dropout(lifter: Lifter, at: Node, index: Index) -> Expr:
    p = argument(at, 1, "p")
    if not isinstance(p, int | float) or not 0 <= p < 1 or argument(at, 2, "train") is not True:
        raise Opaque
    return node("dropout", FLOAT, (A.to_float(lifter.operand(at.args[0], index)),), (float(p), at.name))


# -- constants --------------------------------------------------------------------------------
@rule(POINTWISE, "full", "full_like", "new_full")
def _full(lifter: Lifter, at: Node, index: Index) -> Expr:
    return lifter.operand(argument(at, 2 if op_name(at) == "new_full" else 1, "fill_value"), ())


@rule(POINTWISE, "ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros")
def _same_everywhere(lifter: Lifter, at: Node, index: Index) -> Expr:
    return A.const(int("ones" in op_name(at)))


@rule(POINTWISE, "scalar_tensor")
def _scalar(lifter: Lifter, at: Node, index: Index) -> Expr:
    return lifter.operand(at.args[0], ())


@rule(POINTWISE, "eye")
def _eye(lifter: Lifter, at: Node, index: Index) -> Expr:
    return A.eq(*index)


@rule(POINTWISE, "arange")
def _arange(lifter: Lifter, at: Node, index: Index) -> Expr:
    numbers = [lifter.operand(a, ()) for a in at.args]
    start = numbers[0] if len(numbers) > 1 else A.ZERO
    step = numbers[2] if len(numbers) > 2 else lifter.operand(at.kwargs.get("step", 1), ())
    if start.kind != INT or step.kind != INT:
        raise Opaque
    return A.add(start, A.mul(step, index[0]))


@rule(POINTWISE, "linspace")
def _linspace(lifter: Lifter, at: Node, index: Index) -> Expr:
    raise Opaque


@rule(POINTWISE, "tril", "tril_", "triu", "triu_")
def _triangle(lifter: Lifter, at: Node, index: Index) -> Expr:
    x = lifter.operand(at.args[0], index)
    diagonal = lifter.operand(argument(at, 1, "diagonal", 0), ())
    gap = A.sub(index[-1], index[-2])
    keep = A.le(gap, diagonal) if "tril" in op_name(at) else A.ge(gap, diagonal)
    zero = A.const(0.0) if x.kind == FLOAT else A.ZERO if x.kind == INT else A.FALSE
    return A.where(keep, x, zero)
