"""Find additive masks: tensors of zeros and -inf (or a finite fill) that the program adds to the scores like a bias.

A score whose addend is at or below DROWNED is masked: its weight is zero next to any score above LOST, for every dot
product that is finite and below 9e29 in magnitude. In a row without a score above LOST the masked scores decide, as in
eager: they average if they are finite, and give NaN if all are -inf. So kernels may skip drowned scores if they
recompute, over every key, the rows whose largest score is not above LOST. A fill of smaller magnitude is only safe to
skip if the scores are known: -1e9 and float16's -65504 are biases here.

LOST is that high for another reason. If all scores of a row are as low as -1e9, the spacing of float32 numbers exceeds
the scores' differences in units of log 2, which kernels use. Such rows need natural units.
"""

from __future__ import annotations

import math
from functools import lru_cache

from attnfx.ir import algebra as A
from attnfx.ir.expr import FLOAT, INT, Expr, walk
from attnfx.mask.predicate import FILL

DROWNED = -1e30
LOST = -1e6

_PLAIN = frozenset("const load add mul float half detach min max where not and or ge0 eq0".split())
_INDEX = frozenset("const size var add mul floordiv mod".split())
_FLAG = 1.0  # the largest magnitude expected of an integer in a mask


@lru_cache(maxsize=4096)
def addend(score: Expr, least: float = DROWNED) -> Expr | None:
    """Return the addend of a score that loads by key and may be as low as `least`, or None. It is an expression over b,
    h, i, j and loads, without dot. The score differs from it by finite terms."""
    found = _addend(score, 1.0)
    if found is None or _interval(found)[0] > least:
        return None
    return found if any(e.op == "load" and "j" in e.free for e in walk(found)) else None


def _addend(e: Expr, scale: float) -> Expr | None:
    """Return the addend of an expression that the score multiplies by `scale`."""
    if _plain(e) and any(x.op == "load" for x in walk(e)):
        return e
    match e.op:
        case "add":
            some = [x for a in e.args if (x := _addend(a, scale)) is not None and "j" in x.free]
            return A.add(*some, *(a for a in e.args if a.op == "const")) if some else None
        case "mul":
            factor, *rest = e.args
            if factor.op == "const" and len(rest) == 1 and factor.value > 0:  # type: ignore[operator]
                inner = _addend(rest[0], scale * float(factor.value))  # type: ignore[arg-type]
                return None if inner is None else A.mul(factor, inner)
        case "half" | "detach":
            return _addend(e.args[0], scale)
        case "where":
            rest = [a for a in e.args[1:] if not (a.op == "const" and float(a.value) * scale <= FILL)]  # type: ignore[arg-type]
            if len(rest) == 1:  # the mask's own predicate covers the filled scores
                return _addend(rest[0], scale)
        case "max" | "min":
            some = [a if a.op == "const" else _addend(a, scale) for a in e.args]
            known = [x for x in some if x is not None]
            if len(known) == len(some):
                return A.make(e.op, FLOAT, tuple(known))
    return None


def _plain(e: Expr) -> bool:
    """Return whether an expression consists of simple operations on elements loaded at computed indices."""
    if e.op == "load":
        return all(x.op in _INDEX for index in e.args for x in walk(index)) and not any(
            {"i", "j"} <= index.free for index in e.args
        )
    return e.op in _PLAIN and all(_plain(a) for a in e.args)


def _interval(e: Expr) -> tuple[float, float]:
    """Return the least and the largest value expected of an expression of `_plain` operations."""
    if e.op == "const":
        return float(e.value), float(e.value)  # type: ignore[arg-type]
    if e.op == "load":
        return {FLOAT: (-math.inf, math.inf), INT: (-_FLAG, _FLAG)}.get(e.kind, (0.0, 1.0))
    within = [_interval(a) for a in e.args]
    match e.op:
        case "float" | "half" | "detach":
            return within[0]
        case "add":
            return sum(low for low, _ in within), sum(high for _, high in within)
        case "mul":
            low, high = within[0]
            for x, y in within[1:]:
                ends = [p * q if p and q else 0.0 for p in (low, high) for q in (x, y)]
                low, high = min(ends), max(ends)
            return low, high
        case "min" | "max":
            pick = min if e.op == "min" else max
            return pick(low for low, _ in within), pick(high for _, high in within)
        case "where":
            return min(low for low, _ in within[1:]), max(high for _, high in within[1:])
    return 0.0, 1.0
