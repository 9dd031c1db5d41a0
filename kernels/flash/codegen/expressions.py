"""Translate expressions to Triton source: the statements of one function body.

A value is a scalar or a tensor that broadcasts over the tile: (rows, 1) if it depends on i alone, (1, columns) if on j
alone. Integers have 32 bits, floats are float32; a loaded integer keeps its width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache, reduce

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.algebra import rebuild
from attnfx.ir.expr import BOOL, FLOAT, INT, Expr, node
from attnfx.ir.reach import reach
from attnfx.kernels.evaluate import opaque

HEAD, ROW, COLUMN, TILE = range(4)
_NARY = frozenset("add mul and or min max".split())
_INFIX = {"add": " + ", "mul": " * ", "and": " & ", "or": " | ", "lt": " < ", "le": " <= ", "eq": " == "}
_CALLS = {
    "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2", "sqrt": "tl.sqrt_rn", "sin": "tl.sin",
    "cos": "tl.cos", "erf": "tl.erf", "floor": "tl.floor", "ceil": "tl.ceil", "abs": "tl.abs", "where": "tl.where",
    "tanh": "f.tanh", "sigmoid": "f.sigmoid", "expm1": "f.expm1", "log1p": "f.log1p", "softplus": "f.softplus",
    "atan": "f.atan", "trunc": "f.trunc", "round": "f.nearest", "sign": "f.sign", "pow": "f.power",
}  # fmt: skip
_EXTREMES = {"min": "tl.minimum", "max": "tl.maximum"}
_OPERAND = re.compile(r"[\w.]+(\[\d+\])*|[\w.]+\([^()]*\)")
_LONGEST = 72  # a longer expression is assigned to a variable
FLOAT32_MAX, FLOAT32_TINY = 3.4028234663852886e38, 1.1754943508222875e-38


class NotEmitted(Exception):
    """An operation cannot be translated; the message names it and gives the reason."""


@lru_cache(maxsize=20_000)
def level(e: Expr) -> int:
    """Return the level of a value, the part of a tile that it varies over: HEAD, ROW, COLUMN or TILE."""
    if opaque(e) or {"i", "j"} <= e.free:
        return TILE
    return ROW if "i" in e.free else COLUMN if "j" in e.free else HEAD


def is_trivial(e: Expr) -> bool:
    """Return whether a value is too cheap to be stored."""
    return e.op in ("const", "size", "var")


def regroup(root: Expr) -> Expr:
    """Regroup sums and products so that the operands of one level form one operand."""

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if old.op not in _NARY or len(args) < 3 or level(old) != TILE:
            return node(old.op, old.kind, args, old.value)
        groups: dict[int, list[Expr]] = {}
        for a in args:
            groups.setdefault(level(a), []).append(a)
        if old.kind != FLOAT and HEAD in groups and (ROW in groups or COLUMN in groups):
            groups.setdefault(ROW if ROW in groups else COLUMN, []).extend(groups.pop(HEAD))
        parts = []
        for at in (TILE, COLUMN, ROW, HEAD):
            some = groups.get(at, [])
            parts += some if at == TILE or len(some) == 1 else [node(old.op, old.kind, tuple(some))] if some else []
        return node(old.op, old.kind, tuple(parts)) if len(parts) > 1 else parts[0]

    return rebuild(root, change)


class Body:
    """The statements of one function.

    known    the source text of values that are arguments of the function
    sizes    the source text of each size
    lengths  the source text of the captures' lengths, by slot and dim
    wide     slots that need 64-bit offsets
    inside   slots whose loads are always in bounds; the indices of other loads are clamped
    """

    def __init__(
        self,
        known: Mapping[Expr, str],
        sizes: Mapping[str, str],
        lengths: Mapping[tuple[int, int], str],
        wide: frozenset[int],
        inside: frozenset[int],
    ) -> None:
        self.text: dict[Expr, str] = dict(known)
        self.sizes, self.lengths, self.wide, self.inside = sizes, lengths, wide, inside
        self.lines: list[str] = []
        self.uses: dict[Expr, int] = {}

    def add(self, *roots: Expr) -> list[str]:
        """Append the statements that the values need, and return their texts."""
        order = list(dict.fromkeys(e for root in roots for e in self._below(root)))
        for e in order:
            for a in e.args:
                self.uses[a] = self.uses.get(a, 0) + 1
        for e in order:
            if e not in self.text:
                text = self._source(e)
                if not is_trivial(e) and (self.uses.get(e, 0) > 1 or e.op == "load" or len(text) > _LONGEST):
                    self.lines.append(f"t{len(self.lines)} = {text}")
                    text = f"t{len(self.lines) - 1}"
                self.text[e] = text
        return [self.text[root] for root in roots]

    def _below(self, root: Expr) -> list[Expr]:
        """Return the expressions to translate for `root`, operands first. A known value ends the traversal."""
        seen: dict[Expr, None] = {}
        stack = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if ready:
                seen[e] = None
            elif e not in seen and e not in self.text:
                stack.append((e, True))
                stack.extend((a, False) for a in e.args)
        return list(seen)

    def _at(self, e: Expr) -> str:
        """Return the text as an operand, in parentheses if needed."""
        text = self.text[e]
        return text if _OPERAND.fullmatch(text) else f"({text})"

    def _source(self, e: Expr) -> str:
        x = [self._at(a) for a in e.args]
        plain = [self.text[a] for a in e.args]
        match e.op:
            case "const":
                return _constant(e)
            case "var":
                return str(e.value)
            case "size":
                return self.sizes[str(e.value)]
            case "dot" | "prob":
                return e.op
            case "load":
                return self._load(e)
            case "add":
                return self._sum(e)
            case "mul" if e.args[0].op == "const" and e.args[0].value == -1 and len(e.args) == 2:
                return f"-{x[1]}"
            case "mul" | "and" | "or" | "lt" | "le" | "eq":
                return _INFIX[e.op].join(x)
            case "min" | "max":
                nan = ", tl.PropagateNan.ALL" if e.kind == FLOAT else ""
                return reduce(lambda x, y: f"{_EXTREMES[e.op]}({x}, {y}{nan})", plain)
            case "floordiv" | "mod":
                sign, name = ("//", "floordiv") if e.op == "floordiv" else ("%", "floormod")
                safe = poly.nonnegative(poly.bounds(e.args[0])[0]) and poly.nonnegative(poly.bounds(e.args[1])[0])
                return f"{x[0]} {sign} {x[1]}" if safe else f"f.{name}({', '.join(plain)})"
            case "ge0" | "eq0":
                return f"{x[0]} {'>=' if e.op == 'ge0' else '=='} 0"
            case "not":
                return f"{x[0]} == 0"
            case "float":
                return f"tl.cast({plain[0]}, tl.float32)"
            case "int":
                return f"tl.cast({plain[0]}, tl.int32)"
            case "half":
                return f"tl.cast(tl.cast({plain[0]}, tl.float16), tl.float32)"
            case "detach":
                return plain[0]
            case "recip":
                return f"1.0 / {x[0]}"
        if e.op in _CALLS:
            return f"{_CALLS[e.op]}({', '.join(plain)})"
        raise NotEmitted(f"the kernels lack the operation {e.op!r}: {e}")

    def _sum(self, e: Expr) -> str:
        text, rest = "", [a for a in e.args if a is not A.DOT]
        for a in rest:
            negative = a.op == "mul" and a.args[0].op == "const" and a.args[0].value == -1 and len(a.args) == 2
            if negative and text and a not in self.text:
                text += f" - {self._at(a.args[1])}"
            elif negative and text and self.text[a].startswith("-"):
                text += f" - {self.text[a][1:]}"
            else:
                text += (" + " if text else "") + self._at(a)
        return text if len(rest) == len(e.args) else f"f.to_product({self.text[A.DOT]}, {text})"

    def _load(self, e: Expr) -> str:
        slot = e.value
        assert isinstance(slot, int)
        capture, terms = f"captures[{slot}]", []
        for n, index in enumerate(e.args):
            stride = f"{capture}[{n + 1}]"
            if slot in self.inside:
                parts = index.args if index.op == "add" else (index,)
                terms += [(level(x), self._offset(slot, self._at(x), stride)) for x in parts if not _is_zero(x)]
            elif not _is_zero(index):
                text = f"tl.minimum(tl.maximum({self.text[index]}, 0), {self.lengths[slot, n]} - 1)"
                terms.append((level(index), self._offset(slot, text, stride)))
        # add the smallest tensors first: a sum is as large as its largest operand
        terms = sorted(terms, key=lambda term: term[0])
        text = f"tl.load({' + '.join([f'{capture}[0]', *(term for _, term in terms)])})"
        if e.kind == BOOL:
            return f"{text} != 0"
        return f"tl.cast({text}, tl.float32)" if e.kind == FLOAT else text

    def _offset(self, slot: int, index: str, stride: str) -> str:
        return f"tl.cast({index}, tl.int64) * {stride}" if slot in self.wide else f"{index} * {stride}"


def _is_zero(e: Expr) -> bool:
    return e.op == "const" and e.value == 0


def _constant(e: Expr) -> str:
    value = e.value
    if e.kind == INT:
        assert isinstance(value, int)
        if not -(2**31) <= value < 2**31:
            raise NotEmitted(f"the integer {value} needs more than 32 bits")
        return str(value)
    if e.kind == BOOL:
        return f"tl.full((), {bool(value)}, tl.int1)"
    number = float(value)  # type: ignore[arg-type]
    if math.isnan(number):
        return 'float("nan")'
    if abs(number) > FLOAT32_MAX:
        return 'float("inf")' if number > 0 else 'float("-inf")'
    if 0.0 < abs(number) < FLOAT32_TINY:
        return f"tl.full((), {number!r}, tl.float32)"
    return repr(number)


def separate(e: Expr) -> Expr:
    """Rewrite row + column >= 0 as column >= -row, and the same for == 0, to save one addition per score."""

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if old.op in ("ge0", "eq0") and args[0].op == "add" and level(args[0]) == TILE:
            parts = {level(a): a for a in args[0].args}
            if len(parts) == len(args[0].args) == 2 and set(parts) == {ROW, COLUMN}:
                return node("le" if old.op == "ge0" else "eq", BOOL, (A.neg(parts[ROW]), parts[COLUMN]))
        return node(old.op, old.kind, args, old.value)

    return rebuild(e, change)


def boundary(roots: list[Expr], at: int) -> dict[int, list[Expr]]:
    """Return, by level, the nontrivial values of lower levels that a function of level `at` takes as arguments."""
    found: dict[int, dict[Expr, None]] = {}
    for e in reach(roots, lambda e: e.args if level(e) == at else ()):
        if level(e) != at and not is_trivial(e):
            found.setdefault(level(e), {})[e] = None
    return {k: sorted(v, key=lambda e: e.digest) for k, v in found.items()}
