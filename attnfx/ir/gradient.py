"""Differentiate score programs symbolically, for the backward kernels."""

from __future__ import annotations

import math

from attnfx.ir.algebra import add, const, div, ge, le, lt, mul, neg, power, sub, unary, where
from attnfx.ir.expr import FLOAT, Added, Expr, walk

_ZERO, _ONE = const(0.0), const(1.0)


def gradient(root: Expr, leaves: list[Expr]) -> list[Expr]:
    """Differentiate root by each leaf (`dot`, `prob` or a load) by reverse accumulation; 0.0 for an independent leaf.

    Distinct loads of one capture are distinct leaves: the caller adds their contributions. A half-precision rounding
    passes gradients through, as PyTorch's casts do. In a tie of min or max, the first operand gets the gradient.
    """
    order = list(walk(root))
    depends: set[Expr] = set(leaves)
    for at in order:
        if at.op not in ("detach",) and any(a in depends for a in at.args):
            depends.add(at)
    slope: dict[Expr, Expr] = {root: _ONE}
    for at in reversed(order):
        outer = slope.get(at)
        if outer is None or at in leaves:
            continue
        for operand, local in _local(at):
            if operand in depends and local is not _ZERO:
                term = mul(outer, local)
                slope[operand] = add(slope[operand], term) if operand in slope else term
    return [slope.get(leaf, _ZERO) if leaf in depends else _ZERO for leaf in leaves]


def _local(e: Expr) -> list[tuple[Expr, Expr]]:
    """Return (operand, d e / d operand) for the float operands of one node."""
    if e.kind != FLOAT:
        return []
    a = e.args
    x = a[0] if a else None
    match e.op:
        case "add":
            return [(t, _ONE) for t in a]
        case "mul":
            return [(t, mul(*(a[:n] + a[n + 1 :]))) for n, t in enumerate(a)]
        case "where" if type(a[2].value) is Added:
            return [(a[1], _ONE)]
        case "where":
            return [(a[1], where(a[0], _ONE, _ZERO)), (a[2], where(a[0], _ZERO, _ONE))]
        case "half":
            return [(a[0], _ONE)]
        case "min" | "max":
            better = le if e.op == "min" else ge
            out = []
            for n, t in enumerate(a):
                rest = a[:n] + a[n + 1 :]
                wins = [better(t, r) if n < a.index(r) else lt(t, r) if e.op == "min" else lt(r, t) for r in rest]
                local = _ONE
                for w in wins:
                    local = where(w, local, _ZERO)
                out.append((t, local))
            return out
        case "pow":
            base, exponent = a
            return [
                (base, mul(exponent, power(base, sub(exponent, _ONE)))),
                (exponent, mul(e, unary("log", base))),
            ]
    if x is None:
        return []
    local = _unary(e, x)
    return [(x, local)] if local is not None else []


def _unary(e: Expr, x: Expr) -> Expr | None:
    match e.op:
        case "recip":
            return neg(mul(e, e))
        case "exp":
            return e
        case "expm1":
            return add(e, _ONE)
        case "exp2":
            return mul(const(math.log(2.0)), e)
        case "log":
            return unary("recip", x)
        case "log2":
            return mul(const(1 / math.log(2.0)), unary("recip", x))
        case "log1p":
            return unary("recip", add(_ONE, x))
        case "tanh":
            return sub(_ONE, mul(e, e))
        case "sigmoid":
            return mul(e, sub(_ONE, e))
        case "softplus":
            return unary("sigmoid", x)
        case "sqrt":
            return div(const(0.5), e)
        case "sin":
            return unary("cos", x)
        case "cos":
            return neg(unary("sin", x))
        case "atan":
            return unary("recip", add(_ONE, mul(x, x)))
        case "erf":
            return mul(const(2 / math.sqrt(math.pi)), unary("exp", neg(mul(x, x))))
        case "abs":
            return unary("sign", x)
    return None  # floor, ceil, round, trunc, sign: zero almost everywhere
