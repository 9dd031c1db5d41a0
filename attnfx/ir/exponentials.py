"""Find the exponent of an expression that is an exponential."""

from __future__ import annotations

import math

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.ir.reach import reach


def outside(root: Expr) -> list[Expr]:
    """Return the nodes of an expression outside reductions and softmaxes."""
    inside = {"rsum": (), "rmax": ()}
    return list(reach([root], lambda e: e.args[2:3] if e.op == "softmax" else inside.get(e.op, e.args)))


def exponent(e: Expr) -> Expr | None:
    """Return a with e = exp(a), taking zeros as exp(-inf), or None if e is not an exponential."""
    if e.op == "exp":
        return e.args[0]
    if e.op == "exp2":
        return A.mul(A.const(math.log(2)), e.args[0])
    if e.op == "half":
        return None
    if e.op == "where" and e.args[2] is A.const(0.0):
        inner = exponent(e.args[1])
        if inner is None and e.args[1] is A.const(1.0):
            return None
        return None if inner is None else A.where(e.args[0], inner, A.const(-math.inf))
    if e.op == "mul":
        exps = [exponent(f) for f in e.args]
        known = [x for x in exps if x is not None]
        rest = [f for f, x in zip(e.args, exps, strict=True) if x is None]
        if not known:
            return None
        total = A.add(*known) if len(known) > 1 else known[0]
        for f in rest:
            if f.op == "where" and f.args[1] is A.const(1.0) and f.args[2] is A.const(0.0):
                total = A.where(f.args[0], total, A.const(-math.inf))
            elif f.op == "const" and float(f.value) > 0:  # type: ignore[arg-type]
                total = A.add(total, A.const(math.log(float(f.value))))  # type: ignore[arg-type]
            else:
                return None
        return total
    return None
