"""Describe a mask in words, independently of its spelling.

The affine part is a set of (i, j). A few families of sets (bands, prefixes, sinks, blocks, dilations) are fitted to it,
each with the tightest parameters under which it contains the mask. The mask is named after the fewest families whose
intersection equals it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import islpy as isl

from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import Expr, walk
from attnfx.mask import affine as P
from attnfx.mask.predicate import analysis
from attnfx.spec import I, J

OPAQUE = "learned/opaque"
PATTERN = "fixed pattern"


@analysis(maxsize=1024)
def describe(_: Expr, keep: Expr, sizes: Mapping[str, int]) -> str:
    """Describe a score program's mask: "none", "causal", "sliding window of 512 keys, causal and padding (by c0)".

    A window of W keys keeps W keys including the query's own: `i - j <= 511` keeps 512. A bidirectional window of W
    sees W keys to each side. Sizes are integers: a condition that masks nothing at these sizes is not named.
    """
    known, words = [], []
    for part in keep.args if keep.op == "and" else (keep,):
        if P.text(part, True) != P.text(part, False):
            words.append(_opaque(part, sizes))
        elif part.free & {"b", "h"}:
            words.append("different by head" if "h" in part.free else "different by batch")
        else:
            known.append(part)
    affine = _affine(A.and_(*known), sizes)
    words = ([affine] if affine != "none" else []) + sorted(set(words))
    return " and ".join(words) or "none"


# -- parts that depend on captures ------------------------------------------------------------
def _opaque(part: Expr, sizes: Mapping[str, int]) -> str:
    loads = [e for e in walk(part) if e.op == "load"]
    names = ", ".join(sorted({f"c{e.value}" if isinstance(e.value, int) else str(e.value) for e in loads}))
    if not loads or any(e.op in ("dot", "prob") for e in walk(part)):
        return OPAQUE
    if _same_document(part, loads):
        return f"documents (by {names})"
    if not {"i", "j"} <= part.free:
        kind = "padding" if "j" in part.free else "query padding" if "i" in part.free else None
        return f"{kind} (by {names})" if kind else OPAQUE
    if any({"i", "j"} <= e.free for e in loads):
        return f"dense mask (by {names})"
    if part.op == "or":  # keys below a captured length, then causal
        plain = [a for a in part.args if P.text(a, True) == P.text(a, False)]
        rest = A.or_(*(a for a in part.args if a not in plain))
        if plain and "i" not in rest.free and not A.or_(*plain).free & {"b", "h"}:
            affine = _affine(A.or_(*plain), sizes)
            if affine.startswith("causal"):
                return f"prefix (by {names}) then {affine}"
    return OPAQUE


def _same_document(part: Expr, loads: list[Expr]) -> bool:
    """Return whether the part is load[.., i] == load[.., j] of one capture."""
    if part.op not in ("eq0", "eq") or len(loads) != 2:
        return False
    at_i, at_j = sorted(loads, key=lambda e: "j" in e.free)
    if at_i.value != at_j.value or "i" not in at_i.free or "j" in at_i.free or "i" in at_j.free:
        return False
    shifted = at_i.args[-1].free == {"i"} and at_j.args[-1].free == {"j"} and at_i.args[:-1] == at_j.args[:-1]
    same = part in (A.eq(at_i, at_j), A.eq(at_j, at_i))
    return same and (shifted or substitute(at_i, {_variable(at_i, "i"): _variable(at_j, "j")}) is at_j)


def _variable(e: Expr, name: str) -> Expr:
    return next((a for a in walk(e) if a.op == "var" and a.value == name), I if name == "i" else J)


# -- parts that are known exactly -------------------------------------------------------------
@dataclass(frozen=True)
class _Family:
    """One set of (i, j): its constraints in isl's syntax, and its description."""

    constraints: str
    words: str = ""


ANY = _Family("1 = 1")


def _affine(keep: Expr, sizes: Mapping[str, int]) -> str:
    try:
        with P.solver() as context:
            return _Fit(context, P.text(keep, True), sizes["T"], sizes["S"]).words()
    except P.TooHard:
        return PATTERN


