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
from attnfx.ir.exponentials import exponent, outside
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
    """The weight has an unknown form: (code, sentence)."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message


def normalise(weight: Expr, j: Expr) -> Normalised:
    """Return the weight as a program over a softmax along the keys j. Raises `NotNormalised`."""
    weight, dropout, draw = _take_dropout(weight)
    by_log = any(e.op == "log" and any(x.op == "rsum" for x in outside(e)) for e in outside(weight))
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
        raise NotNormalised("several_softmaxes", f"the weights combine {len(found)} softmaxes")
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
    body = strip_maximum(body, variable)
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
        raise NotNormalised("several_dropouts", "dropout is applied to the weights more than once")
    # only products and zero fills commute with dropout
    at = weight
    while at is not drops[0]:
        inner = [a for a in at.args if any(e is drops[0] for e in walk(a))]
        plain = at.op in ("mul", "half") or (at.op == "where" and at.args[2] is A.const(0.0) and inner == [at.args[1]])
        if not plain or len(inner) != 1:
            raise NotNormalised("dropout_place", "the weights are changed after dropout by more than a multiplication")
        at = inner[0]
    p, draw = drops[0].value  # type: ignore[misc]
    return substitute(weight, {drops[0]: drops[0].args[0]}), float(p), draw


def _zero_filled(weight: Expr) -> Expr:
    """Replace where(isnan(p), 0, p), which is zero in rows without a live key, by the safe softmax."""

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if old.op == "where" and len(args) == 3 and args[1].op == "softmax" and args[2] is A.const(0.0):
            c = args[0]
            if c.op == "eq" and c.args[0] is args[1] and c.args[1] is args[1]:
                body, extent, at = args[1].args
                return softmax(args[1].value[0], extent, body, at, True)  # type: ignore[index]
        return None

    return rebuild(weight, change)


def strip_maximum(score: Expr, variable: Expr) -> Expr:
    """Drop the addends that hold a row maximum: they cancel in the softmax, also under a mask that drowns."""
    if score.op == "where" and A.drowning(score.args[2]):
        return A.where(score.args[0], strip_maximum(score.args[1], variable), score.args[2])
    if score.op == "half" and score.args[0].op == "add":
        inner = strip_maximum(score.args[0], variable)
        return score if inner is score.args[0] else inner
    terms = score.args if score.op == "add" else (score,)
    kept = [t for t in terms if variable.value in t.free or not any(e.op == "rmax" for e in walk(t))]
    return A.add(*kept) if len(kept) != len(terms) and kept else score


def _columns(body: Expr, variable: Expr, extent: Expr, j: Expr, start: int) -> tuple[Expr, ...]:
    """Return the logits of the softmax's columns besides the keys: [0, start) and [start + S, extent)."""
    more = A.sub(extent, j.args[0])
    if more.op != "const":
        raise NotNormalised("columns", "the softmax has more or fewer columns than keys, by a symbolic size")
    count = int(more.value)  # type: ignore[call-overload]
    if count > MAX_EXTRA:
        why = f"the softmax runs over {count} columns beside the keys, and at most {MAX_EXTRA} are supported"
        raise NotNormalised("columns", why)
    if count < 0 or not 0 <= start <= count:
        raise NotNormalised("columns", "the weights of some keys are not columns of the softmax")
    before = [A.const(n) for n in range(start)]
    after = [A.add(j.args[0], A.const(start + n)) for n in range(count - start)]
    return tuple(substitute(body, {variable: at}) for at in (*before, *after))


# -- decomposed softmax -------------------------------------------------------------------------


def _by_hand(weight: Expr, j: Expr, by_log: bool) -> Expr:
    """Replace each product of an exponential and the reciprocal of its sum by a softmax node."""

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        new = A.make(old.op, old.kind, args, old.value) if args != old.args else old
        new = _unlog(new)
        if new.op != "mul":
            return new
        over = [f for f in new.args if f.op == "recip" and any(e.op == "rsum" for e in outside(f))]
        if len(over) != 1:
            return new
        inside = [f for f in new.args if f is not over[0] and j.value in f.free]
        rest = [f for f in new.args if f is not over[0] and f not in inside]
        made = _ratio(inside, over[0].args[0], j, by_log)
        return A.mul(made, *rest) if made is not None and rest else made or new

    return _rebuild_outside(weight, change)


