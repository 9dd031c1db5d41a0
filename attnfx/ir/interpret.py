"""Evaluate an expression for one index tuple in Python numbers (double precision): the oracle of every emitter."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Mapping
from typing import Any

from attnfx.ir.expr import Expr

Number = bool | int | float
Loader = Callable[[object, tuple[int, ...]], Number]


def to_half(x: float) -> float:
    """Round to float16; a value beyond its range becomes infinite."""
    if math.isnan(x) or math.isinf(x):
        return x
    try:
        return struct.unpack("e", struct.pack("e", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def _recip(x: float) -> float:
    return 1.0 / x if x else math.copysign(math.inf, x)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + _exp(-x)) if x >= 0 else _exp(x) / (1.0 + _exp(x))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "recip": _recip, "exp": _exp, "exp2": lambda x: _exp(x * math.log(2.0)), "expm1": lambda x: _exp(x) - 1.0,
    "log": _log, "log2": lambda x: _log(x) / math.log(2.0), "log1p": lambda x: _log(1.0 + x), "tanh": math.tanh,
    "sigmoid": _sigmoid, "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan, "sin": math.sin, "cos": math.cos,
    "erf": math.erf, "floor": math.floor, "ceil": math.ceil, "round": round, "trunc": math.trunc, "atan": math.atan,
    "softplus": lambda x: x if x > 30 else math.log1p(_exp(x)), "abs": abs, "half": to_half, "detach": lambda x: x,
    "sign": lambda x: (x > 0) - (x < 0), "float": float, "int": int, "not": operator.not_,
    "ge0": lambda x: x >= 0, "eq0": lambda x: x == 0,
    "add": lambda *x: sum(x), "mul": lambda *x: math.prod(x), "min": min, "max": max, "pow": operator.pow,
    "floordiv": operator.floordiv, "mod": operator.mod, "lt": operator.lt, "le": operator.le, "eq": operator.eq,
    "and": lambda *x: all(x), "or": lambda *x: any(x),
}  # fmt: skip
_ATEN: dict[str, Callable[..., Any]] = {
    **_FUNCTIONS, "to": float, "sub": operator.sub, "rsub": lambda x, y: y - x, "div": lambda x, y: x * _recip(y),
    "neg": operator.neg, "reciprocal": _recip, "rsqrt": lambda x: _recip(math.sqrt(x)),
    "relu": lambda x: max(x, 0.0), "square": lambda x: x * x, "clamp_min": max, "clamp_max": min, "minimum": min,
    "maximum": max,
}  # fmt: skip


def evaluate(e: Expr, env: Mapping[str, Number], load: Loader | None = None) -> Number:
    """Return the value of `e`. `env` binds variables, sizes by name, and `dot` and `prob`; `load(slot, indices)`
    returns an element of a capture. Raises KeyError for an unbound name."""
    if e.op == "const":
        return e.value  # type: ignore[return-value]
    if e.op in ("var", "size"):
        return env[str(e.value)]
    if e.op in ("dot", "prob"):
        return env[e.op]
    if e.op == "where":
        return evaluate(e.args[1] if evaluate(e.args[0], env, load) else e.args[2], env, load)
    if e.op in ("rsum", "rmax"):
        body, extent = e.args
        values = [evaluate(body, {**env, str(e.value): n}, load) for n in range(int(evaluate(extent, env, load)))]
        return sum(values) if e.op == "rsum" else max(values, default=-math.inf)
    x = [evaluate(a, env, load) for a in e.args]
    if e.op == "load":
        assert load is not None
        return load(e.value, tuple(int(v) for v in x))
    return _ATEN[str(e.value).split(":")[0]](*x) if e.op == "aten" else _FUNCTIONS[e.op](*x)
