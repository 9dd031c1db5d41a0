"""Prepare a spec for a kernel: the expressions for full tiles, for partial tiles and for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import BOOL, INT, Expr, walk
from attnfx.ir.gradient import gradient
from attnfx.kernels.chunked.program import has_gradient
from attnfx.kernels.evaluate import opaque, toeplitz
from attnfx.mask import live, mask_of
from attnfx.mask.additive import LOST, addend
from attnfx.spec import AttentionSpec

LOG2E = math.log2(math.e)
SMALLEST_SCALE = 1e-3  # least factor of dot to divide the other terms by: float32 has room for a thousandfold growth
_ZERO, _ONE = A.const(0.0), A.const(1.0)
DIAGONAL = "w"  # w = j - i + T - 1


@dataclass(frozen=True)
class Table:
    """Values that ATen operators compute before the kernel runs; the program loads them from a capture.

    expr   the expression, over b and h, and one of i, j and the diagonal w
    axes   the names among b, h, i, j, w that it depends on: the dims of the table
    """

    expr: Expr
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """A load that needs a gradient. `space` names the indices it depends on: "head", "row", "column", "diagonal"
    (j - i) or "pair".

    score   d score / d load at unmasked elements
    whole   the same at all elements
    weight  d weight / d load, over prob (without a softmax: over dot, and score is zero)
    """

    load: Expr
    space: str
    score: Expr
    whole: Expr
    weight: Expr


@dataclass(frozen=True)
class Program:
    """The expressions that the kernels evaluate for a spec.

    softmax  whether the scores are normalized by a softmax
    scale    a positive constant; scale * score is the score in units of log 2
    score    the score of unmasked elements, over dot
    keep     the mask, or None
    whole    the score of all elements, in natural units: for rows without a live key; None if never needed
    lost     a row whose logsumexp is at most this lacks a live key; in natural units; None if `whole` is
    slope    d score / d dot at unmasked elements, in natural units; without a softmax, d weight / d dot
    whole_slope  d whole / d dot, divided by `slope` if that is a nonzero constant; None if `whole` is
    weight   the factor of a normalized weight, or None; without a softmax, the weight itself, over dot
    extras   the extra logits, in units of log 2
    leaves   the loads in the score or weight that need a gradient
    tables   the tables, whose slots follow the captures'
    drowned  whether a capture added to the scores may leave a row without a live key (see `attnfx.mask.additive`)
    """

    softmax: bool
    scale: float
    score: Expr
    keep: Expr | None
    whole: Expr | None
    lost: float | None
    slope: Expr
    whole_slope: Expr | None
    weight: Expr | None
    extras: tuple[Expr, ...]
    leaves: tuple[Leaf, ...]
    tables: tuple[Table, ...]
    drowned: bool = False

    @property
    def roots(self) -> tuple[Expr, ...]:
        some = (self.score, self.keep, self.whole, self.slope, self.whole_slope, self.weight, *self.extras)
        return (*(e for e in some if e is not None), *(e for x in self.leaves for e in (x.score, x.whole, x.weight)))

    @property
    def factor(self) -> float | None:
        """Return the constant that scales a finished gradient of dot; None if the slope varies between scores."""
        if self.slope.op != "const" or not self.slope.value:
            return None
        return float(self.slope.value)  # type: ignore[arg-type]


class Unsupported(Exception):
    """A spec cannot be expressed as a program for the kernels; the message is one sentence with the reason."""


@lru_cache(maxsize=512)
def program_of(spec: AttentionSpec) -> Program | str:
    """Return the program of a spec, or one sentence that explains why it cannot have one."""
    try:
        return _program(spec)
    except Unsupported as why:
        return str(why)


def _program(spec: AttentionSpec) -> Program:
    if spec.compute != "float32":
        raise Unsupported(f"the attention needs {spec.compute}, and the kernels compute in float32")
    tables = _Tables(len(spec.captures))
    score, weight = tables.out_of(spec.score), tables.out_of(spec.weight)
    extras = tuple(tables.out_of(e) for e in spec.extra)
    wanted = [x for x in _loads(score, weight) if has_gradient(spec, x)]
    if spec.normaliser == "softmax":
        mask = mask_of(score)
        keep = mask.keep if mask is not None else None
        kept = score if keep is None else assume(score, keep)
        factor = None if weight is A.PROB else _linear(weight)
        slope, *slopes = gradient(kept, [A.DOT, *wanted])
        by_weight = gradient(weight, wanted)
        scale, inner = _scaled(kept)
        drowned = addend(score, LOST) is not None
        finite = mask is not None and mask.fill != -math.inf
        whole = score if (finite or drowned) and not extras else None
        # far above a fill with scores added to it, and far below the score of any live key
        found = [mask.fill / 2] if mask is not None and finite else []
        lost = max([*found, 2 * LOST] if drowned else found, default=None)
        whole_slope, *whole_slopes = gradient(score, [A.DOT, *wanted])
        if slope.op == "const" and slope.value:
            whole_slope = A.mul(A.const(1.0 / float(slope.value)), whole_slope)  # type: ignore[arg-type]
    elif spec.normaliser == "none":
        found = live(AttentionSpec(score=score, weight=weight, normaliser="none"))
        keep = None if found is A.TRUE else found
        whole, lost, drowned, scale, inner = None, None, False, 1.0, score
        factor = substitute(weight, {A.PROB: score})
        if keep is not None:
            factor = assume(factor, keep)
        slope, *by_weight = gradient(factor, [A.DOT, *wanted])
        slopes = whole_slopes = [_ZERO] * len(wanted)
        whole_slope = None
    else:
        raise Unsupported(f"the kernels lack the normalizer {spec.normaliser!r}")
    to = tables.by_diagonal
    leaves = tuple(
        Leaf(x, _space(x), to(s), to(e) if whole is not None else _ZERO, to(w))
        for x, s, e, w in zip(wanted, slopes, whole_slopes, by_weight)
    )
    return Program(
        softmax=spec.normaliser == "softmax",
        scale=scale,
        score=to(inner),
        keep=None if keep is None else to(keep),
        whole=None if whole is None else to(whole),
        lost=lost,
        slope=to(slope),
        whole_slope=None if whole is None or whole_slope is None else to(whole_slope),
        weight=None if factor is None else to(factor),
        extras=tuple(A.mul(A.const(LOG2E), e) for e in extras),
        leaves=tuple(x for x in leaves if not x.score is x.whole is x.weight is _ZERO),
        tables=tuple(tables.found),
        drowned=drowned,
    )


def assume(e: Expr, fact: Expr) -> Expr:
    """Simplify an expression under the assumption that `fact` holds."""
    by: dict[Expr, Expr] = {}
    for part in fact.args if fact.op == "and" else (fact,):
        by |= {part: A.TRUE, A.not_(part): A.FALSE}

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        return by.get(old)

    return rebuild(e, change)


def _scaled(kept: Expr) -> tuple[float, Expr]:
    """Return (c, x) with kept * log2(e) = c * x and c > 0. c is the constant factor, or for a sum the factor of dot.
    The exponent's own FMA applies it."""
    moved = A.mul(A.const(LOG2E), kept)
    if (c := _factor(moved)) is not None:
        return c, A.mul(*moved.args[1:])
    for term in moved.args if moved.op == "add" else ():
        c = _factor(term)
        if c is not None and c >= SMALLEST_SCALE and term.args[1:] == (A.DOT,):
            rest = A.add(*(x for x in moved.args if x is not term))
            return c, A.add(A.DOT, A.mul(A.const(1.0 / c), rest))
    return 1.0, moved


