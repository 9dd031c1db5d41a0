"""Prepare a spec for evaluation in blocks: its score and weight expressions and their derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild
from attnfx.ir.expr import Expr, walk
from attnfx.ir.gradient import gradient
from attnfx.mask import mask_of
from attnfx.spec import AttentionSpec, fill_of

_ZERO = A.const(0.0)


@dataclass(frozen=True)
class Program:
    """The expressions that each block evaluates. In `score` and its slopes, `dot` is scale * (q . k).

    kept         the score of unmasked elements (`score` itself without a mask)
    keep         the mask of the score's outermost `where`, or None
    fill         the score of masked elements, which decides rows without a live key; None without a mask
    slopes       (leaf, d score / d leaf) pairs: dot first, then the loads that need a gradient
    kept_slopes  the same for `kept`
    tame         whether all kept slopes are constants; a block without dead rows can then use them without the mask,
                 because the weight of a masked key is zero
    weights      (leaf, d weight / d leaf) pairs: prob first
    extras       for each extra logit, its (load, d logit / d load) pairs
    """

    scale: float
    score: Expr
    kept: Expr
    keep: Expr | None
    fill: float | None
    slopes: tuple[tuple[Expr, Expr], ...]
    kept_slopes: tuple[tuple[Expr, Expr], ...]
    tame: bool
    weights: tuple[tuple[Expr, Expr], ...]
    extras: tuple[tuple[tuple[Expr, Expr], ...], ...]


def split_scale(score: Expr) -> tuple[float, Expr]:
    """Return (the constant factor of every occurrence of dot, else 1; the score over a dot that includes it)."""
    scale = _scale(score)
    return scale, _unscaled(score, scale)


def _scale(score: Expr) -> float:
    scales: set[float] = set()
    for e in walk(score):
        if A.DOT in e.args:
            head, once = e.args[0], e.args.count(A.DOT) == 1  # false in a power of dot
            scales.add(float(head.value) if e.op == "mul" and head.op == "const" and once else 1.0)  # type: ignore[arg-type]
    scale = scales.pop() if len(scales) == 1 else 1.0
    return scale if math.isfinite(scale) and scale != 0.0 else 1.0


def _unscaled(score: Expr, scale: float) -> Expr:
    if scale == 1.0:
        return score

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if A.DOT in old.args:  # every such node is a product that starts with the scale
            rest = args[1:]
            return rest[0] if len(rest) == 1 else A.mul(*rest)
        return None

    return rebuild(score, change)


def _slopes(root: Expr, leaf: Expr | None, wanted: list[Expr]) -> tuple[tuple[Expr, Expr], ...]:
    leaves = [*([leaf] if leaf is not None else []), *(x for x in wanted if x in set(walk(root)))]
    found = zip(leaves, gradient(root, leaves))
    return tuple((x, slope) for x, slope in found if x is leaf or slope is not _ZERO)


def has_gradient(spec: AttentionSpec, e: Expr) -> bool:
    """Return whether an expression loads from a capture that needs a gradient; a table has none."""
    slot = e.value
    return e.op == "load" and isinstance(slot, int) and slot < len(spec.captures) and spec.captures[slot].grad


@lru_cache(maxsize=512)
def program_of(spec: AttentionSpec) -> Program:
    wanted: dict[Expr, None] = {}
    for root in spec.programs:
        for e in walk(root):
            if has_gradient(spec, e):
                wanted[e] = None
            if e.op in ("rsum", "rmax") and any(has_gradient(spec, x) for x in walk(e)):
                raise ValueError(f"the chunked tier cannot differentiate a reduction of a captured tensor: {e}")
    scale, score = split_scale(spec.score)
    masked = fill_of(score) is not None and spec.normaliser == "softmax"
    keep, kept = (score.args[0], score.args[1]) if masked else (None, score)
    found = mask_of(spec.score)
    kept_slopes = _slopes(kept, A.DOT, list(wanted))
    return Program(
        scale=scale,
        score=score,
        kept=kept,
        keep=keep,
        fill=float(found.fill) if found is not None else fill_of(spec.score),
        slopes=_slopes(score, A.DOT, list(wanted)),
        kept_slopes=kept_slopes,
        tame=all(slope.op == "const" for _, slope in kept_slopes),
        weights=_slopes(spec.weight, A.PROB, list(wanted)),
        extras=tuple(_slopes(e, None, list(wanted)) for e in spec.extra),
    )
