"""Merge attentions that each compute a part of one result into one attention.

    cat([softmax(q[:, :, i : i + c] @ k.mT) @ v for i in range(0, T, c)], 2)       chunks of queries
    stack([softmax(q[:, h] @ k[:, h].mT) @ v[:, h] for h in range(H)], 1)          steps of a loop

Each part is matched as a site of its own. `merge` then looks for one general form of their indices and programs over an
axis of all parts. Chunks have an axis of all rows, and a chunk's first row is added to i. In a loop over heads or batch
elements, an index that is h or h // g in step h becomes the new axis, and so do the parts of masks and biases that
follow from it.

The proof substitutes each part's place for the axis: the part's own indices and programs must come out. Expressions are
in a normal form, so equal ones are identical. A chunk may leave out keys that its mask covers. Operands that each step
computes for itself (a projection for each head) are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from attnfx import spec as S
from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import INT, Expr, walk
from attnfx.passes.fx.nodes import CATS, Opaque, dims, op_name, parts, value
from attnfx.passes.lift.access import UNIT, Operand, apply_splits, flat, free, needed_splits, radix
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.parts import common
from attnfx.passes.lift.tables import VIEWS, Index
from attnfx.passes.match.matcher import Finder
from attnfx.passes.match.results import Finding, Match
from attnfx.passes.match.spec_builder import batch_and_heads
from attnfx.passes.match.weight_reductions import names_its_length, of_nodes, over_letters, renumbered
from attnfx.passes.match.weight_uses import drawn_for_others
from attnfx.spec import fill_of

STACKS = (*CATS, "stack")


def merge(finder: Finder, findings: list[Finding]) -> list[Finding]:
    """Return the findings, with one finding in place of all that are parts of one attention."""
    of_final = {f.final: (f, f.match) for f in findings if f.match is not None}
    for n in list(finder.gm.graph.nodes):
        given, dim = parts(n, STACKS) or ([], 0)
        found = [x for part in given if (x := _part(part, of_final)) is not None]
        gone = [f for f, _ in found]
        if not given or len(set(gone)) != len(given) or any(f.match and drawn_for_others(f.match) for f in gone):
            continue
        merged = _merged(finder, n, dim, [m for _, m in found])
        if merged is not None:
            merged.anchors = [a for f in gone for a in f.anchors]
            one = Finding(n, match=merged, anchors=merged.anchors)
            of_final[n] = one, merged
            findings = [one if f is gone[0] else f for f in findings if f is gone[0] or f not in gone]
    return findings


def _part(part: Node, of_final: dict[Node, tuple[Finding, Match]]) -> tuple[Finding, Match] | None:
    """Return the finding whose result a node is a view of, and its match as one that ends with this view. None if there
    is no such finding, or if the view leaves something out."""
    own = index = tuple(A.var(f"p{d}", n) for d, n in enumerate(dims(part)))
    at = part
    while at not in of_final:
        if op_name(at) not in VIEWS or len(at.users) != 1:
            return None
        try:
            at, index = VIEWS[op_name(at)](at, index)
        except Opaque:
            return None
    finding, match = of_final[at]
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
    if any(str(v.value) in e.free for e in made for v in known):
        return None
    return finding, replace(match, final=part, out_index=made)


Form = list[Index]  # the index of the result, the programs, then the indices of query, key and value


@dataclass(frozen=True)
class Joined:
    """Attentions that `final` joins along dimension `dim`.

    starts     the places in this dimension where the parts begin
    operands   for query, key and value: the operand of each part
    """

    final: Node
    dim: int
    matches: list[Match]
    starts: list[Expr]
    operands: list[list[Operand]]

    @property
    def stacked(self) -> bool:
        return op_name(self.final) == "stack"

    def form(self, n: int, like: Match, by: dict[Expr, Expr]) -> Form:
        """Return the form of part n over the axes of `like`, with the replacements `by`."""
        m = self.matches[n]
        by = dict(zip(_inner(m), _inner(like), strict=True)) | by
        if self.stacked:
            out = [*m.out_index[: self.dim], self.starts[n], *m.out_index[self.dim :]]
        else:
            out = [A.add(self.starts[n], e) if d == self.dim else e for d, e in enumerate(m.out_index)]
        programs = [of_nodes(p, m) for p in m.spec.programs]
        return _replaced([out, programs, *(found[n].index for found in self.operands)], by)

    def whole(self, like: Match, general: Form, **changes: object) -> Match:
        """Return the match of all parts, which has a form over b, h, i and j and is otherwise as `like`."""
        out, (score, weight, *extra), *indices = general
        operands = tuple(replace(x[0], index=index) for x, index in zip(self.operands, indices, strict=True))
        spec, captures, sizes = renumbered(replace(like.spec, weight=weight), [score, *extra], *self.matches)
        return replace(
            like, final=self.final, spec=spec, operands=operands, captures=captures, sizes=sizes, out_index=out,
            draw=None, training=any(m.training for m in self.matches), reductions=[], **changes,
        )  # fmt: skip


def _inner(m: Match) -> list[Expr]:
    return [*m.axes, m.width, m.value_width]


def _replaced(form: Sequence[Sequence[Expr]], by: dict[Expr, Expr]) -> Form:
    return [tuple(substitute(e, by) for e in index) for index in form]


def _merged(finder: Finder, final: Node, dim: int, matches: list[Match]) -> Match | None:
    facts = finder.facts
    if any(facts.regions[m.final][0] != facts.regions[final][0] for m in matches) or not _alike(matches):
        return None
    of_role = zip(*(m.operands for m in matches), strict=True)
    operands = [found for each in of_role if (found := _together(finder.lifter, each)) is not None]
    if len(operands) != len(matches[0].operands):
        return None
    read = [*(n for found in operands for x in found for n in x.nodes), *(c for m in matches for c in m.captures)]
    if any(x in facts.written for x in read):
        return None  # two parts may have read different values
    starts = [A.ZERO]
    for m in matches:
        starts.append(A.add(starts[-1], A.ONE if op_name(final) == "stack" else dims(m.final)[dim]))
    given = Joined(final, dim, matches, starts[:-1], operands)
    return _of_chunks(given) or _of_steps(given)


def _alike(matches: list[Match]) -> bool:
    """Return whether the parts have one form, apart from their programs, their places and their rows and keys."""
    like, captures = matches[0], dict[Node, S.Capture]()
    for m in matches:
        mine, theirs = like.spec, m.spec
        if len(like.kv_axes) != len(m.kv_axes) or len(like.group_axes) != len(m.group_axes):
            return False
        if any(x.args[0] is not y.args[0] for x, y in zip(_inner(like), _inner(m), strict=True)):
            return False
        if replace(mine, score=theirs.score, weight=theirs.weight, extra=theirs.extra, captures=theirs.captures,
                   sizes=theirs.sizes) != theirs or len(mine.extra) != len(theirs.extra):  # fmt: skip
            return False
        if any(captures.setdefault(n, c) != c for n, c in zip(m.captures, theirs.captures, strict=True)):
            return False
    return True


def _together(lifter: Lifter, found: Sequence[Operand]) -> list[Operand] | None:
    """Return the parts' operands as read at the nearest node that all come from, else in one stack of all. None if they
    are of different sizes."""
    read = None if any(x.parts for x in found) else common(lifter, found)
    if read is not None and read[0].factor is UNIT and not read[0].upcast:
        return [Operand(x.node, x.index) for x in read]
    nodes = tuple(n for x in found for n in x.nodes)
    count = len(found[0].nodes)
    if len(nodes) != count * len(found) or len({(dims(n), value(n).dtype) for n in nodes}) > 1:
        return None
    inner = [(x.index[0], x.index[1:]) if x.parts else (A.ZERO, x.index) for x in found]
    return [
        Operand(nodes[0], (A.add(A.const(n * count), first), *rest), nodes) for n, (first, rest) in enumerate(inner)
    ]


# -- chunks of queries ----------------------------------------------------------------------------
def _of_chunks(given: Joined) -> Match | None:
    """Return the match of all rows if the parts are chunks of queries, else None."""
    matches, dim = given.matches, given.dim
    if given.stacked or any(m.out_index[dim] is not m.row and m.row.args[0] is not A.ONE for m in matches):
        return None
    row = A.var(f"rows_{given.final.name}", dims(given.final)[dim])
    # a chunk's program may lack terms that do not matter in it, as a window in the first rows
    for n in dict.fromkeys((0, len(matches) // 2, len(matches) - 1)):
        like, start = matches[n], given.starts[n]
        if like.row.args[0] is A.ONE or (n and start.op != "const"):
            continue
        if any(names_its_length(p) for p in like.spec.programs):
            continue
        general = given.form(n, like, {like.row: A.sub(row, start), S.I: A.sub(S.I, start)})
        if all(_is_chunk(given, m, like, general, row) for m in range(len(matches))):
            return given.whole(like, general, row=row, chunks=len(matches))
    return None


def _is_chunk(given: Joined, n: int, like: Match, general: Form, row: Expr) -> bool:
    """Return whether part n is the rows of the general form that it computes in the result."""
    m = given.matches[n]
    # over the rows and keys of the part: equal expressions need variables of equal range
    here = A.ZERO if m.row.args[0] is A.ONE else A.var("row", m.row.args[0])
    there, column = A.add(given.starts[n], here), A.var("column", m.column.args[0])
    if m.column.args[0] is not like.column.args[0] and not _dead_beyond(like, general, there, m.column.args[0]):
        return False
    own = given.form(n, like, {m.row: here, m.column: column, S.I: here, S.J: column})
    return own == _replaced(general, {row: there, like.column: column, S.I: there, S.J: column})


def _dead_beyond(like: Match, general: Form, row: Expr, count: Expr) -> bool:
    """Return whether the rows give weight to the first `count` keys only, so that a chunk may leave the others out: the
    mask of -inf is proved to cover them."""
    score, more = general[1][0], A.sub(like.column.args[0], count)
    if more.op != "const" or int(more.value) <= 0:  # type: ignore[call-overload]
        return False
    if like.spec.normaliser != "softmax" or like.spec.weight is not A.PROB or fill_of(score) != -math.inf:
        return False
    keep = substitute(score.args[0], {S.I: row, S.J: A.add(A.var("beyond", more), count)})
    return keep.op == "const" and not keep.value


# -- steps of a loop over heads or batch elements -------------------------------------------------
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


def _of_steps(given: Joined) -> Match | None:
    """Return the match of all steps if the parts are steps of a loop, else None."""
    matches, like = given.matches, given.matches[0]
    if any(m.row.args[0] is not like.row.args[0] or m.column.args[0] is not like.column.args[0] for m in matches):
        return None
    letters = {S.B: flat(like.letters["b"]), S.H: flat(like.letters["h"])}
    forms = [given.form(n, like, {m.row: like.row, m.column: like.column, **letters}) for n, m in enumerate(matches)]
    for numbers in numberings(f"step_{given.final.name}", len(matches)):
        try:
            general = [tuple(numbers.general(x) for x in zip(*of, strict=True)) for of in zip(*forms, strict=True)]
        except (Different, ValueError):
            continue
        out, programs, *indices = general
        found = [radix(e) for index in (out, *indices) for e in index]
        if any(x is None for x in found):
            continue
        # the axes are in the order of the result's dimensions
        terms = [v for x in found[: len(out)] for v, _ in x[1]]  # type: ignore[index]
        axes = [v for v in terms if v in (*numbers.axes, *like.axes)]
        in_kv = free(indices[1]) | free(indices[2])
        kv, group = [a for a in axes if a.value in in_kv], [a for a in axes if a.value not in in_kv]
        batch, heads = batch_and_heads(kv, group)
        general[1] = tuple(substitute(p, over_letters({"b": batch, "h": heads})) for p in programs)
        return given.whole(like, general, kv_axes=kv, group_axes=group, steps=sum(m.steps for m in matches))
    return None
