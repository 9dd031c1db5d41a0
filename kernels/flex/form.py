"""Divide a spec into the parts of a call of PyTorch's `flex_attention` operator, or say why that is impossible.

The operator computes softmax(score_mod(scale * query @ key.mT)) @ value, in the tiles that a block mask lists. In those
listed as partial, a score is -inf where `mask_mod` does not hold. A row in which every score is -inf is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from attnfx.ir import algebra as A
from attnfx.ir.algebra import DROWNS
from attnfx.ir.expr import FLOAT, FLOAT_UNARY, Expr, walk
from attnfx.ir.toeplitz import SPAN, toeplitz
from attnfx.kernels.chunked.program import split_scale
from attnfx.mask import mask_of
from attnfx.mask.additive import DROWNED, addend
from attnfx.spec import AttentionSpec

OF_HEAD = ({"b"}, {"h"})  # the variable by which functions of a head differ; without a batch, heads may be one


@dataclass(frozen=True)
class Table:
    """Values that eager operators compute, at compile time if sizes are known: because their rounding decides an
    integer, or because the operator would compute them again for each score of a head.

    body  the values, over one variable: b, h, i, j, or `w` = j - i + T - 1
    """

    body: Expr

    @property
    def variable(self) -> Expr:
        return next(x for x in walk(self.body) if x.op == "var")

    @property
    def exact(self) -> bool:
        """Return whether the rounding of the values decides an integer."""
        return self.body.kind != FLOAT


@dataclass(frozen=True)
class Form:
    """One attention as a call of the operator. Loads name a slot of the spec, or a slot beyond them of `tables`.

    scale    factor of query @ key.mT
    score    the value of score_mod, over `dot`, which is scale * (q . k)
    keep     the value of mask_mod
    tiles    the predicate that classifies tiles: where it fails everywhere, the tile's weights are zero
    average  whether a row may lack a live key, and then averages the values of every key: its tiles are all visited
    low      whether all scores of a row may be finite and as low as a fill
    factor   factor of the output, independent of j, or None
    tables   the tables that the programs load from
    finite   whether every row has a live key whose score is finite if its product and the tables are
    """

    scale: float
    score: Expr
    keep: Expr
    tiles: Expr
    average: bool
    low: bool
    factor: Expr | None
    tables: tuple[Table, ...]
    finite: bool


@lru_cache(maxsize=1024)
def form_of(spec: AttentionSpec, live: bool) -> Form | str:
    """Return the parts of the call, or why there cannot be one. `live`: each row provably has a live key."""
    if spec.normaliser != "softmax":
        return "the weights are not a softmax"
    if spec.random:
        return "the attention has dropout, which PyTorch's flex_attention lacks"
    factor = _factor(spec.weight)
    if spec.weight is not A.PROB and factor is None:
        return "the weights are changed after the softmax by more than a factor of the row"
    for e in (x for program in spec.programs for x in walk(program)):
        if e.op == "half":
            return "a score is rounded to float16, and Inductor leaves such roundings out"
        if e.op in ("rsum", "rmax"):
            return "the score contains a reduction, and a score_mod is elementwise"
    mask, score, keep, tiles, average = mask_of(spec.score), spec.score, A.TRUE, A.TRUE, False
    if mask is not None:
        tiles, average = mask.keep, not live and mask.fill > -math.inf
        outermost = score.op == "where" and score.args[0] is mask.keep and score.args[2].op == "const"
        if outermost and not average and A.DOT not in walk(mask.keep):
            keep, score = score.args[:2]
    added = addend(spec.score)
    masks = added is not None and not _learns(added, spec)
    low = average or masks
    if masks and "h" not in added.free:  # type: ignore[union-attr]  # one by head takes as long to read as to add
        tiles, average = A.and_(tiles, A.lt(A.const(DROWNED), added)), True  # type: ignore[arg-type]
    if any(x.op in ("dot", "prob") for x in walk(tiles)):
        tiles = A.TRUE
    scale, score = split_scale(score)
    tables: list[Table] = []
    try:
        score, keep, tiles = (_tabulated(e, len(spec.captures), tables) for e in (score, keep, tiles))
    except _Untabulated:
        return "an integer is computed through floats from more than a position or a distance"
    finite = live and not low and _stays_finite(score, len(spec.captures))
    return Form(scale, score, keep, tiles, average, low, factor, tuple(tables), finite)


# Operators of finite values whose result is finite, unless it leaves the range of numbers
BOUNDED = frozenset("var size dot add mul where float min max tanh sigmoid sin cos erf atan floor ceil round".split())


def _stays_finite(score: Expr, captures: int) -> bool:
    """Return whether a score is finite if its product and its loads beyond the captures, from tables, are."""

    def stays(e: Expr) -> bool:
        if e.op == "const":
            return abs(float(e.value)) < DROWNS  # type: ignore[arg-type]
        if e.op == "mul" and sum(A.DOT in walk(x) for x in e.args) > 1:
            return False  # a power of the product leaves the range much earlier
        return e.op in BOUNDED or (e.op == "load" and int(e.value) >= captures)  # type: ignore[call-overload]

    return all(e.kind != FLOAT or stays(e) for e in walk(score))


def _learns(added: Expr, spec: AttentionSpec) -> bool:
    """Return whether an addend needs a gradient: it is a bias, not a mask."""
    return any(spec.captures[int(e.value)].grad for e in walk(added) if e.op == "load")  # type: ignore[call-overload]


def _factor(weight: Expr) -> Expr | None:
    """Return the factor of a weight that is a multiple of the probability, if no key changes it."""
    if weight.op != "mul" or weight.args.count(A.PROB) != 1:
        return None
    rest = A.mul(A.const(1.0), *(x for x in weight.args if x is not A.PROB))
    return None if "j" in rest.free or any(x.op in ("dot", "prob", "aten") for x in walk(rest)) else rest


class _Untabulated(Exception):
    """An operator must run exactly as in PyTorch, and its operands are more than a position or a distance."""


def _tabulated(root: Expr, first: int, tables: list[Table]) -> Expr:
    """Replace each integer or truth value that contains exact operators, and each function of the head, by a load from
    a table. `first` is the slot of the first table."""
    done: dict[Expr, Expr] = {}

    def replaced(e: Expr) -> Expr:
        if not any(x.op == "aten" or (x.op in FLOAT_UNARY and x.free in OF_HEAD) for x in walk(e)):
            return e
        if e not in done:
            done[e] = _load(e, first, tables) or _inside(e)
        return done[e]

    def _inside(e: Expr) -> Expr:
        if e.op == "aten":
            raise _Untabulated
        args = tuple(replaced(a) for a in e.args)
        return A.load(e.value, args, e.kind) if e.op == "load" else A.make(e.op, e.kind, args, e.value)

    return replaced(root)


def _load(e: Expr, first: int, tables: list[Table]) -> Expr | None:
    """Return a load of the expression's values from a table, or None if it depends on more than one variable."""
    of_head = e.free in OF_HEAD
    if (e.kind == FLOAT and not of_head) or any(x.op in ("load", "dot", "prob") for x in walk(e)):
        return None
    body = e if of_head else toeplitz(e) or e
    if len(body.free) != 1 or not body.free <= {"b", "h", "i", "j", SPAN}:
        return None
    table = Table(body)
    if table not in tables:
        tables.append(table)
    slot, index = first + tables.index(table), table.variable
    if SPAN in body.free:
        variables = {str(x.value): x for x in walk(e) if x.op == "var"}
        i, j = variables["i"], variables["j"]
        index = A.add(A.sub(j, i), A.sub(i.args[0], A.ONE))
    return A.load(slot, (index,), e.kind)
