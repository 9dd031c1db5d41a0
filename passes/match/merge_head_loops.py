"""Merge an attention in a loop over heads or batch elements into one attention with one more axis.

    stack([softmax(q[:, h] @ k[:, h].mT) @ v[:, h] for h in range(H)], 1)

Each step is matched as a site of its own. `roll` then generalizes the steps: an index that is h or h // g in step h
becomes the new axis, and so do the parts of masks and biases that follow from it. The proof substitutes each step's
number for the axis: the step's own indices and programs must come out. Operands that each step computes for itself (a
projection for each head) are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import INT, Expr, walk
from attnfx.passes.fx.nodes import Opaque, dims, op_name, value
from attnfx.passes.lift.access import UNIT, Operand, accesses, apply_splits, flat, free, needed_splits, radix
from attnfx.passes.lift.tables import VIEWS, Index
from attnfx.passes.match.matcher import Finder
from attnfx.passes.match.results import Match
from attnfx.passes.match.spec_builder import batch_and_heads
from attnfx.passes.match.weight_reductions import over_axes, over_letters, renumbered

aten = torch.ops.aten
OPERANDS = ("query", "key", "value")


class Different(Exception):
    """The steps are not one function of their number."""


@dataclass(frozen=True)
class Numbering:
    """The steps' numbers as one axis, or as two (outer, inner): step n is at `points[n]`."""

    axes: tuple[Expr, ...]
    points: tuple[tuple[int, ...], ...]

    def at(self, step: int) -> dict[Expr, Expr]:
        return {a: A.const(x) for a, x in zip(self.axes, self.points[step], strict=True)}

    def general(self, found: Sequence[Expr]) -> Expr:
        """Return the expression over the axes that equals `found[n]` in step n. Raises Different."""
        first = found[0]
        if all(e is first for e in found):
            return first
        if first.kind == INT:
            made = first
            for d, a in enumerate(self.axes):
                unit = self.points.index(tuple(int(d == x) for x in range(len(self.axes))))
                made = A.add(made, A.mul(A.sub(found[unit], first), a))
            if all(substitute(made, self.at(n)) is e for n, e in enumerate(found)):
                return made
        if len({(e.op, e.kind, len(e.args), e.value) for e in found}) != 1 or not first.args:
            raise Different
        groups = [_sorted(e) for e in found] if first.op in ("add", "mul", "and", "or") else [e.args for e in found]
        args = tuple(self.general(x) for x in zip(*groups, strict=True))
        return A.make(first.op, first.kind, args, first.value)


def _sorted(e: Expr) -> list[Expr]:
    """Return the operands in an order that does not depend on the integers in them."""
    return sorted(e.args, key=lambda a: [(x.op, repr(x.value)) for x in walk(a) if x.kind != INT])


