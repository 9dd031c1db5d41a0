"""Translate mask predicates to integer sets: formulas of affine comparisons, and their text for isl.

Sizes are integers here. A part that is not affine (loads, floats, products of indices) is opaque. It becomes true or
false, chosen so that the answer stays sound under the surrounding negations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import islpy as isl

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import INT, Expr, walk
from attnfx.spec import AXES

YES, NO = "1 = 1", "1 = 0"
SPLITS = 6  # nested choices in one comparison; beyond, it is opaque
LONGEST = 20_000  # characters of one predicate; beyond, it is opaque
MAX_OPERATIONS = 100_000  # of isl for one analysis: at most some hundred milliseconds; common masks take 5,000

_CHOICES = ("where", "min", "max", "abs")
MAX_COUNT = 20_000_000  # operations of isl to count the points of a computed set: about a microsecond a row


class TooHard(Exception):
    """The error if isl gives up: the caller falls back to an answer that is always sound."""


@contextmanager
def solver(factor: int = 1) -> Iterator[isl.Context]:
    """Open an isl context for one analysis, with a bound on its work. Raises TooHard beyond it."""
    context = isl.Context()
    context.set_max_operations(factor * MAX_OPERATIONS)
    try:
        yield context
    except Exception as error:
        if isinstance(error, isl.Error) or _spent(context):
            raise TooHard(str(error)) from error
        raise
    if _spent(context):
        raise TooHard("maximal number of operations exceeded")


def _spent(context: isl.Context) -> bool:
    """Return whether the bound was reached: some isl functions then silently return a partial answer."""
    try:
        isl.Set("{ : }", context)
    except isl.Error:
        return True
    return False


def count(points: isl.Set) -> int:
    """Count the points of a bounded set."""
    points = points.compute_divs().make_disjoint()
    context = points.get_ctx()
    context.set_max_operations(MAX_COUNT)
    return points.count_val().to_python()


def numeric(e: Expr, sizes: Mapping[str, int]) -> Expr:
    """Replace the sizes of a predicate by their values."""
    return _numeric(e, tuple((name, sizes[name]) for name in _sizes(e) if name in sizes))


@lru_cache(maxsize=1024)
def _sizes(e: Expr) -> tuple[str, ...]:
    return tuple(sorted({str(a.value) for a in walk(e) if a.op == "size"}))


@lru_cache(maxsize=1024)
def _numeric(e: Expr, named: tuple[tuple[str, int], ...]) -> Expr:
    return substitute(e, {A.size(name): A.const(value) for name, value in named})


@dataclass(frozen=True, eq=False)
class Formula:
    """A set of points (b, h, i, j).

    text   the set for isl
    op     "and", "or" or "not" of `parts`; "ge0" or "eq0" of `line`, an affine expression
    """

    text: str
    op: str
    parts: tuple[Formula, ...] = ()
    line: Expr | None = None


ALWAYS, NEVER = Formula(YES, "and"), Formula(NO, "or")


@lru_cache(maxsize=4096)
def formula(e: Expr, over: bool, splits: int = SPLITS) -> Formula:
    """Return a set that contains all points at which `e` holds (over), or only such points (not over)."""
    made = _formula(e, over, splits)
    return made if len(made.text) <= LONGEST else _unknown(over)


def text(e: Expr, over: bool) -> str:
    """Return the isl text of `formula(e, over)`."""
    return formula(e, over).text


def domain(sizes: Mapping[str, int], names: str) -> str:
    """Return the isl text of the named variables' bounds."""
    return " and ".join(f"0 <= {n} < {sizes[AXES[n]]}" for n in names)


def hidden(free: frozenset[str], *shown: str) -> str:
    """Return the variables to project away: i, j, and b and h if predicates depend on them, except `shown`. `free` are
    the predicates' free variables."""
    return "".join(n for n in AXES if n not in shown and (n in free or n in "ij"))


