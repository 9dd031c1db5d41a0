"""Recognize the normalizer in a lifted weight: softmax, however it is written.

Takes the weight of (.., i, j) as an expression. Returns it as a program over `prob`, with the score, the extra logits
and the dropout taken out. Hand-written forms (exp / sum, with or without the maximum subtracted, through logsumexp,
with an added constant) become the same `softmax` node as the operator's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.exponentials import ZERO, Term, addends, outside, split_shift, summed, term, terms
from attnfx.ir.expr import FLOAT, Expr, walk
from attnfx.passes.lift.reductions import softmax

GATES = ("sigmoid", "softplus", "max", "erf", "tanh")  # parts of the functions that may replace a softmax
MAX_EXTRA = 8  # columns of the softmax beyond the keys


@dataclass(frozen=True)
class Normalised:
    """The weight as a program over `prob`, and the score whose softmax `prob` is."""

    score: Expr
    weight: Expr
    extra: tuple[Expr, ...] = ()
    dropout: float = 0.0
    draw: object = None  # the name of the node that applies the dropout
    safe: bool = False
    normaliser: str = "softmax"
    by_log: bool = False  # exp(score - log(sum)): if a fill swallows the logarithm, its weights are 1


class NotNormalised(Exception):
    """The weight has an unknown form: (code, sentence), with facts for the advice."""

    def __init__(self, code: str, message: str, **facts: object):
        super().__init__(message)
        self.code, self.message, self.facts = code, message, facts


def normalise(weight: Expr, j: Expr) -> Normalised:
    """Return the weight as a program over a softmax along the keys j. Raises `NotNormalised`."""
    weight, dropout, draw = _take_dropout(weight)
    by_log = any(e.op == "log" and _sums(e) for e in outside(weight))
    if not any(e.op == "softmax" for e in outside(weight)):
        weight = _by_hand(weight, j, by_log)
    weight = _zero_filled(weight)
    found = [e for e in outside(weight) if e.op == "softmax"]
    if not found:
        if any(e.op in ("rsum", "rmax") for e in outside(weight)):
            raise NotNormalised(
                "normaliser", "the weights are not divided by the sum of their own exponentials over the keys"
            )
        if not any(e.op in GATES for e in outside(weight)):
            raise NotNormalised("no_normaliser", "the weights are neither a softmax nor a supported gate of the scores")
        return _gated(weight, dropout, draw)
    if len(found) > 1:
        message = f"the weights combine {len(found)} softmaxes"
        if any(sum("softmax" in {x.op for x in walk(a)} for a in e.args) > 1 for e in outside(weight) if e.op == "mul"):
            raise NotNormalised("several_softmaxes", f"{message} in a product", factors=len(found))
        raise NotNormalised("several_softmaxes", message, count=len(found))
    made = found[0]
    body, extent, at = made.args
    name, safe = made.value  # type: ignore[misc]
    if str(j.value) not in at.free:
        raise NotNormalised("softmax_dim", "the softmax normalizes over another dimension than the keys")
    program = substitute(weight, {made: A.PROB})
    if any(e.op in ("rsum", "rmax", "softmax") for e in walk(program)):
        raise NotNormalised("normaliser", "the weights are reduced again after the softmax")
    program = rebuild(program, lambda old, args: args[0] if old.op == "half" else None)  # weights lie in [0, 1]
    variable = A.var(name, extent)
    shifted = A.sub(at, j)
    if shifted.free or shifted.op != "const":
        raise NotNormalised(
            "softmax_dim", "the softmax runs over a flattened dimension, or its weights are reordered along the keys"
        )
    body, _ = split_shift(body, variable)
    extra = _columns(body, variable, extent, j, int(shifted.value))  # type: ignore[call-overload]
    return Normalised(substitute(body, {variable: at}), program, extra, dropout, draw, bool(safe), by_log=by_log)


def _gated(weight: Expr, dropout: float, draw: object) -> Normalised:
    """Treat the whole weight as a function of the score, without a normalizer; the matcher finds the score in it."""
    weight = rebuild(weight, lambda old, args: args[0] if old.op == "half" and old.args[0].op == "sigmoid" else None)
    return Normalised(weight, A.PROB, (), dropout, draw, False, "none")


def _take_dropout(weight: Expr) -> tuple[Expr, float, object]:
    drops = [e for e in outside(weight) if e.op == "dropout"]
    if not drops:
        return weight, 0.0, None
    if len(drops) > 1:
        rates = [float(e.value[0]) for e in drops]  # type: ignore[index]
        whole, given = 1 - math.prod(1 - p for p in rates), " and ".join(f"{p:g}" for p in rates)
        message = "dropout is applied to the weights more than once"
        raise NotNormalised("several_dropouts", message, whole=f"{whole:.6g}", given=given)
    # only products and zero fills commute with dropout
    at, rate = weight, drops[0].value[0]  # type: ignore[index]
    while at is not drops[0]:
        inner = [a for a in at.args if any(e is drops[0] for e in walk(a))]
        plain = at.op in ("mul", "half") or (at.op == "where" and at.args[2] is ZERO and inner == [at.args[1]])
        if not plain or len(inner) != 1:
            message = "the weights are changed after dropout by more than a multiplication"
            raise NotNormalised("dropout_place", message, given=f"{rate:g}")
        at = inner[0]
    p, draw = drops[0].value  # type: ignore[misc]
    return substitute(weight, {drops[0]: drops[0].args[0]}), float(p), draw


def _zero_filled(weight: Expr) -> Expr:
    """Replace where(isnan(p), 0, p), which is zero in rows without a live key, by the safe softmax."""

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if old.op == "where" and len(args) == 3 and args[1].op == "softmax" and args[2] is ZERO:
            c = args[0]
            if c.op == "eq" and c.args[0] is args[1] and c.args[1] is args[1]:
                body, extent, at = args[1].args
                return softmax(args[1].value[0], extent, body, at, True)  # type: ignore[index]
        return None

    return rebuild(weight, change)


def _columns(body: Expr, variable: Expr, extent: Expr, j: Expr, start: int) -> tuple[Expr, ...]:
    """Return the logits of the softmax's columns besides the keys: [0, start) and [start + S, extent)."""
    more = A.sub(extent, j.args[0])
    if more.op != "const":
        raise NotNormalised("columns", "the softmax has more or fewer columns than keys, by a symbolic size")
    count = int(more.value)  # type: ignore[call-overload]
    if count > MAX_EXTRA:
        why = f"the softmax runs over {count} columns beside the keys, and at most {MAX_EXTRA} are supported"
        raise NotNormalised("columns", why, columns=extent, keys=j.args[0])
    if count < 0 or not 0 <= start <= count:
        message = "the weights of some keys are not columns of the softmax"
        raise NotNormalised("columns", message, columns=extent, keys=j.args[0])
    before = [A.const(n) for n in range(start)]
    after = [A.add(j.args[0], A.const(start + n)) for n in range(count - start)]
    return tuple(substitute(body, {variable: at}) for at in (*before, *after))