def numberings(name: str, count: int) -> list[Numbering]:
    """Return the ways to number the steps: with one axis first, then with two."""
    one = Numbering((A.var(name, count),), tuple((n,) for n in range(count)))
    inner = [g for g in range(2, count) if count % g == 0]
    two = [
        Numbering((A.var(f"{name}_o", count // g), A.var(f"{name}_i", g)), tuple(divmod(n, g) for n in range(count)))
        for g in inner
    ]
    return [one, *two]


def out_index(part: Node, match: Match) -> Index | None:
    """Return `match.out_index` for a part that is a view of `match.final` with all its elements, else None."""
    at, index = part, tuple(A.var(f"p{d}", n) for d, n in enumerate(dims(part)))
    own = index
    while at is not match.final:
        if op_name(at) not in VIEWS or (at is not part and len(at.users) != 1):
            return None
        try:
            at, index = VIEWS[op_name(at)](at, index)
        except Opaque:
            return None
    splits = needed_splits(index, frozenset(str(v.value) for v in own))
    if splits is None:
        return None
    known: dict[Expr, Expr] = {}
    for e, want, n in zip(index, match.out_index, dims(at), strict=True):
        e = apply_splits(e, splits)
        if e.op == "var" and e.args[0] is n and e not in known:
            known[e] = want
        elif n is not A.ONE:
            return None
    made = tuple(substitute(apply_splits(v, splits), known) if n is not A.ONE else A.ZERO
                 for v, n in zip(own, dims(part), strict=True))  # fmt: skip
    return None if any(str(v.value) in e.free for e in made for v in known) else made


def roll(finder: Finder, final: Node, dim: int, stacked: bool, steps: list[Match]) -> Match | None:
    """Return the match of all steps, or None. Their results are stacked as a new dimension `dim` of `final`, or
    concatenated along `dim`."""
    like, facts = steps[0], finder.facts
    if any(facts.regions[m.final][0] != facts.regions[final][0] for m in steps):
        return None
    if not all(_alike(like, m) for m in steps) or len({dims(m.final)[dim] for m in steps if not stacked}) > 1:
        return None
    operands: list[list[Operand]] = []
    for name in OPERANDS:
        found = [getattr(m, name) for m in steps]
        shared = common(finder, found) or _stacked(found)
        if shared is None:
            return None
        operands.append(shared)
    if any(len({(x.parts, dims(n), value(n).dtype) for x in found for n in x.nodes}) > 1 for found in operands):
        return None
    read = [*(n for found in operands for x in found for n in x.nodes), *(c for m in steps for c in m.captures)]
    if any(x in facts.written for x in read):
        return None  # two steps may have read different values
    names = [_names(m, like) for m in steps]
    moved = [[substitute(e, by) for e in m.out_index] for m, by in zip(steps, names, strict=True)]
    programs = [[over_axes(p, m, by) for p in m.spec.programs] for m, by in zip(steps, names, strict=True)]
    indices = [[[substitute(e, by) for e in x.index] for x, by in zip(found, names, strict=True)] for found in operands]
    for numbers in numberings(f"step_{final.name}", len(steps)):
        try:
            out, program, *index = ([numbers.general(x) for x in zip(*of, strict=True)]
                                    for of in (moved, programs, *indices))  # fmt: skip
        except (Different, ValueError):
            continue
        number = flat(numbers.axes)
        if stacked:
            out.insert(dim, number)
        else:
            out[dim] = A.add(A.mul(number, dims(like.final)[dim]), out[dim])
        if all(radix(e) is not None for e in (*out, *(e for x in index for e in x))):
            made = [replace(found[0], index=tuple(x)) for found, x in zip(operands, index, strict=True)]
            return _whole(like, final, steps, numbers, made, tuple(out), program)
    return None


def _whole(
    like: Match, final: Node, steps: list[Match], numbers: Numbering, operands: list[Operand], out: Index,
    programs: list[Expr],
) -> Match:  # fmt: skip
    """Return the match over the axes of `like` and of the numbers, in the order of the result's dimensions."""
    terms = [v for e in out for v, _ in radix(e)[1]]  # type: ignore[index]
    axes = [v for v in terms if v in (*numbers.axes, *like.axes)]
    query, key, val = operands
    in_kv = free(key.index) | free(val.index)
    kv, group = [a for a in axes if a.value in in_kv], [a for a in axes if a.value not in in_kv]
    batch, heads = batch_and_heads(kv, group)
    score, weight, *extra = (substitute(p, over_letters({"b": batch, "h": heads})) for p in programs)
    spec, captures, sizes = renumbered(replace(like.spec, weight=weight), [score, *extra], *steps)
    return replace(
        like, final=final, spec=spec, query=query, key=key, value=val, captures=captures, sizes=sizes, kv_axes=kv,
        group_axes=group, out_index=out, draw=None, training=any(m.training for m in steps), reductions=[],
        steps=sum(m.steps for m in steps),
    )  # fmt: skip


def _stacked(found: list[Operand]) -> list[Operand] | None:
    """Return each step's operand as a part of one stack of all, or None if they are stacks of different sizes."""
    count = len(found[0].nodes)
    parts = tuple(n for x in found for n in x.nodes)
    if len(parts) != count * len(found):
        return None
    inner = [(x.index[0], x.index[1:]) if x.parts else (A.ZERO, x.index) for x in found]
    return [
        Operand(parts[0], (A.add(A.const(n * count), first), *rest), parts) for n, (first, rest) in enumerate(inner)
    ]


def _names(m: Match, like: Match) -> dict[Expr, Expr]:
    """Map the axes of a step to the axes of another step."""
    mine = [*m.axes, m.row, m.column, m.width, m.value_width]
    return dict(zip(mine, [*like.axes, like.row, like.column, like.width, like.value_width], strict=True))


def _alike(like: Match, m: Match) -> bool:
    """Return whether two steps have one form, apart from their programs and the places that they read."""
    mine, theirs = like.spec, m.spec
    if len(like.kv_axes) != len(m.kv_axes) or len(like.group_axes) != len(m.group_axes):
        return False
    if any(x.args[0] is not y.args[0] for x, y in _names(m, like).items()):
        return False
    if dims(like.final) != dims(m.final) or len(mine.extra) != len(theirs.extra):
        return False
    if replace(mine, score=theirs.score, weight=theirs.weight, extra=theirs.extra, captures=theirs.captures,
               sizes=theirs.sizes) != theirs:  # fmt: skip
        return False
    taught = dict(zip(like.captures, mine.captures, strict=True))
    return all(taught.get(n) in (None, c) for n, c in zip(m.captures, theirs.captures, strict=True))


def common(finder: Finder, found: list[Operand]) -> list[Operand] | None:
    """Return the operands of all steps, read at the nearest node that all of them come from, or None."""
    if any(x.parts for x in found):
        return None
    ways = [list(_sources(finder, x)) for x in found]
    for node in (x.node for x in ways[0]):
        at = [next((x for x in way if x.node is node), None) for way in ways]
        if all(x is not None for x in at):
            return [x for x in at if x is not None]
    return None


def _sources(finder: Finder, x: Operand) -> Iterator[Operand]:
    for access in accesses(finder.lifter, x.node, x.index):
        if access.factor is UNIT and value(access.node).dtype == value(x.node).dtype:
            yield Operand(access.node, access.index)
