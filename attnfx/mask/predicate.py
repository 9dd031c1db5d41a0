"""Extract the mask of a score program: the predicate that a fill does not drown the score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import BOOL, Expr
from attnfx.mask.affine import numeric
from attnfx.spec import AttentionSpec

Q = ParamSpec("Q")
R = TypeVar("R")

FILL = -1e8  # a larger constant is a bias: -10000 does not mask
HALF_MIN = -65504.0  # finfo(float16).min, the lowest finite score after rounding to float16
MARGIN = 10.0  # scores are assumed to stay below |fill| / MARGIN, so that exp(fill - score) is exactly zero


@dataclass(frozen=True)
class Mask:
    """A score program's mask.

    keep        the predicate that the score of (b, h, i, j) is live; if false, a fill decides it
    fill        the largest fill; it decides a fully masked row (-inf: NaN; finite: the average over its keys)
    assumption  the condition on the scores under which the fill masks, a sentence; None if it masks any finite score
    """

    keep: Expr
    fill: float
    assumption: str | None


@lru_cache(maxsize=4096)
def mask_of(score: Expr) -> Mask | None:
    """Return the mask of a score program, or None if the program does not mask."""
    walk = _Walk()
    keep = walk.live(score, 1.0, False)
    if keep is A.TRUE:
        return None
    assumed = [f for f in walk.fills if f > -A.DROWNS]
    sentence = None
    if assumed:
        bound = f"{-max(assumed) / MARGIN:g}".replace("e+0", "e").replace("e+", "e")
        sentence = f"scores stay below {bound} in magnitude, so that the fill {max(assumed):g} masks"
    return Mask(keep, max(walk.effective), sentence)


class _Walk:
    """One walk over a score program. `fills` are the fills as written, times the constants outside; `effective` are the
    fills that the softmax sees."""

    def __init__(self) -> None:
        self.fills: list[float] = []
        self.effective: list[float] = []
        self.done: dict[tuple[Expr, float, bool], Expr] = {}

    def live(self, e: Expr, scale: float, half: bool) -> Expr:
        """Return the predicate that `scale * e`, rounded to float16 if `half`, is not a fill and adds none."""
        key = (e, scale, half)
        if key not in self.done:
            self.done[key] = self._live(e, scale, half)
        return self.done[key]

    def _live(self, e: Expr, scale: float, half: bool) -> Expr:
        match e.op:
            case "add" | "min":  # a constant term shifts all scores alike
                return A.and_(*(self.live(a, scale, half) for a in e.args if a.op != "const"))
            case "half":
                return self.live(e.args[0], scale, True)
            case "detach":
                return self.live(e.args[0], scale, half)
            case "mul":
                factor, *rest = e.args
                if factor.op == "const" and len(rest) == 1 and factor.value > 0:  # type: ignore[operator]
                    return self.live(rest[0], scale * float(factor.value), half)  # type: ignore[arg-type]
            case "where":
                c, x, y = e.args
                rounded = half or _rounded(e)
                kept, other = self._branch(x, scale, rounded), self._branch(y, scale, rounded)
                if not (kept is A.TRUE and other is A.TRUE):
                    return A.or_(A.and_(c, kept), A.and_(A.not_(c), other))
        return A.TRUE

    def _branch(self, e: Expr, scale: float, half: bool) -> Expr:
        if e.op != "const":
            return self.live(e, scale, half)
        fill = float(e.value) * scale  # type: ignore[arg-type]
        if not fill <= (HALF_MIN if half else FILL):
            return A.TRUE
        self.fills.append(fill)
        # a fill beyond float16's range, even after adding the largest score, becomes -inf
        self.effective.append(-math.inf if half and fill * (1 - 1 / MARGIN) <= -65520 else fill)
        return A.FALSE


def _rounded(e: Expr) -> bool:
    """Return whether the value of `e` was rounded to float16."""
    if e.op == "where":  # a constant fits any type, so it does not reveal the type
        values = [a for a in e.args[1:] if a.op != "const"]
        return bool(values) and all(_rounded(a) for a in values)
    return e.op == "half" or (e.op == "detach" and _rounded(e.args[0]))


def kept(spec: AttentionSpec | Expr) -> Expr:
    """Return the predicate that the mask keeps (b, h, i, j): the score takes part in its row's softmax. Without a
    normalizer, it is the predicate that the weight may differ from zero. A predicate stands for a softmax whose mask it
    is."""
    if isinstance(spec, AttentionSpec) and spec.normaliser != "softmax":
        return _nonzero(substitute(spec.weight, {A.PROB: spec.score}))
    if isinstance(spec, Expr) and spec.kind == BOOL:
        return spec
    mask = mask_of(spec.score if isinstance(spec, AttentionSpec) else spec)
    return A.TRUE if mask is None else mask.keep


@lru_cache(maxsize=4096)
def live(spec: AttentionSpec | Expr) -> Expr:
    """Return the predicate that (b, h, i, j) may contribute to the output of a spec (or of a softmax over a program).

    It may if the mask keeps it, since the score counts in the sum even if its weight becomes zero, or if the weight
    program maps a probability of zero to a nonzero weight.
    """
    keep = kept(spec)
    if not isinstance(spec, AttentionSpec) or spec.normaliser != "softmax" or spec.weight is A.PROB:
        return keep
    return A.or_(keep, _nonzero(substitute(spec.weight, {A.PROB: A.const(0.0)})))


def analysis(
    maxsize: int,
) -> Callable[
    [Callable[Concatenate[Expr, Expr, dict[str, int], Q], R]],
    Callable[Concatenate[AttentionSpec | Expr, Mapping[str, int], Q], R],
]:
    """Decorate and cache a function of (seen, keep, sizes, ...); callers give a spec and its sizes instead.

    `seen` and `keep` are `live` and `kept` of the spec, score program or predicate, with the sizes replaced by their
    values. Specs with one mask share the result.
    """

    def decorate(of: Callable[Concatenate[Expr, Expr, dict[str, int], Q], R]):
        @lru_cache(maxsize)
        def cached(seen: Expr, keep: Expr, items: tuple[tuple[str, int], ...], *args: Q.args, **kwargs: Q.kwargs) -> R:
            sizes = dict(items)
            return of(numeric(seen, sizes), numeric(keep, sizes), sizes, *args, **kwargs)

        @wraps(of)
        def analyze(spec: AttentionSpec | Expr, sizes: Mapping[str, int], *args: Q.args, **kwargs: Q.kwargs) -> R:
            return cached(live(spec), kept(spec), tuple(sorted(sizes.items())), *args, **kwargs)

        return analyze

    return decorate


def _nonzero(e: Expr) -> Expr:
    """Return the predicate that a weight may differ from zero."""
    match e.op:
        case "const":
            return A.const(e.value != 0)
        case "where":
            c, x, y = e.args
            x, y = _nonzero(x), _nonzero(y)
            return A.TRUE if x is A.TRUE and y is A.TRUE else A.or_(A.and_(c, x), A.and_(A.not_(c), y))
        case "mul":
            return A.and_(*(_nonzero(a) for a in e.args))
        case "add":
            return A.or_(*(_nonzero(a) for a in e.args))
        case "half" | "detach" | "tanh" | "abs" | "erf" | "sqrt":
            return _nonzero(e.args[0])
        case "exp" | "exp2" | "sigmoid" | "softplus":
            mask = mask_of(e.args[0])
            return A.TRUE if mask is None else mask.keep
    return A.TRUE
