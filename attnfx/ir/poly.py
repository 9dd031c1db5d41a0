"""Integer polynomials, the normal form of integer expressions, and their bounds from index ranges.

A polynomial maps monomials (sorted tuples of atoms) to integer coefficients. Atoms are the expressions that `algebra`
does not expand: variables, sizes, floor divisions, remainders, loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from attnfx.ir.expr import Expr

Monomial = tuple[Expr, ...]
Poly = dict[Monomial, int]
ONE: Poly = {(): 1}


def by_digest(e: Expr) -> bytes:
    return e.digest


def of(e: Expr) -> Poly:
    """Return the polynomial of a canonical integer expression."""
    return dict(_of(e))


@lru_cache(maxsize=20_000)
def _of(e: Expr) -> tuple[tuple[Monomial, int], ...]:
    if e.op == "const":
        return (((), int(e.value)),) if e.value else ()  # type: ignore[call-overload]
    if e.op == "add":
        return tuple(term for a in e.args for term in _of(a))
    if e.op == "mul":
        head = e.args[0]
        if head.op == "const":
            return ((e.args[1:], int(head.value)),)  # type: ignore[call-overload]
        return ((e.args, 1),)
    return (((e,), 1),)


def _sum(p: Poly, terms: Iterable[tuple[Monomial, int]]) -> Poly:
    """Add terms to a polynomial in place."""
    for m, c in terms:
        total = p.get(m, 0) + c
        if total:
            p[m] = total
        else:
            p.pop(m, None)
    return p


def plus(a: Poly, b: Poly, factor: int = 1) -> Poly:
    return _sum(dict(a), ((m, factor * c) for m, c in b.items()))


def times(a: Poly, b: Poly) -> Poly:
    return _sum({}, ((tuple(sorted((*m, *n), key=by_digest)), c * d) for m, c in a.items() for n, d in b.items()))


def _rank(m: Monomial) -> tuple[int, tuple[bytes, ...]]:
    return len(m), tuple(x.digest for x in m)


def divide(a: Poly, b: Poly) -> Poly | None:
    """Return the exact quotient a / b, or None, by long division by the leading term."""
    if not b:
        return None
    lead = max(b, key=_rank)
    out: Poly = {}
    rest = dict(a)
    while rest:
        top = max(rest, key=_rank)
        left = list(top)
        for atom in lead:
            if atom not in left:
                return None
            left.remove(atom)
        if rest[top] % b[lead]:
            return None
        term = {tuple(left): rest[top] // b[lead]}
        out = plus(out, term)
        rest = plus(rest, times(term, b), -1)
        if len(out) > 64:
            return None
    return out


def by_index(p: Poly) -> dict[Monomial, Poly]:
    """Group terms by their atoms other than sizes; the coefficients are polynomials in the sizes."""
    out: dict[Monomial, Poly] = {}
    for m, c in p.items():
        index = tuple(a for a in m if a.op != "size")
        sizes = tuple(a for a in m if a.op == "size")
        out.setdefault(index, {})[sizes] = c
    return out


def nonnegative(p: Poly | None) -> bool:
    """Prove p >= 0 for all sizes >= 1; False means unproven. Substitutes size = 1 + s and tests that no coefficient is
    negative."""
    if p is None:
        return False
    shifted: Poly = {}
    for m, c in p.items():
        term: Poly = {(): c}
        for atom in m:
            if atom.op != "size":
                return False
            term = times(term, {(): 1, (atom,): 1})
        shifted = plus(shifted, term)
    return all(c >= 0 for c in shifted.values())


def positive(p: Poly) -> bool:
    """Prove p >= 1 for all sizes >= 1; False means unproven."""
    return nonnegative(plus(p, ONE, -1))


def at_least(e: Expr, least: int) -> bool:
    """Prove that an integer expression is at least a number; False means unproven."""
    low, _ = bounds(e)
    return low is not None and nonnegative(plus(low, {(): least}, -1))


def at_most(e: Expr, most: int) -> bool:
    """Prove that an integer expression is at most a number; False means unproven."""
    _, high = bounds(e)
    return high is not None and nonnegative(plus({(): most}, high, -1))


def is_index(e: Expr, size: Expr) -> bool:
    """Prove 0 <= e < size; False means unproven."""
    low, high = bounds(e)
    return nonnegative(low) and high is not None and positive(plus(of(size), high, -1))


def _atom_bounds(a: Expr) -> tuple[Poly | None, Poly | None]:
    if a.op == "var" or (a.op == "mod" and positive(of(a.args[1]))):
        return {}, plus(of(a.args[-1]), ONE, -1)
    if a.op == "size":
        return {(a,): 1}, {(a,): 1}
    if a.op == "floordiv":
        low, high = bounds(a.args[0])
        divisor = of(a.args[1])
        if high is None or not nonnegative(low) or not positive(divisor):
            return None, None
        # floor(high / d): exact if d divides high + 1, else high itself is a bound
        whole = divide(plus(high, ONE), divisor)
        if whole is not None:
            return {}, plus(whole, ONE, -1)
        if set(high) <= {()} and set(divisor) <= {()}:
            return {}, plus({}, {(): high.get((), 0) // divisor[()]})
        return {}, high
    if a.op == "abs":
        low, high = bounds(a.args[0])
        if low is None or high is None:
            return {}, None
        return {}, plus(high, low, -1) if nonnegative(high) and nonnegative(plus({}, low, -1)) else None
    if a.op in ("where", "min", "max"):
        pairs = [bounds(x) for x in (a.args[1:] if a.op == "where" else a.args)]
        return _extreme([p[0] for p in pairs], -1), _extreme([p[1] for p in pairs], 1)
    return None, None


def _extreme(values: list[Poly | None], sign: int) -> Poly | None:
    """Return a value that is provably the largest (sign 1) or smallest (sign -1) of all, or None."""
    for v in values:
        if v is not None and all(w is not None and nonnegative(plus({}, plus(v, w, -1), sign)) for w in values):
            return v
    return None


@lru_cache(maxsize=20_000)
def bounds(e: Expr) -> tuple[Poly | None, Poly | None]:
    """Return lower and upper bound of an integer expression as polynomials in the sizes, each None if unknown."""
    low: Poly | None = {}
    high: Poly | None = {}
    for monomial, coefficient in of(e).items():
        a: Poly | None = {(): coefficient}
        b: Poly | None = {(): coefficient}
        for atom in monomial:
            la, ha = _atom_bounds(atom)
            if len(monomial) > 1 and not nonnegative(la):  # only products of nonnegative ranges have known bounds
                la = ha = None
            a, b = _known(times, a, la), _known(times, b, ha)
        if coefficient < 0:
            a, b = b, a
        low, high = _known(plus, low, a), _known(plus, high, b)
    return low, high


def _known(operation: Callable[[Poly, Poly], Poly], a: Poly | None, b: Poly | None) -> Poly | None:
    """Return a sum or product, None if an operand is unknown."""
    return None if a is None or b is None else operation(a, b)
