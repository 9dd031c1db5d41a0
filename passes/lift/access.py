"""Trace query, key and value to their sources: undo expansions, and find views to (B, heads, rows, width).

An `Access` is a node and the index at which an operand reads it. The walk from the operand towards its source passes
views. It gains by passing an expansion of grouped heads, a constant factor or an upcast, because these need not be
materialized. An access is usable if each of its dimensions is a mixed-radix number of distinct variables: then plain
views (reshape, select, slice, permute) produce the operand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import Expr, walk
from attnfx.passes.fx.analysis import storage
from attnfx.passes.fx.nodes import Opaque, dims, op_name, value
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.tables import VIEWS, Index

EXPANSIONS = ("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave")
Split = dict[Expr, Expr]  # a variable -> high * size(low) + low
UNIT = A.const(1.0)


@dataclass(frozen=True)
class Access:
    """The value `factor` * node[index]; `gain` counts the steps on the way that need not be materialized."""

    node: Node
    index: Index
    factor: Expr = UNIT
    gain: int = 0
    upcast: bool = False

    def at(self, by: dict[Expr, Expr]) -> Access:
        """Return the same value with the variables of its index replaced."""
        return replace(self, index=tuple(substitute(e, by) for e in self.index))


def accesses(lifter: Lifter, at: Node, index: Index) -> list[Access]:
    """Return the operand itself, then each earlier value that it is a view, a constant multiple or an upcast of."""
    found = [Access(at, index)]
    while True:
        last = found[-1]
        step = _step(lifter, last)
        if step is None or len(found) > 60:
            return found
        if last.node in lifter.written and storage(last.node) != storage(step.node):
            return found  # the source lacks the values that were written in place
        found.append(step)


def _step(lifter: Lifter, last: Access) -> Access | None:
    at = last.node
    if at.op != "call_function" or at in lifter.frozen:
        return None
    name = op_name(at)
    if name in VIEWS:
        try:
            source, index = VIEWS[name](at, last.index)
        except Opaque:
            return None
        grown = name in EXPANSIONS and any(
            a is not b for a, b in zip(reversed(dims(source)), reversed(dims(at)), strict=False)
        )
        return Access(source, index, last.factor, last.gain + grown, last.upcast)
    if name in ("mul", "div") and len(at.args) == 2 and not at.kwargs:
        for source, other in ((at.args[0], at.args[1]), (at.args[1], at.args[0])):
            if name == "div" and source is at.args[1]:
                continue
            number = _number(lifter, other)
            if number is not None and isinstance(source, Node) and value(source).dtype == value(at).dtype:  # type: ignore[union-attr]
                if len(dims(source)) != len(dims(at)):
                    continue
                factor = number if name == "mul" else A.unary("recip", number)
                return Access(source, last.index, A.mul(last.factor, factor), last.gain + 1, last.upcast)
    if name in ("to", "_to_copy", "type_as", "float"):
        source = at.args[0]
        if isinstance(source, Node):
            before, after = value(source).dtype, value(at).dtype  # type: ignore[union-attr]
            if before in (torch.float16, torch.bfloat16) and after == torch.float32:
                return Access(source, last.index, last.factor, last.gain + 1, True)
            if before == after:
                return Access(source, last.index, last.factor, last.gain, last.upcast)
    return None


def _number(lifter: Lifter, x: object) -> Expr | None:
    """Return a finite nonzero constant or a symbolic float as an expression, else None."""
    rank = 0
    if isinstance(x, Node) and isinstance(value(x), torch.Tensor):
        if any(n is not A.ONE for n in dims(x)):
            return None
        rank = len(dims(x))
    try:
        e = A.to_float(lifter.operand(x, (A.ZERO,) * rank))
    except Opaque:
        return None
    if e.op == "const":
        return e if abs(float(e.value)) not in (0.0, float("inf")) and e.value == e.value else None  # type: ignore[arg-type]
    return e if e.op == "load" and not e.args else None


def best(candidates: list[Access], batch: frozenset[str], upcast: bool = True) -> tuple[Access, list[Split]] | None:
    """Return the usable access with the most gain, the nearest one of several, and the batch splits that it needs."""
    chosen: tuple[Access, list[Split]] | None = None
    for access in candidates:
        if (access.upcast and not upcast) or (chosen is not None and access.gain <= chosen[0].gain):
            continue
        splits = needed_splits(access.index, batch)
        inside = (_inside(apply_splits(x, splits or []), n) for x, n in zip(access.index, dims(access.node)))
        if splits is not None and all(inside):
            names = [v for x in access.index for v in apply_splits(x, splits).free]
            if len(names) == len(set(names)):
                chosen = access, splits
    return chosen


def apply_splits(e: Expr, splits: list[Split]) -> Expr:
    for split in splits:
        e = substitute(e, split)
    return e


def needed_splits(index: Index, batch: frozenset[str]) -> list[Split] | None:
    """Return splits of batch variables that remove every floor division and remainder, or None."""
    splits: list[Split] = []
    for _ in range(6):
        atoms = [e for x in index for e in walk(x) if e.op in ("floordiv", "mod")]
        if not atoms:
            return splits
        atom = next((a for a in atoms if a.args[0].op == "var" and a.args[0].value in batch), None)
        if atom is None:
            return None
        whole, low_size = atom.args
        quotient = poly.divide(poly.of(whole.args[0]), poly.of(low_size))
        if quotient is None:
            return None
        high = A.var(f"{whole.value}h", A.from_poly(quotient))
        low = A.var(f"{whole.value}l", low_size)
        splits.append({whole: A.add(A.mul(high, low_size), low)})
        index = tuple(substitute(x, splits[-1]) for x in index)
    return None


def program_splits(programs: list[Expr], batch: frozenset[str]) -> list[Split]:
    """Return splits of batch variables that the programs divide evenly: a flattened (batch, head) becomes two axes."""
    splits: list[Split] = []
    for _ in range(6):
        atoms = (e for p in programs for e in walk(p) if e.op in ("floordiv", "mod") and e.args[0].op == "var")
        split = None
        for atom in atoms:
            if atom.args[0].value in batch:
                split = needed_splits((atom,), batch)
                if split:
                    break
        if not split:
            break
        splits.append(split[0])
        programs = [substitute(p, split[0]) for p in programs]
    return splits


def radix(e: Expr) -> tuple[Expr, list[tuple[Expr, Expr]]] | None:
    """Return (offset, [(variable, step)] from slow to fast) of an index that sums distinct variables, or None."""
    offset: poly.Poly = {}
    terms: list[tuple[Expr, Expr]] = []
    for monomial, coefficient in poly.by_index(poly.of(e)).items():
        if not monomial:
            offset = coefficient
        elif len(monomial) == 1 and monomial[0].op == "var":
            terms.append((monomial[0], A.from_poly(coefficient)))
        else:
            return None
    if not poly.nonnegative(offset):
        return None
    # order by step: each step must be the next one's step times its size
    ordered: list[tuple[Expr, Expr]] = []
    expected: Expr | None = None
    while terms:
        if expected is None:
            pick = next((t for t in terms if t[1] is A.ONE), terms[0] if len(terms) == 1 else None)
        else:
            pick = next((t for t in terms if t[1] is expected), None)
        if pick is None:
            return None
        terms.remove(pick)
        ordered.insert(0, pick)
        if len(terms) == 0 and pick[1] is not A.ONE and len(ordered) == 1:
            if pick[1].op != "const" or pick[1].value < 1:  # type: ignore[operator]
                return None
        expected = A.mul(pick[1], pick[0].args[0])
    return A.from_poly(offset), ordered


def _inside(e: Expr, extent: Expr) -> bool:
    """Return whether views can express an index. A part of a `cat` may be read beyond its own end."""
    found = radix(e)
    return found is not None and (not found[1] or A.le(end(*found), extent) is not A.FALSE)


def end(offset: Expr, terms: list[tuple[Expr, Expr]]) -> Expr:
    """Return one more than the largest index of a mixed-radix number."""
    total = A.mul(*(v.args[0] for v, _ in terms))
    return A.add(offset, A.mul(terms[-1][1], A.add(total, A.const(-1))), A.ONE)


def split_axes(axes: list[Expr], splits: list[Split]) -> list[Expr]:
    """Return the batch axes after splitting, high before low."""
    for split in splits:
        out: list[Expr] = []
        for a in axes:
            if a in split:
                high_low = [v for v in walk(split[a]) if v.op == "var"]
                out.extend(sorted(high_low, key=lambda v: str(v.value)[-1]))  # "h" before "l"
            else:
                out.append(a)
        axes = out
    return axes


@dataclass(frozen=True)
class Operand:
    """A node that is read through `index` over the axes. With `parts`, the operand reads the stack of all parts, whose
    first dimension counts them; `node` is then the first part."""

    node: Node
    index: Index
    parts: tuple[Node, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.parts or (self.node,)


def free(index: Index) -> frozenset[str]:
    return frozenset().union(*(x.free for x in index))


def extent(axes: Iterable[Expr]) -> Expr:
    """Return the product of the axes' sizes."""
    return A.mul(A.ONE, *(a.args[0] for a in axes))


def flat(axes: Sequence[Expr]) -> Expr:
    """Return one index over all the axes, the last fastest."""
    out = A.ZERO
    for a in axes:
        out = A.add(A.mul(out, a.args[0]), a)
    return out


def unflatten(by: dict[Expr, Expr], axes: list[Expr], flat: Expr) -> None:
    """Add to `by` each axis as an expression of `flat`, one index over all of them, the last fastest."""
    rest = flat
    for n, a in enumerate(reversed(axes)):
        extent = a.args[0]
        by[a] = rest if n == len(axes) - 1 else A.mod(rest, extent)
        rest = A.floordiv(rest, extent)


def variables(n: Node) -> Index:
    return tuple(A.var(f"u{d}", extent) for d, extent in enumerate(dims(n)))