def _formula(e: Expr, over: bool, splits: int) -> Formula:
    match e.op:
        case "const":
            return ALWAYS if e.value else NEVER
        case "ge0" | "eq0":
            return _comparison(e, over, splits)
        case "and" | "or":
            return _join(e.op, [formula(a, over, splits) for a in e.args])
        case "not":
            inner = formula(e.args[0], not over, splits)
            if inner in (ALWAYS, NEVER):
                return NEVER if inner is ALWAYS else ALWAYS
            return Formula(f"not ({inner.text})", "not", (inner,))
        case "where":
            c, x, y = e.args
            return _choice(c, x, y, over, splits)
    return _unknown(over)


def _choice(c: Expr, x: Expr, y: Expr, over: bool, splits: int) -> Formula:
    first = _join("and", [formula(a, over, splits) for a in (c, x)])
    second = _join("and", [formula(a, over, splits) for a in (A.not_(c), y)])
    return _join("or", [first, second])


def _comparison(e: Expr, over: bool, splits: int) -> Formula:
    choice = next((a for a in walk(e.args[0]) if a.op in _CHOICES and a.kind == INT), None)
    if choice is not None:
        if not splits:
            return _unknown(over)
        word = _extreme(e, choice)
        if word:
            x = choice.args[0]
            values = (x, A.neg(x)) if choice.op == "abs" else choice.args
            return _join(word, [formula(substitute(e, {choice: v}), over, splits - 1) for v in values])
        condition, x, y = _branches(choice)
        x, y = (substitute(e, {choice: a}) for a in (x, y))
        return _choice(condition, x, y, over, splits - 1)
    line = affine(e.args[0])
    if line is None:
        return _unknown(over)
    return Formula(f"{line} {'>=' if e.op == 'ge0' else '='} 0", e.op, (), e.args[0])


def _unknown(over: bool) -> Formula:
    return ALWAYS if over else NEVER


def _extreme(e: Expr, choice: Expr) -> str | None:
    """Return "and" or "or" if comparing a min, max or abs means comparing all or any of its values, else None."""
    rest = poly.of(e.args[0])
    factor = rest.pop((choice,), 0)
    if e.op != "ge0" or choice.op == "where" or not factor or any(choice in walk(a) for m in rest for a in m):
        return None
    return "and" if (factor > 0) == (choice.op == "min") else "or"


def _branches(choice: Expr) -> tuple[Expr, Expr, Expr]:
    """Return (c, x, y) with choice = where(c, x, y)."""
    if choice.op == "where":
        return choice.args  # type: ignore[return-value]
    x = choice.args[0]
    if choice.op == "abs":
        return A.ge0(x), x, A.neg(x)
    rest = (A.minimum if choice.op == "min" else A.maximum)(*choice.args[1:])
    return (A.le(x, rest) if choice.op == "min" else A.ge(x, rest)), x, rest


def _join(word: str, parts: list[Formula]) -> Formula:
    neutral, final = (ALWAYS, NEVER) if word == "and" else (NEVER, ALWAYS)
    parts = list({p.text: p for p in parts if p is not neutral}.values())
    if final in parts:
        return final
    if len(parts) < 2:
        return parts[0] if parts else neutral
    return Formula(f" {word} ".join(f"({p.text})" for p in parts), word, tuple(parts))


def affine(e: Expr) -> str | None:
    """Return the isl text of an integer expression that is affine in b, h, i, j, or None. Floor divisions and
    remainders by constants count as affine."""
    match e.op:
        case "const":
            return f"({e.value})" if e.value < 0 else str(e.value)  # type: ignore[operator]
        case "var":
            return str(e.value) if e.value in AXES else None
        case "add":
            parts = [affine(a) for a in e.args]
            return None if None in parts else "(" + " + ".join(p for p in parts if p is not None) + ")"
        case "mul":
            factor, *rest = e.args
            line = affine(rest[0]) if factor.op == "const" and len(rest) == 1 else None
            return None if line is None else f"({factor.value} * {line})"
        case "floordiv" | "mod":
            line, by = affine(e.args[0]), e.args[1]
            if line is None or by.op != "const" or by.value <= 0:  # type: ignore[operator]
                return None
            return f"floor({line} / {by.value})" if e.op == "floordiv" else f"({line} mod {by.value})"
    return None