def _rebuild_outside(root: Expr, change) -> Expr:  # type: ignore[no-untyped-def]
    """Rebuild like `rebuild`, but leave the bodies of reductions alone."""
    done: dict[Expr, Expr] = {}

    def visit(at: Expr) -> Expr:
        if at not in done:
            args = at.args if at.op in ("rsum", "rmax", "softmax") else tuple(visit(a) for a in at.args)
            done[at] = change(at, args) if at.kind == FLOAT and at.args else at
        return done[at]

    return visit(root)


def _unlog(e: Expr) -> Expr:
    """Rewrite exp(a - log(d)) as exp(a) / d, for a sum d."""
    if e.op == "exp" and e.args[0].op == "where" and A.drowning(e.args[0].args[2]):
        keep, inner, fill = e.args[0].args  # the subtraction has moved under the mask
        split = _unlog(A.unary("exp", inner))
        if split.op == "mul" and len(split.args) == 2 and {f.op for f in split.args} == {"exp", "recip"}:
            over, top = sorted(split.args, key=lambda f: f.op == "exp")
            return A.mul(A.unary("exp", A.where(keep, top.args[0], fill)), over)
    if e.op != "exp" or e.args[0].op != "add":
        return e
    logs = [t for t in e.args[0].args if _negated_log(t) is not None]
    if len(logs) != 1:
        return e
    rest = [t for t in e.args[0].args if t is not logs[0]]
    return A.mul(A.unary("exp", A.add(*rest)), A.unary("recip", _negated_log(logs[0])))  # type: ignore[arg-type]


def _negated_log(t: Expr) -> Expr | None:
    if t.op == "mul" and len(t.args) == 2 and t.args[0] is A.const(-1.0) and t.args[1].op == "log":
        inner = t.args[1].args[0]
        return inner if any(e.op == "rsum" for e in outside(inner)) else None
    return None


def _vanishing(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
    """Replace a fill whose exponential is zero in float32 by -inf."""
    if old.op != "where" or old.kind != FLOAT or args[2].op != "const":
        return None
    fill: Any = args[2].value
    return A.where(args[0], args[1], A.const(-math.inf)) if fill < -1e4 else None


def _ratio(factors: list[Expr], denominator: Expr, j: Expr, by_log: bool) -> Expr | None:
    """Return softmax(a) if the factors multiply to exp(a - m) and the denominator sums exp(a - m), plus extras."""
    if not factors:
        return None
    top = exponent(A.mul(*factors) if len(factors) > 1 else factors[0])
    if top is None:
        return None
    sums = [t for t in (denominator.args if denominator.op == "add" else (denominator,))]
    main = [t for t in sums if t.op == "rsum"]
    if len(main) != 1:
        return None
    body, extent = main[0].args
    name = str(main[0].value)
    variable = A.var(name, extent)
    below = exponent(body)
    if below is None or substitute(below, {variable: j}) is not top:
        return None
    base = top
    while base.op == "where" and A.drowning(base.args[2]):  # the subtraction has moved under the mask
        base = base.args[1]
    maxima = [
        t
        for t in (base.args if base.op == "add" else (base,))
        if any(e.op == "rmax" for e in outside(t)) and j.value not in t.free
    ]
    others = [t for t in sums if t is not main[0]]
    extra: list[Expr] = []
    for t in others:
        logit = exponent(t) if t.op != "const" else A.const(math.log(float(t.value))) if float(t.value) > 0 else None  # type: ignore[arg-type]
        if logit is None:
            return None
        terms = list(logit.args if logit.op == "add" else (logit,))
        for m in maxima:
            if m not in terms:
                return None
            terms.remove(m)
        extra.append(A.add(*terms) if terms else A.const(0.0))
    score = strip_maximum(below, variable)
    if not maxima and not by_log:  # exp(fill) is zero: a masked row is 0 / 0
        score = rebuild(score, _vanishing)
    whole = extent
    for n, logit in enumerate(extra):  # extras become columns after the keys
        whole = A.add(extent, A.const(n + 1))
        wide = A.var(name, whole)
        score = A.where(A.lt(wide, A.add(extent, A.const(n))), substitute(score, {variable: wide}), logit)
        variable = wide
    return softmax(name, whole, score, j)