class _Fit:
    def __init__(self, context: isl.Context, predicate: str, T: int, S: int) -> None:
        self.context, self.T, self.S = context, T, S
        self.shifts = tuple(dict.fromkeys((0, S - T)))
        self.all = isl.Set(f"{{ [i, j] : 0 <= i < {T} and 0 <= j < {S} }}", context)
        self.mask = self.where(predicate).coalesce()

    def where(self, constraints: str) -> isl.Set:
        return self.all.intersect(isl.Set(f"{{ [i, j] : {constraints} }}", self.context))

    def most(self, line: str, over: isl.Set) -> int | None:
        """Return the largest value of an affine function over a set, or None if the set is empty."""
        top = over.apply(isl.Map(f"{{ [i, j] -> [{line}] }}", self.context)).dim_max_val(0)
        return top.to_python() if top.is_int() else None

    def least(self, line: str, over: isl.Set) -> int | None:
        top = self.most(f"-({line})", over)
        return None if top is None else -top

    def words(self) -> str:
        if self.all.is_subset(self.mask):
            return "none"
        if self.mask.is_empty():
            return "nothing is live"
        groups = [[ANY, *group] for group in (self.bands(), self.exceptions(), self.blocks(), self.dilations())]
        fitting = [[f for f in g if self.mask.is_subset(self.where(f.constraints))] for g in groups]
        # the fewest families first; a plain band before one with exceptions
        for choice in sorted(product(*fitting), key=lambda c: (sum(f is not ANY for f in c), c[1] is not ANY)):
            if self.where(" and ".join(f"({f.constraints})" for f in choice)).is_subset(self.mask):
                return " and ".join(f.words for f in choice if f.words)
        return PATTERN

    def bands(self) -> Iterator[_Family]:
        """Yield bands: low <= j - i <= high."""
        high, low = self.most("j - i", self.mask), self.least("j - i", self.mask)
        assert high is not None and low is not None
        yield _Family(f"j - i <= {high}", self.band_words(None, high))
        yield _Family(f"j - i >= {low}", self.band_words(low, high if self.T == 1 else None))
        yield _Family(f"{low} <= j - i <= {high}", self.band_words(low, high))

    def band_words(self, low: int | None, high: int | None) -> str:
        for shift in self.shifts:
            aligned = " (aligned to the last key)" if shift else ""
            if high == shift:
                window = "" if low is None else f"sliding window of {shift - low + 1} keys, "
                return f"{window}causal{aligned}"
            if high is not None and low is not None and high - shift == shift - low:
                return f"bidirectional window of {high - shift}{aligned}"
        if low is None:
            return "strictly causal" if high == -1 else f"causal (shifted by {high})"
        if high is None:
            return "anti-causal" if low == 0 else f"no key more than {-low} back"
        return f"window of {-low} keys back and {high} ahead"

    def exceptions(self) -> Iterator[_Family]:
        """Yield bands with exceptions: a prefix for all queries, or first keys (sinks) and queries outside a window."""
        for shift in self.shifts:
            prefix = self.most("j", self.mask.intersect(self.where(f"j - i > {shift}")))
            if prefix is not None:
                aligned = " (aligned to the last key)" if shift else ""
                yield _Family(f"j - i <= {shift} or j <= {prefix}", f"prefix of {prefix + 1} then causal{aligned}")
        high = self.most("j - i", self.mask)
        for outer in (f"j - i <= {high}", "1 = 1"):
            dead = self.where(outer).subtract(self.mask)
            keys, queries = self.least("j", dead), self.least("i", dead)
            if keys is None or queries is None:
                continue
            for first in dict.fromkeys((0, queries)) if outer == "1 = 1" else (0,):
                rest = self.mask.intersect(self.where(f"j >= {keys} and i >= {first}"))
                low, top = self.least("j - i", rest), self.most("j - i", rest)
                if low is None or top is None or not (keys or first):
                    continue
                words = [self.band_words(low, top)]
                if keys:
                    words.append(f"sinks (first {keys} keys always live)")
                if first:
                    words.append(f"first {first} queries see every key")
                inner = f"j - i >= {low}" if outer != "1 = 1" else f"{low} <= j - i <= {top}"
                free = " or ".join([f"({inner})", f"j < {keys}", f"i < {first}"])
                yield _Family(f"{outer} and ({free})", " and ".join(words))

    def blocks(self) -> Iterator[_Family]:
        """Yield equal blocks of the sequence; each sees itself and `before` of its predecessors."""
        for shift in self.shifts:
            rows = self.most("i", self.mask.intersect(self.where("j = 0")))
            keys = self.most("j", self.mask.intersect(self.where("i = 0")))
            sizes = (rows is not None and rows + 1 + shift, keys is not None and keys + 1)
            for size in dict.fromkeys(int(n) for n in sizes):
                if not 1 < size < self.S:
                    continue
                apart = f"floor((i + {shift}) / {size}) - floor(j / {size})"
                before = self.most(apart, self.mask)
                aligned = " (aligned to the last key)" if shift else ""
                yield _Family(f"0 <= {apart}", f"causal by blocks of {size}{aligned}")
                words = f"blocks of {size}" if not before else f"blocks of {size} with {before} before"
                yield _Family(f"0 <= {apart} <= {before}", words + aligned)

    def dilations(self) -> Iterator[_Family]:
        distance = self.mask.apply(isl.Map("{ [i, j] -> [i - j] }", self.context))
        stride = distance.get_stride(0).to_python()
        if stride > 1:
            offset = self.most("i - j", self.mask) % stride  # type: ignore[operator]
            words = f"dilated by {stride}" + (f" from {offset}" if offset else "")
            yield _Family(f"(i - j) mod {stride} = {offset}", words)