# -- decomposed softmax -------------------------------------------------------------------------


def _by_hand(weight: Expr, j: Expr, by_log: bool) -> Expr:
    """Replace each exponential over its sum by a softmax node, outside reductions."""

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr:
        if old.kind != FLOAT or old.op in ("rsum", "rmax", "softmax"):
            return old
        new = A.make(old.op, old.kind, args, old.value) if args != old.args else old
        if new.op not in ("mul", "exp"):
            return new
        factors = new.args if new.op == "mul" else (new,)
        inside = [f for f in factors if j.value in f.free or (f.op == "recip" and _sums(f))]
        made = _ratio(term(inside), j, by_log)
        return new if made is None else A.mul(made, *(f for f in factors if f not in inside))

    return rebuild(weight, change)


def _sums(e: Expr) -> bool:
    return any(x.op == "rsum" for x in outside(e))


def _vanishing(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
    """Replace a fill whose exponential is zero in float32 by -inf."""
    if old.op != "where" or old.kind != FLOAT or args[2].op != "const":
        return None
    fill: Any = args[2].value
    return A.where(args[0], args[1], A.const(-math.inf)) if fill < -1e4 else None


def _ratio(share: Term | None, j: Expr, by_log: bool) -> Expr | None:
    """Return softmax(a) if the share is exp(a - m) over the sum of exp(a - m), plus extras."""
    if share is None or share.core is not None or share.over is None:
        return None
    below = terms(share.over) or []
    main = [found for t in below if (found := summed(t)) is not None]
    others = [t for t in below if t.core is None and t.over is None]
    if len(main) != 1 or len(others) != len(below) - 1:
        return None
    ((variable, inside),) = main
    if substitute(inside, {variable: j}) is not share.exponent:
        return None
    score, shift = split_shift(inside, variable)
    if any(m not in addends(t.exponent) for t in others for m in shift):
        return None
    if not shift and not by_log:  # exp(fill) is zero: a masked row is 0 / 0
        score = rebuild(score, _vanishing)
    name, extent = str(variable.value), variable.args[0]
    whole = extent
    for n, t in enumerate(others):  # extras become columns after the keys
        whole = A.add(extent, A.const(n + 1))
        wide = A.var(name, whole)
        logit = A.add(ZERO, *(m for m in addends(t.exponent) if m not in shift))
        score = A.where(A.lt(wide, A.add(extent, A.const(n))), substitute(score, {variable: wide}), logit)
        variable = wide
    return softmax(name, whole, score, j)
