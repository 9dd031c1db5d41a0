"""Lift pointwise operators. Each rule respects `alpha`, `beta`, rounding modes and result dtypes."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import BOOL, FLOAT, INT, Expr, node
from attnfx.passes.fx.nodes import Opaque, argument, kind_of, op_name, value
from attnfx.passes.lift.lifter import Lifter, exact_node
from attnfx.passes.lift.tables import POINTWISE, Index, rule

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


@rule(POINTWISE, "add", "add_", "sub", "sub_", "rsub", "__add__", "__sub__")
def _add(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = str(at.target).split(".")[1].strip("_")
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


def _number(e: Expr) -> Expr:
    return A.to_int(e) if e.kind == BOOL else e


@rule(POINTWISE, "mul", "mul_", "__mul__")
def _mul(lifter: Lifter, at: Node, index: Index) -> Expr:
    x, y = _operands(lifter, at, index)
    exact = _exact(lifter, at, "mul", [x, y])
    if exact is not None:
        return exact
    if x.kind == BOOL and y.kind == BOOL:
        return A.and_(x, y)
    return A.mul(_number(x), _number(y))


@rule(POINTWISE, "div", "div_", "true_divide", "floor_divide")
def _div(lifter: Lifter, at: Node, index: Index) -> Expr:
    mode = "floor" if "floor_divide" in str(at.target) else argument(at, 2, "rounding_mode")
    x, y = _operands(lifter, at, index)
    if mode is None:
        return _exact(lifter, at, "div", [x, y]) or A.div(x, y)
    if x.kind == INT and y.kind == INT and (mode == "floor" or _nonnegative(x, y)):
        return A.floordiv(x, y)
    raise Opaque


def _nonnegative(x: Expr, y: Expr) -> bool:
    from attnfx.ir import poly

    return poly.nonnegative(poly.bounds(x)[0]) and poly.nonnegative(poly.bounds(y)[0])


@rule(POINTWISE, "remainder", "fmod")
def _mod(lifter: Lifter, at: Node, index: Index) -> Expr:
    x, y = _operands(lifter, at, index)
    if x.kind == INT and y.kind == INT and ("remainder" in str(at.target) or _nonnegative(x, y)):
        return A.mod(x, y)
    raise Opaque


@rule(POINTWISE, "neg", "neg_")
def _neg(lifter: Lifter, at: Node, index: Index) -> Expr:
    (x,) = _operands(lifter, at, index, 1)
    return _exact(lifter, at, "neg", [x]) or A.neg(x)


_UNARY = {
    "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log", "log2": "log2", "log1p": "log1p", "tanh": "tanh",
    "sigmoid": "sigmoid", "sqrt": "sqrt", "sin": "sin", "cos": "cos", "erf": "erf", "floor": "floor", "ceil": "ceil",
    "round": "round", "trunc": "trunc", "reciprocal": "recip", "abs": "abs", "atan": "atan", "sign": "sign",
    "sgn": "sign", "special_erf": "erf", "special_expm1": "expm1",
}  # fmt: skip


@rule(POINTWISE, *_UNARY, *(n + "_" for n in _UNARY))
def _unary(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = str(at.target).split(".")[1].rstrip("_")
    (x,) = _operands(lifter, at, index, 1)
    if at.kwargs or len(at.args) > 1:
        raise Opaque
    return _exact(lifter, at, name, [x]) or A.unary(_UNARY[name], x)


@rule(POINTWISE, "rsqrt", "relu", "relu_", "softplus", "square")
def _composed(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = str(at.target).split(".")[1].rstrip("_")
    (x,) = _operands(lifter, at, index, 1)
    if len(at.args) > 1 or at.kwargs:
        raise Opaque
    exact = _exact(lifter, at, name, [x])
    if exact is not None:
        return exact
    if name == "rsqrt":
        return A.unary("recip", A.unary("sqrt", x))
    if name == "softplus":
        return A.unary("softplus", x)
    if name == "square":
        return A.power(x, A.const(2))
    return A.maximum(x, A.ZERO if x.kind == INT else A.const(0.0))


@rule(POINTWISE, "silu", "silu_", "gelu", "gelu_")
def _smooth(lifter: Lifter, at: Node, index: Index) -> Expr:
    """Lift silu, x sigmoid(x), and gelu, x times the normal distribution function or its tanh approximation."""
    x = A.to_float(lifter.operand(at.args[0], index))
    exact = _exact(lifter, at, str(at.target).split(".")[1].rstrip("_"), [x])
    if exact is not None:
        return exact
    if "silu" in str(at.target):
        return A.mul(x, A.unary("sigmoid", x))
    if argument(at, 1, "approximate", "none") == "none":
        inner = A.unary("erf", A.mul(A.const(math.sqrt(0.5)), x))
    else:
        inner = A.mul(A.const(math.sqrt(2 / math.pi)), A.add(x, A.mul(A.const(0.044715), x, x, x)))
        inner = A.unary("tanh", inner)
    return A.mul(A.const(0.5), x, A.add(A.const(1.0), inner))


@rule(POINTWISE, "pow", "pow_")
def _pow(lifter: Lifter, at: Node, index: Index) -> Expr:
    x, y = _operands(lifter, at, index)
    exact = _exact(lifter, at, "pow", [x, y])
    if exact is not None:
        return exact
    out = A.power(x, y)
    if out.kind != kind_of(_arithmetic(at)) and out.kind == FLOAT:
        raise Opaque
    return out


@rule(POINTWISE, "minimum", "maximum", "min", "max", "fmin", "fmax")
def _extreme(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = str(at.target).split(".")[1]
    if len(at.args) != 2 or not isinstance(at.args[1], Node):
        from attnfx.passes.lift.reductions import reduce_max

        if name != "max":
            raise Opaque
        return reduce_max(lifter, at, index)
    x, y = _operands(lifter, at, index)
    return _exact(lifter, at, name, [x, y]) or (A.minimum if "min" in name else A.maximum)(x, y)


@rule(POINTWISE, "clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "clip")
def _clamp(lifter: Lifter, at: Node, index: Index) -> Expr:
    name = str(at.target).split(".")[1].rstrip("_")
    dtype = _arithmetic(at)
    x = lifter.operand(at.args[0], index)
    low = argument(at, 1, "min") if name != "clamp_max" else None
    high = (
        argument(at, 2, "max") if name in ("clamp", "clip") else argument(at, 1, "max") if name == "clamp_max" else None
    )
    for bound, op, aten in ((low, A.maximum, "clamp_min"), (high, A.minimum, "clamp_max")):
        if bound is None:
            continue
        y = lifter.operand(bound, index)
        if lifter.exact and dtype.is_floating_point and x.op != "const":
            x = exact_node(at, aten, (x, y))
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
    name = str(at.target).split(".")[1].rstrip("_")
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
    name = str(at.target).split(".")[1]
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
    name = str(at.target).split(".")[1]
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
    return lifter.operand(argument(at, 2 if "new_full" in str(at.target) else 1, "fill_value"), ())


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
