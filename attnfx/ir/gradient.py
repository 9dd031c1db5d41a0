"""Differentiate score programs symbolically, for the backward kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

from attnfx.ir.algebra import add, const, div, ge, gt, le, lt, mul, neg, power, sub, unary, where
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
        if at.op != "detach" and any(a in depends for a in at.args):
            depends.add(at)
    slope: dict[Expr, Expr] = {root: _ONE}
    for at in reversed(order):
        outer = slope.get(at)
        if outer is None or at in leaves:
            continue
        for operand, local in _local(at):
            if operand in depends and local is not _ZERO:
                term = _times(outer, local)
                slope[operand] = _plus(slope[operand], term) if operand in slope else term
    return [slope.get(leaf, _ZERO) if leaf in depends else _ZERO for leaf in leaves]


def _guard(e: Expr) -> bool:
    return e.op == "where" and _ZERO in e.args[1:]


def _times(x: Expr, y: Expr) -> Expr:
    """Multiply slopes. A branch that is zero stays zero, also if the other factor is not finite there."""
    if _guard(x):
        return where(x.args[0], *(a if a is _ZERO else _times(a, y) for a in x.args[1:]))
    return _times(y, x) if _guard(y) else mul(x, y)


def _plus(x: Expr, y: Expr) -> Expr:
    """Add slopes. Terms with the same condition stay below it."""
    if _guard(x) and _guard(y) and x.args[0] is y.args[0] and x.args.index(_ZERO) == y.args.index(_ZERO):
        return where(x.args[0], *(_ZERO if a is _ZERO else _plus(a, b) for a, b in zip(x.args[1:], y.args[1:])))
    return add(x, y)


def _local(e: Expr) -> list[tuple[Expr, Expr]]:
    """Return (operand, d e / d operand) for the float operands of one node."""
    if e.kind != FLOAT:
        return []
    a = e.args
    match e.op:
        case "add":
            return [(t, _ONE) for t in a]
        case "mul":
            return [(t, mul(*(a[:n] + a[n + 1 :]))) for n, t in enumerate(a)]
        case "where" if type(a[2].value) is Added:
            return [(a[1], _ONE)]
        case "where":
            return [(a[1], where(a[0], _ONE, _ZERO)), (a[2], where(a[0], _ZERO, _ONE))]
        case "min" | "max":
            better = le if e.op == "min" else ge
            strictly = lt if e.op == "min" else gt
            out = []
            for n, t in enumerate(a):
                local = _ONE
                for m, r in enumerate(a):
                    if m != n:
                        local = where(better(t, r) if n < m else strictly(t, r), local, _ZERO)
                out.append((t, local))
            return out
        case "pow":
            base, exponent = a
            local = mul(exponent, power(base, sub(exponent, _ONE)))
            return [(base, local), (exponent, mul(e, unary("log", base)))]
    if e.op not in _UNARY:
        return []  # floor, ceil, round, trunc, sign: zero almost everywhere
    return [(a[0], _UNARY[e.op](e, a[0]))]


# operator -> the derivative of e = op(x)
_UNARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "recip": lambda e, x: neg(mul(e, e)),
    "exp": lambda e, x: e,
    "expm1": lambda e, x: add(e, _ONE),
    "exp2": lambda e, x: mul(const(math.log(2.0)), e),
    "log": lambda e, x: unary("recip", x),
    "log2": lambda e, x: mul(const(1 / math.log(2.0)), unary("recip", x)),
    "log1p": lambda e, x: unary("recip", add(_ONE, x)),
    "tanh": lambda e, x: sub(_ONE, mul(e, e)),
    "sigmoid": lambda e, x: mul(e, sub(_ONE, e)),
    "softplus": lambda e, x: unary("sigmoid", x),
    "sqrt": lambda e, x: div(const(0.5), e),
    "sin": lambda e, x: unary("cos", x),
    "cos": lambda e, x: neg(unary("sin", x)),
    "atan": lambda e, x: unary("recip", add(_ONE, mul(x, x))),
    "erf": lambda e, x: mul(const(2 / math.sqrt(math.pi)), unary("exp", neg(mul(x, x)))),
    "abs": lambda e, x: unary("sign", x),
    "half": lambda e, x: _ONE,
}
