"""Construct canonical expressions: two spellings of one function become the same object.

The canonical form, and why it is sound:
  * integers are expanded polynomials; comparisons become `x >= 0` or `x == 0` of such a polynomial;
  * floats are sums of products with constant coefficients. Reassociation only changes rounding. A term is not dropped
    if its coefficient is zero, and terms do not move across `half`, `detach` or a reduction;
  * `where` merges equal fills; a term added to a `where` with a drowning fill (-inf, or at most -1e38) moves inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from attnfx.ir import poly
from attnfx.ir.expr import BOOL, FLOAT, FLOAT_UNARY, INT, Added, Expr, node, walk
from attnfx.ir.interpret import to_half
from attnfx.ir.poly import Poly, by_digest

LARGE = 256.0  # a coefficient beyond this does not move into or out of a sum: cancellation would lose digits
DROWNS = 1e38  # a fill of this magnitude swallows every finite score that fits float32 or bfloat16 arithmetic


# -- leaves -----------------------------------------------------------------------------------
def const(value: bool | int | float) -> Expr:
    if isinstance(value, bool):
        return node("const", BOOL, (), value)
    if isinstance(value, int):
        return node("const", INT, (), value)
    return node("const", FLOAT, (), float(value))


TRUE, FALSE, ZERO, ONE = const(True), const(False), const(0), const(1)
DOT = node("dot", FLOAT)
PROB = node("prob", FLOAT)


def size(name: str) -> Expr:
    return node("size", INT, (), name)


def var(name: str, extent: Expr | int) -> Expr:
    return node("var", INT, (const(extent) if isinstance(extent, int) else extent,), name)


def load(slot: object, index: Sequence[Expr], kind: str) -> Expr:
    return node("load", kind, tuple(index), slot)


# -- integers ---------------------------------------------------------------------------------
def from_poly(p: Poly) -> Expr:
    if any(a.op == "mod" for m in p for a in m):
        p = _rejoin(p)
    terms = [_product(c, m, INT) for m, c in sorted(p.items(), key=lambda t: tuple(a.digest for a in t[0]))]
    if not terms:
        return ZERO
    return terms[0] if len(terms) == 1 else node("add", INT, tuple(terms))


def _rejoin(p: Poly) -> Poly:
    """Rewrite c * y * (x // y) + c * (x % y) as c * x."""
    for monomial, coefficient in list(p.items()):
        for at, atom in enumerate(monomial):
            if atom.op != "mod" or monomial not in p:
                continue
            x, y = atom.args
            others: Poly = {monomial[:at] + monomial[at + 1 :]: coefficient}
            whole = poly.times(poly.times(others, poly.of(y)), {(node("floordiv", INT, (x, y)),): 1})
            if whole and all(p.get(m) == c for m, c in whole.items()):
                p = poly.plus(poly.plus(p, whole, -1), {monomial: coefficient}, -1)
                p = poly.plus(p, poly.times(others, poly.of(x)))
    return p


def floordiv(x: Expr, y: Expr) -> Expr:
    if x.op == "where" and y.op == "const":
        return where(x.args[0], floordiv(x.args[1], y), floordiv(x.args[2], y))
    whole, rest = _split(x, y)
    if rest is None:
        return node("floordiv", INT, (x, y))
    if not rest:
        return from_poly(whole)
    inner = from_poly(rest)
    if poly.is_index(inner, y):
        return from_poly(whole)
    if inner.op == "floordiv" and inner.args[1].op == "const" and y.op == "const":
        nested = floordiv(inner.args[0], mul(inner.args[1], y))
    else:
        nested = node("floordiv", INT, (inner, y))
    return add(from_poly(whole), nested)


def mod(x: Expr, y: Expr) -> Expr:
    _, rest = _split(x, y)
    if rest is None:
        return node("mod", INT, (x, y))
    if not rest:
        return ZERO
    inner = from_poly(rest)
    return inner if poly.is_index(inner, y) else node("mod", INT, (inner, y))


def _split(x: Expr, y: Expr) -> tuple[Poly, Poly | None]:
    """Split x = whole * y + rest, with all multiples of y in whole; rest=None if y may be zero or negative."""
    divisor = poly.of(y)
    if not poly.positive(divisor):
        return {}, None
    whole: Poly = {}
    rest: Poly = {}
    for index, coefficient in poly.by_index(poly.of(x)).items():
        quotient, left = poly.divide(coefficient, divisor), Poly()
        if quotient is None:
            quotient, left = {}, coefficient
            if set(coefficient) <= {()} and set(divisor) <= {()}:
                # a constant coefficient: take out multiples of the divisor, leave a remainder in [0, divisor)
                q, r = divmod(coefficient[()], divisor[()])
                if not index or 2 * r <= divisor[()]:
                    quotient, left = {(): q}, {(): r}
        index_poly: Poly = {index: 1}
        whole = poly.plus(whole, poly.times(quotient, index_poly))
        rest = poly.plus(rest, poly.times(left, index_poly))
    return whole, rest


# -- sums and products ------------------------------------------------------------------------
def add(*xs: Expr) -> Expr:
    if all(x.kind == INT for x in xs):
        out: Poly = {}
        for x in xs:
            out = poly.plus(out, poly.of(x))
        return from_poly(out)
    xs = tuple(to_float(x) for x in xs)
    for at, x in enumerate(xs):
        if x.op == "where":  # rest + where(p, a, fill) = where(p, rest + a, fill) if the fill drowns the rest
            rest = xs[:at] + xs[at + 1 :]
            if all(_number(r) is not None for r in rest):
                if any(_number(a) is not None for a in x.args[1:]):
                    return where(x.args[0], add(*rest, x.args[1]), add(*rest, x.args[2]))
                continue
            for branch, other in ((2, 1), (1, 2)):
                # -inf absorbs any addend; a finite fill does not absorb an addend with its own fill, such as -inf
                if drowning(x.args[branch]) and (_number(x.args[branch]) == -math.inf or not _has_fill(rest)):
                    moved, fill = add(*rest, x.args[other]), x.args[branch]
                    if _number(x.args[other]) is not None:  # else the fill replaces a value
                        fill = added(fill)
                    return where(x.args[0], *((moved, fill) if branch == 2 else (fill, moved)))
    constant = 0.0
    terms: dict[tuple[Expr, ...], float] = {}
    seen_constant = False
    for x in xs:
        for factor, atoms in _sum_terms(x):
            if not atoms:
                constant, seen_constant = constant + factor, True
            else:
                terms[atoms] = terms.get(atoms, 0.0) + factor
    out_terms = [_product(c, atoms) for atoms, c in sorted(terms.items(), key=lambda t: [a.digest for a in t[0]])]
    if seen_constant and (constant != 0.0 or not out_terms):
        out_terms.insert(0, _combined(constant, xs))
    return out_terms[0] if len(out_terms) == 1 else node("add", FLOAT, tuple(out_terms))


def _sum_terms(x: Expr) -> list[tuple[float, tuple[Expr, ...]]]:
    if x.op == "add" and not _cancels(x):
        return [t for a in x.args for t in _sum_terms(a)]
    return [_factors(x)]


def _factors(x: Expr) -> tuple[float, tuple[Expr, ...]]:
    """Return the constant coefficient of a product, and its other factors."""
    factors = x.args if x.op == "mul" else (x,)
    return (float(factors[0].value), factors[1:]) if factors[0].op == "const" else (1.0, factors)  # type: ignore[arg-type]


def _cancels(x: Expr) -> bool:
    """Return whether a sum may be small though its terms are large, as 1e9 * keep - 1e9; it then stays as written."""
    return any(abs(c) > LARGE for t in x.args for c, _ in _sum_terms(t))


def _product(c: float, atoms: tuple[Expr, ...], kind: str = FLOAT) -> Expr:
    factors = atoms if atoms and c == 1 else (const(c), *atoms)
    return factors[0] if len(factors) == 1 else node("mul", kind, factors)


def mul(*xs: Expr) -> Expr:
    if all(x.kind == INT for x in xs):
        out: Poly = {(): 1}
        for x in xs:
            out = poly.times(out, poly.of(x))
        return from_poly(out)
    xs = tuple(to_float(x) for x in xs)
    coefficient = 1.0
    atoms: list[Expr] = []
    for x in xs:
        factor, others = _factors(x)
        coefficient *= factor
        atoms.extend(others)
    if not atoms:
        return _combined(coefficient, xs)
    if coefficient != 1.0 and len(atoms) == 1:
        only = atoms[0]
        if only.op == "add" and abs(coefficient) <= LARGE and not _cancels(only):
            return add(*(mul(const(coefficient), a) for a in only.args))
        if only.op == "where" and any(_number(a) is not None for a in only.args[1:]):
            return where(only.args[0], *(mul(const(coefficient), a) for a in only.args[1:]))
    if len(atoms) > 1:  # normalize the sign of a sum among several factors
        for at, factor in enumerate(atoms):
            if factor.op == "add" and _leading(factor) < 0 and not _cancels(factor):
                atoms[at], coefficient = neg(factor), -coefficient
    return _product(coefficient, tuple(sorted(atoms, key=by_digest)))


def neg(x: Expr) -> Expr:
    return mul(const(-1), x) if x.kind == INT else mul(const(-1.0), x)


def sub(x: Expr, y: Expr) -> Expr:
    return add(x, neg(to_int(y) if y.kind == BOOL and x.kind == INT else y if y.kind != BOOL else to_float(y)))


def div(x: Expr, y: Expr) -> Expr:
    """Return the true quotient, a float."""
    return mul(to_float(x), unary("recip", to_float(y)))


def _number(x: Expr) -> float | None:
    return float(x.value) if x.op == "const" and x.kind != BOOL else None  # type: ignore[arg-type]


def _has_fill(addends: Sequence[Expr]) -> bool:
    """Return whether an addend contains a constant that swallows a score."""
    return any(drowning(e) for x in addends for e in walk(x))


def drowning(x: Expr) -> bool:
    """Return whether x is a constant that swallows any finite score added to it."""
    value = _number(x)
    return value is not None and value <= -DROWNS


def added(fill: Expr) -> Expr:
    """Mark a finite fill as added to the scores; -inf stays unmarked, since gradients next to it are NaN."""
    value = float(fill.value)  # type: ignore[arg-type]
    return node("const", FLOAT, (), Added(value)) if math.isfinite(value) else fill


def _combined(value: float, parts: Sequence[Expr]) -> Expr:
    """Return a constant computed from `parts`, marked as added if one of them is."""
    made = const(value)
    return added(made) if any(type(x.value) is Added for x in parts) else made


def in_place(e: Expr) -> Expr:
    """Turn added fills into fills that replace the values they swallow. A positive fill keeps a weight, and with it the
    gradient of the value. In a product, a factor of unknown sign may make a fill positive."""

    def swallows(x: Expr) -> bool:
        return type(x.value) is Added and x.value < 0

    def replaced(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if old.op == "mul" and any(map(swallows, walk(old))):
            return old
        return const(float(old.value)) if swallows(old) else None  # type: ignore[arg-type]

    return rebuild(e, replaced) if any(map(swallows, walk(e))) else e


# -- conversions ------------------------------------------------------------------------------
def to_float(x: Expr) -> Expr:
    if x.kind == FLOAT:
        return x
    if x.op == "const":
        return const(float(x.value))  # type: ignore[arg-type]
    if x.kind == BOOL:
        return where(x, const(1.0), const(0.0))
    if x.op == "where":
        return where(x.args[0], to_float(x.args[1]), to_float(x.args[2]))
    if x.op in ("add", "mul"):  # exact: index arithmetic stays far below 2 ** 24 per term
        terms = []
        for monomial, c in poly.of(x).items():
            atoms = tuple(sorted((node("float", FLOAT, (a,)) for a in monomial), key=by_digest))
            terms.append(_product(float(c), atoms))
        return add(*terms) if len(terms) > 1 else terms[0]
    return node("float", FLOAT, (x,))


def to_int(x: Expr) -> Expr:
    """Truncate toward zero, as `.long()` does."""
    if x.kind == INT:
        return x
    if x.kind == BOOL:
        return where(x, ONE, ZERO)
    exact = as_integer(x)
    if exact is not None:
        return exact
    if x.op == "where":
        return where(x.args[0], to_int(x.args[1]), to_int(x.args[2]))
    if x.op == "const":
        value = float(x.value)  # type: ignore[arg-type]
        if math.isfinite(value):
            return const(int(value))
    return node("int", INT, (x,))


def to_bool(x: Expr) -> Expr:
    return x if x.kind == BOOL else not_(eq(x, ZERO if x.kind == INT else const(0.0)))


def as_integer(x: Expr) -> Expr | None:
    """Return the integer expression that a float expression equals exactly, or None."""
    if x.op == "float":
        return x.args[0]
    if x.op == "const" and x.kind == FLOAT:
        value = float(x.value)  # type: ignore[arg-type]
        return const(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else None
    if x.kind == FLOAT and x.op in ("add", "mul"):
        parts = [as_integer(a) for a in x.args]
        known = [p for p in parts if p is not None]
        if len(known) == len(parts):
            return add(*known) if x.op == "add" else mul(*known)
    return None


def half(x: Expr) -> Expr:
    """Round to float16; a value beyond its range becomes infinite."""
    if x.op == "half":
        return x
    value = _number(x)
    if value is not None:
        return const(to_half(value))
    if x.op == "where":
        return where(x.args[0], half(x.args[1]), half(x.args[2]))
    return node("half", FLOAT, (x,))


def detach(x: Expr) -> Expr:
    if x.kind != FLOAT or x.op in ("detach", "const", "float", "rmax"):
        return x
    return node("detach", FLOAT, (x,))


# -- functions --------------------------------------------------------------------------------
_FOLD = {
    "exp": math.exp, "log": math.log, "tanh": math.tanh, "sqrt": math.sqrt, "sin": math.sin, "cos": math.cos,
    "recip": lambda v: 1.0 / v, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "log2": math.log2,
    "sigmoid": lambda v: 1.0 / (1.0 + math.exp(-v)), "exp2": lambda v: 2.0**v,
}  # fmt: skip


def unary(op: str, x: Expr) -> Expr:
    """Apply a unary function: one of FLOAT_UNARY to a float, `abs` or `sign` to an integer or float."""
    if op == "abs":
        return _absolute(x)
    if op == "sign":
        if x.kind != INT:
            return node("sign", FLOAT, (x,))
        return where(gt(x, ZERO), ONE, where(lt(x, ZERO), const(-1), ZERO))
    assert op in FLOAT_UNARY, op
    if x.kind == INT and op in ("floor", "ceil", "round", "trunc"):
        return x
    x = to_float(x)
    if op in ("floor", "ceil", "round", "trunc") and as_integer(x) is not None:
        return x
    value = _number(x)
    if value is not None and op in _FOLD:
        try:
            return const(float(_FOLD[op](value)))
        except (ValueError, OverflowError, ZeroDivisionError):
            pass
    if op == "recip":
        if x.op == "recip":
            return x.args[0]
        if x.op == "mul" and x.args[0].op == "const" and x.args[0].value:
            return mul(const(1.0 / float(x.args[0].value)), unary("recip", _product(1.0, x.args[1:])))  # type: ignore[arg-type]
        if x.op == "exp":
            return unary("exp", neg(x.args[0]))
    if op == "exp" and x.op == "log" and _nonnegative(x.args[0]):
        return x.args[0]
    if op == "log" and x.op == "exp":
        return x.args[0]
    return node(op, FLOAT, (x,))


def _nonnegative(x: Expr) -> bool:
    """Return whether a float is known not to be negative, for any values of its operands."""
    if x.op == "const":
        return float(x.value) >= 0  # type: ignore[arg-type]
    if x.op in ("mul", "add", "recip", "half", "detach"):
        return all(map(_nonnegative, x.args))
    if x.op == "rsum":
        return _nonnegative(x.args[0])
    return x.op in ("exp", "exp2", "softmax", "prob", "sigmoid", "sqrt", "abs", "softplus")


def _absolute(x: Expr) -> Expr:
    if x.kind == INT:
        if poly.at_least(x, 0):
            return x
        if poly.at_most(x, 0):
            return neg(x)
        return node("abs", INT, (_positive(x),))
    whole = as_integer(x)
    return to_float(_absolute(whole)) if whole is not None else node("abs", FLOAT, (x,))


def minimum(*xs: Expr) -> Expr:
    return _extreme("min", xs)


def maximum(*xs: Expr) -> Expr:
    return _extreme("max", xs)


def _extreme(op: str, xs: tuple[Expr, ...]) -> Expr:
    if any(x.kind == FLOAT for x in xs):
        whole = [as_integer(to_float(x)) for x in xs]
        if all(w is not None and w.op != "const" for w in whole):
            return to_float(_extreme(op, tuple(w for w in whole if w is not None)))
        xs = tuple(to_float(x) for x in xs)
    if xs[0].kind == BOOL:
        return or_(*xs) if op == "max" else and_(*xs)
    flat: list[Expr] = []
    for x in xs:
        flat.extend(x.args if x.op == op else (x,))
    numbers = [x for x in flat if x.op == "const"]
    rest = sorted({x for x in flat if x.op != "const"}, key=by_digest)
    if numbers:
        best = (max if op == "max" else min)(numbers, key=lambda c: c.value)  # type: ignore[arg-type,return-value]
        rest = [best, *rest]
    if xs[0].kind == INT and len(rest) == 2:
        gap = sub(rest[0], rest[1])
        if poly.at_least(gap, 0):
            return rest[0] if op == "max" else rest[1]
        if poly.at_most(gap, 0):
            return rest[1] if op == "max" else rest[0]
    return rest[0] if len(rest) == 1 else node(op, xs[0].kind, tuple(rest))


def power(x: Expr, y: Expr) -> Expr:
    exponent = _number(y)
    if x.kind == INT and exponent in (0, 1, 2, 3, 4):
        return mul(ONE, *([x] * int(exponent)))
    x, y = to_float(x), to_float(y)
    if exponent in (1, 2, 3, 4):
        return mul(*([x] * int(exponent)))
    if exponent == -1:
        return unary("recip", x)
    if exponent == 0.5:
        return unary("sqrt", x)
    if exponent == -0.5:
        return unary("recip", unary("sqrt", x))
    if x.op == "const" and y.op == "const":
        try:
            return const(float(x.value) ** float(y.value))  # type: ignore[arg-type]
        except (OverflowError, ZeroDivisionError, ValueError):
            pass
    return node("pow", FLOAT, (x, y))


# -- comparisons and logic --------------------------------------------------------------------
def ge0(x: Expr) -> Expr:
    """Compare x >= 0 for an integer expression."""
    p = poly.of(x)
    divisor = math.gcd(*(c for m, c in p.items() if m))
    if divisor > 1:
        p = {m: c // divisor for m, c in p.items()}  # floor of the constant: x/g >= -c/g
        x = from_poly({m: c for m, c in p.items() if c})
    if poly.at_least(x, 0):
        return TRUE
    if poly.at_most(x, -1):
        return FALSE
    return node("ge0", BOOL, (x,))


def eq0(x: Expr) -> Expr:
    """Compare x == 0 for an integer expression."""
    if x.op == "const":
        return const(x.value == 0)
    p = poly.of(x)
    divisor = math.gcd(*(c for m, c in p.items() if m)) or 1
    if p.get((), 0) % divisor:
        return FALSE
    if divisor > 1:
        p = {m: c // divisor for m, c in p.items()}
    x = from_poly(p)
    if poly.at_least(x, 1) or poly.at_most(x, -1):
        return FALSE
    return node("eq0", BOOL, (_positive(x),))


def _positive(x: Expr) -> Expr:
    """Return x or -x so that the first variable term has a positive coefficient: canonical in |x| and x == 0."""
    return neg(x) if _leading(x) < 0 else x


def _leading(x: Expr) -> float:
    """Return the coefficient of a sum's first term that is not a constant."""
    return _factors(next((t for t in (x.args if x.op == "add" else (x,)) if t.op != "const"), x))[0]


def _compare(op: str, x: Expr, y: Expr) -> Expr:
    """Compare two expressions; `op` is lt, le or eq."""
    if x.kind == BOOL and y.kind == BOOL and op == "eq":
        return or_(and_(x, y), and_(not_(x), not_(y)))
    if x.kind == BOOL:
        x = to_int(x)
    if y.kind == BOOL:
        y = to_int(y)
    for a, b, flipped in ((x, y, False), (y, x, True)):  # push a comparison with a constant into a where of constants
        if a.op == "where" and b.op == "const" and all(_number(v) is not None or v.op == "where" for v in a.args[1:]):
            results = [_compare(op, *((b, v) if flipped else (v, b))) for v in a.args[1:]]
            return where(a.args[0], results[0], results[1])
    if x.kind == FLOAT or y.kind == FLOAT:
        x, y = to_float(x), to_float(y)
        a, b = _number(x), _number(y)
        if a is not None and b is not None:
            return const(a < b if op == "lt" else a <= b if op == "le" else a == b)
        left, right = as_integer(x), as_integer(y)
        if left is not None and right is not None:
            x, y = left, right
        elif left is not None and b is not None and math.isfinite(b) and op != "eq":
            return _compare("le", left, const(math.floor(b) if op == "le" else math.ceil(b) - 1))
        elif right is not None and a is not None and math.isfinite(a) and op != "eq":
            return _compare("le", const(math.ceil(a) if op == "le" else math.floor(a) + 1), right)
        else:
            return node(op, BOOL, tuple(sorted((x, y), key=by_digest)) if op == "eq" else (x, y))
    gap = sub(y, x)
    return eq0(gap) if op == "eq" else ge0(gap) if op == "le" else ge0(add(gap, const(-1)))


def lt(x: Expr, y: Expr) -> Expr:
    return _compare("lt", x, y)


def le(x: Expr, y: Expr) -> Expr:
    return _compare("le", x, y)


def gt(x: Expr, y: Expr) -> Expr:
    return _compare("lt", y, x)


def ge(x: Expr, y: Expr) -> Expr:
    return _compare("le", y, x)


def eq(x: Expr, y: Expr) -> Expr:
    return _compare("eq", x, y)


def not_(x: Expr) -> Expr:
    if x.op == "const":
        return const(not x.value)
    if x.op == "not":
        return x.args[0]
    if x.op == "ge0":
        return ge0(sub(const(-1), x.args[0]))
    if x.op in ("and", "or"):
        return (or_ if x.op == "and" else and_)(*(not_(a) for a in x.args))
    return node("not", BOOL, (x,))


def and_(*xs: Expr) -> Expr:
    return _logic("and", xs, TRUE, FALSE)


def or_(*xs: Expr) -> Expr:
    return _logic("or", xs, FALSE, TRUE)


def _logic(op: str, xs: Sequence[Expr], neutral: Expr, final: Expr) -> Expr:
    flat: set[Expr] = set()
    for x in xs:
        x = to_bool(x)
        flat.update(x.args if x.op == op else (x,))
    flat.discard(neutral)
    if final in flat or any(not_(x) in flat for x in flat if x.op == "not"):
        return final
    if not flat:
        return neutral
    terms = sorted(flat, key=by_digest)
    return terms[0] if len(terms) == 1 else node(op, BOOL, tuple(terms))


def where(c: Expr, x: Expr, y: Expr) -> Expr:
    c = to_bool(c)
    if x.kind != y.kind:
        convert = to_float if FLOAT in (x.kind, y.kind) else to_int
        x, y = convert(x), convert(y)
    if x is y or c is TRUE:
        return x
    if c is FALSE:
        return y
    if x.kind == BOOL:
        some = x.op == "const" or y.op == "const"
        return or_(and_(c, x), and_(not_(c), y)) if some else node("where", BOOL, (c, x, y))
    # canonical order: a constant comes last; if both branches are constants or neither is, the condition decides
    swap = x.op == "const" and y.op != "const"
    if (x.op == "const") == (y.op == "const"):
        swap = not_(c).digest < c.digest
    if swap:
        c, x, y = not_(c), y, x
    if x.op == "where" and x.args[0] is c:
        return where(c, x.args[1], y)
    if y.op == "where" and y.args[0] is c:
        return where(c, x, y.args[2])
    if x.op == "where" and x.args[2] is y:
        return where(and_(c, x.args[0]), x.args[1], y)
    if y.op == "where" and y.args[1] is x:
        return where(or_(c, y.args[0]), x, y.args[2])
    return node("where", x.kind, (c, x, y))


# -- reductions -------------------------------------------------------------------------------
def reduction(op: str, name: str, extent: Expr, body: Expr) -> Expr:
    """Reduce body by `rsum` or `rmax` over the variable `name` in [0, extent)."""
    return node(op, FLOAT, (body, extent), name)


def make(op: str, kind: str, args: tuple[Expr, ...], value: object = None) -> Expr:
    """Return the canonical expression for an operation by name; passes rebuild a node from new operands with it."""
    if op in _BUILD:
        return _BUILD[op](*args)
    if op in FLOAT_UNARY or op in ("abs", "sign"):
        return unary(op, *args)
    return node(op, kind, args, value)


_BUILD = {
    "add": add, "mul": mul, "floordiv": floordiv, "mod": mod, "min": minimum, "max": maximum, "pow": power,
    "ge0": ge0, "eq0": eq0, "lt": lt, "le": le, "eq": eq, "and": and_, "or": or_, "not": not_, "where": where,
    "float": to_float, "int": to_int, "half": half, "detach": detach,
}  # fmt: skip


def rebuild(root: Expr, change: Callable[[Expr, tuple[Expr, ...]], Expr | None]) -> Expr:
    """Rebuild bottom-up through the canonical constructors.

    `change(old, new_args)` returns the replacement of a node, or None to rebuild it from its new operands.
    """

    done: dict[Expr, Expr] = {}
    for at in walk(root):
        args = tuple(done[a] for a in at.args)
        new = change(at, args)
        if new is None:
            new = at if args == at.args else make(at.op, at.kind, args, at.value)
        done[at] = new
    return done[root]


def substitute(root: Expr, by: dict[Expr, Expr]) -> Expr:
    """Replace each occurrence of a key (any expression) by its value, including bound variables."""
    return rebuild(root, lambda old, _: by.get(old)) if by else root