def _factor(e: Expr) -> float | None:
    """Return the constant factor of a product if it is positive and finite, else None."""
    if e.op != "mul" or e.args[0].op != "const":
        return None
    c = float(e.args[0].value)  # type: ignore[arg-type]
    return c if 0.0 < c < math.inf else None


def _linear(weight: Expr) -> Expr:
    """Return the factor a with weight = a * prob. Raise Unsupported if the weight is not linear in prob."""
    if weight is A.PROB:
        return _ONE
    if weight.op == "mul":
        inside = [x for x in weight.args if _has_prob(x)]
        rest = [x for x in weight.args if not _has_prob(x)]
        if len(inside) == 1:
            return A.mul(*rest, _linear(inside[0]))
    if weight.op == "add" and all(_has_prob(x) for x in weight.args):
        return A.add(*(_linear(x) for x in weight.args))
    if weight.op == "where" and not _has_prob(weight.args[0]):
        branches = [_ZERO if x is _ZERO else _linear(x) for x in weight.args[1:]]
        return A.where(weight.args[0], *branches)
    if weight.op == "detach":
        raise Unsupported("the weights are detached from autograd")
    raise Unsupported(f"the weight is not a multiple of the probability: {weight}")


def _has_prob(e: Expr) -> bool:
    return any(x is A.PROB for x in walk(e))


