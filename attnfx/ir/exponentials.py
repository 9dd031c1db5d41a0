"""Read sums of exponentials: their terms exp(exponent) * core / over, and the shifts that cancel in quotients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import Expr, walk
from attnfx.ir.reach import reach

MOST = 256  # terms that one sum is multiplied out to
ZERO = A.const(0.0)
Core = Callable[[Expr], bool]


@dataclass(frozen=True)
class Term:
    """The value exp(`exponent`) * `core` / `over`; None stands for one."""

    exponent: Expr
    core: Expr | None = None
    over: Expr | None = None


def outside(root: Expr) -> list[Expr]:
    """Return the nodes of an expression outside reductions and softmaxes."""
    inside = {"rsum": (), "rmax": ()}
    return list(reach([root], lambda e: e.args[2:3] if e.op == "softmax" else inside.get(e.op, e.args)))


def addends(e: Expr) -> tuple[Expr, ...]:
    return e.args if e.op == "add" else (e,)


def exponent(e: Expr) -> Expr | None:
    """Return a with e = exp(a), taking zeros as exp(-inf), or None if e is not an exponential."""
    return _logarithm(e) if any(x.op in ("exp", "exp2") for x in outside(e)) else None


def _logarithm(e: Expr) -> Expr | None:
    """Return the logarithm of a product of exponentials, masks of one and zero, and positive numbers, or None."""
    if e.op == "exp":
        return e.args[0]
    if e.op == "exp2":
        return A.mul(A.const(math.log(2)), e.args[0])
    if e.op == "const" and float(e.value) > 0:  # type: ignore[arg-type]
        return A.const(math.log(float(e.value)))  # type: ignore[arg-type]
    if e.op == "where" and e.args[2] is ZERO:
        inner = _logarithm(e.args[1])
        return None if inner is None else A.where(e.args[0], inner, A.const(-math.inf))
    if e.op == "mul":
        found = [x for x in map(_logarithm, e.args) if x is not None]
        return A.add(*found) if len(found) == len(e.args) else None
    return None


# -- sums as terms --------------------------------------------------------------------------------
def terms(e: Expr, core: Core = lambda e: False) -> list[Term] | None:
    """Return the nonzero terms of a sum, or None if one has another form. Factors of a product that are sums are
    multiplied out if they hold a possible core."""
    products = [factors for factors in _expanded(e, core) if ZERO not in factors]
    found = [t for t in map(term, products) if t is not None]
    return found if len(found) == len(products) else None


def _expanded(e: Expr, core: Core) -> list[list[Expr]]:
    """Return the factors of each term."""
    if e.op == "add":
        return [t for a in e.args for t in _expanded(a, core)]
    if e.op == "mul":
        out: list[list[Expr]] = [[]]
        for a in e.args:
            inner = _expanded(a, core) if _holds(a, core) else [[a]]
            out = [[*x, *y] for x in out for y in inner]
            if len(out) > MOST:
                return [[e]]
        return out
    if e.op == "rsum" and e.args[1].op == "const" and any(map(core, outside(e.args[0]))):
        over = A.var(str(e.value), e.args[1])  # a sum over terms that were stacked
        parts = (substitute(e.args[0], {over: A.const(c)}) for c in range(int(e.args[1].value)))  # type: ignore[call-overload]
        return [t for part in parts for t in _expanded(part, core)]
    return [[e]]


def _holds(e: Expr, core: Core) -> bool:
    if e.op == "rsum":
        return core(e) or any(map(core, outside(e.args[0])))
    return core(e) or (e.op in ("add", "mul") and any(_holds(a, core) for a in e.args))


def term(factors: Iterable[Expr]) -> Term | None:
    """Return the product of the factors, or None if two of them are neither exponentials nor the one divisor."""
    left = list(factors)
    for f in tuple(left):  # x / x
        if f.op == "recip" and f.args[0] in left:
            left.remove(f)
            left.remove(f.args[0])
    powers = [f for f in left if _logarithm(f) is not None]
    core = [f for f in left if f not in powers and f.op != "recip"]
    scale = A.mul(*powers)
    power = _logarithm(scale) if scale.op == "const" else exponent(scale)
    if power is None:
        return None
    power, divisors = _divided(power)
    over = [*divisors, *(f.args[0] for f in left if f.op == "recip")]
    if len(core) > 1 or len(over) > 1:
        return None
    return Term(power, core[0] if core else None, over[0] if over else None)


def _divided(power: Expr) -> tuple[Expr, list[Expr]]:
    """Split the exponent a - log(d), also under a mask that drowns, into a and the sums d by which it divides."""
    if power.op == "where" and A.drowning(power.args[2]):  # the subtraction has moved under the mask
        inner, over = _divided(power.args[1])
        return (A.where(power.args[0], inner, power.args[2]) if over else power), over
    over = {t: t.args[1].args[0] for t in addends(power) if _negated_log(t)}
    return A.add(ZERO, *(t for t in addends(power) if t not in over)) if over else power, list(over.values())


def _negated_log(t: Expr) -> bool:
    if t.op != "mul" or len(t.args) != 2 or t.args[0] is not A.const(-1.0) or t.args[1].op != "log":
        return False
    return any(e.op == "rsum" for e in outside(t.args[1].args[0]))


def summed(t: Term) -> tuple[Expr, Expr] | None:
    """Return (variable, exponent over it) if the term is a sum of exponentials, else None."""
    if t.core is None or t.core.op != "rsum" or t.over is not None:
        return None
    body, extent = t.core.args
    inside = exponent(body)
    return None if inside is None else (A.var(str(t.core.value), extent), A.add(inside, t.exponent))


# -- shifts ---------------------------------------------------------------------------------------
def split_shift(score: Expr, variable: Expr) -> tuple[Expr, tuple[Expr, ...]]:
    """Split off the addends that hold a row maximum: they cancel in the softmax, also under a mask that drowns."""
    if score.op == "where" and A.drowning(score.args[2]):
        inner, shift = split_shift(score.args[1], variable)
        return A.where(score.args[0], inner, score.args[2]), shift
    if score.op == "half" and score.args[0].op == "add":
        inner, shift = split_shift(score.args[0], variable)
        return inner if shift else score, shift
    shift = tuple(t for t in addends(score) if variable.value not in t.free and any(e.op == "rmax" for e in walk(t)))
    kept = [t for t in addends(score) if t not in shift]
    return (A.add(*kept), shift) if shift and kept else (score, ())


def without_zeros(e: Expr) -> Expr:
    """Drop zero times a row maximum, which is left where a maximum cancels that must be finite."""

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        zero = old.op == "mul" and ZERO in args and any(x.op == "rmax" for x in walk(old))
        return ZERO if zero else None

    return rebuild(e, change)