def _loads(*roots: Expr) -> list[Expr]:
    return list(dict.fromkeys(e for root in roots for e in walk(root) if e.op == "load"))


def _space(load: Expr) -> str:
    at = load.free & {"i", "j"}
    if at == {"i", "j"}:
        return "pair" if toeplitz(load) is None else "diagonal"
    return "row" if "i" in at else "column" if "j" in at else "head"


class _Tables:
    """A transformation that moves reductions and exact ATen operators of a program into tables."""

    def __init__(self, slots: int) -> None:
        self.first, self.found = slots, []
        self.moved: dict[Expr, Expr] = {}

    def out_of(self, root: Expr) -> Expr:
        return self._move(root, _computed, lambda e: e.kind in (BOOL, INT) or e.op in ("rsum", "rmax"))

    def by_diagonal(self, root: Expr) -> Expr:
        """Move lookups that depend on j - i alone, with the arithmetic around them, into tables by diagonal. A score
        then loads one element, adjacent to its neighbor's. Comparisons of a mask stay in place."""

        def movable(e: Expr) -> bool:
            return (e.kind != BOOL or e.op == "load") and toeplitz(e) is not None

        return self._move(root, lambda e: e.op == "load" and _looked_up(toeplitz(e)), movable)

    def _move(self, root: Expr, starts: Callable[[Expr], bool], movable: Callable[[Expr], bool]) -> Expr:
        """Move the largest movable expressions that contain one at which `starts` holds into tables."""
        marked: set[Expr] = set()
        for e in walk(root):
            if starts(e) or any(a in marked for a in e.args):
                marked.add(e)

        def visit(e: Expr) -> Expr:
            if e not in marked:
                return e
            if e not in self.moved:
                table = self._table(e) if movable(e) else None
                if table is None and _computed(e):
                    raise Unsupported(f"the kernels cannot tabulate an expression of more than one index: {e}")
                self.moved[e] = table or A.make(e.op, e.kind, tuple(map(visit, e.args)), e.value)
            return self.moved[e]

        return visit(root)

    def _table(self, e: Expr) -> Expr | None:
        if opaque(e):
            return None
        moved = toeplitz(e) if {"i", "j"} <= e.free else e
        if moved is None:
            return None
        axes = tuple(n for n in ("b", "h", "i", "j", DIAGONAL) if n in moved.free)
        self.found.append(Table(moved, axes))
        return A.load(self.first + len(self.found) - 1, [_index(n, e) for n in axes], e.kind)


def _computed(e: Expr) -> bool:
    """Return whether ATen operators must compute an expression before the kernel runs."""
    return e.op in ("aten", "rsum", "rmax")


def _looked_up(e: Expr | None) -> bool:
    """Return whether an expression over the diagonal loads in another order than consecutive elements."""
    along = [] if e is None else [x for x in e.args if DIAGONAL in x.free]
    steps = [A.sub(x, next(v for v in walk(x) if v.value == DIAGONAL)).free for x in along]
    return bool(along) and (len(along) > 1 or DIAGONAL in steps[0])


def _index(name: str, e: Expr) -> Expr:
    by = {str(x.value): x for x in walk(e) if x.op == "var"}
    if name != DIAGONAL:
        return by[name]
    return A.add(A.sub(by["j"], by["i"]), A.sub(by["i"].args[0], A.ONE))
