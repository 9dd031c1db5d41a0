"""Find reductions of an attention's weights that can be computed without materializing the weights.

A model that returns the weight each key received, or the mean over the heads, does not need the weights: these are
sums, which an operator computes again. The same holds for some of the rows (the class token's), which are the weights
of some of the queries. It also holds for the largest weight of each row and its key, or of each key and its row. The
attention itself computes the logarithm of the sum of the scores' exponentials, which a loss may penalize.
`find_reductions` reads them off the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from attnfx import spec as S
from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.exponentials import ZERO, Term, addends, summed, without_zeros
from attnfx.ir.expr import Expr, walk
from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import seeds_of
from attnfx.passes.fx.nodes import Opaque, arguments, dims, is_tensor, op_name, value
from attnfx.passes.lift.access import extent, flat, unflatten, variables
from attnfx.passes.lift.tables import VIEWS, Index
from attnfx.passes.match import softmax as N
from attnfx.passes.match.matcher import Finder, over_dot
from attnfx.passes.match.results import Match, Reduction
from attnfx.passes.match.spec_builder import Parts, Reading, Refused, batch_and_heads
from attnfx.passes.match.weight_uses import read_beside
from attnfx.spec import AttentionSpec

KINDS = {  # operator -> kind of reduction that it may be
    "sum": "sum", "mean": "sum", "select": "rows", "slice": "rows", "narrow": "rows", "argmax": "argmax", "amax": "max",
    "logsumexp": "logsumexp", "log": "logsumexp",
}  # fmt: skip


def _asked(n: Node) -> tuple[Node, str] | None:
    """Return (weights, kind of reduction) if a node may reduce weights, else None. For the logarithm of a sum, return
    the scores, as nearly as the node itself shows them."""
    if n.op != "call_function" or not is_tensor(n):
        return None
    name, source = op_name(n), n.args[0] if n.args else None
    kind = KINDS.get(name)
    if name == "add":  # a row maximum that was subtracted comes back
        source, kind = next((x for x in n.all_input_nodes if op_name(x) == "log"), None), "logsumexp"
    if name == "getitem" and isinstance(source, Node) and op_name(source) == "max" and len(source.args) > 1:
        source, kind = source.args[0], ("max", "argmax")[n.args[1]]  # type: ignore[index]
    return (source, kind) if kind is not None and is_tensor(source) else None  # type: ignore[return-value]


def find_reductions(finder: Finder, matches: Iterable[Match]) -> None:
    """Fill in `reductions` of each match; split its batch axes if a sum splits one."""
    matches = list(matches)
    ends = {match.final for match in matches}
    of: dict[Node, dict[Match, None]] = {}  # normalizer or product before it -> its matches
    for match in matches:
        for anchor in match.anchors:
            for n in (anchor, *seeds_of(finder.descent.scores, anchor)):
                of.setdefault(n, {})[match] = None
    asked: dict[Match, list[tuple[Node, Node, str]]] = {}  # (node, weights, kind of reduction)
    for n in finder.gm.graph.nodes if of else ():
        if (found := _asked(n)) is None:
            continue
        weights, kind = found
        starts = finder.descent.anyhow if kind == "logsumexp" else finder.descent.weights
        for match in {m: None for s in starts.get(weights, ()) for m in of.get(s, ())}:
            if kind != "logsumexp" or read_beside([n], ends):  # else only the attention's own softmax reads it
                asked.setdefault(match, []).append((n, weights, kind))
    for match, these in asked.items():
        for one in these:
            if found := _same_weights(finder, match, *one):
                _split(match, found[1])
        read = [(one, found) for one in these if (found := _same_weights(finder, match, *one))]
        made = [_reduction(match, *one, *found) for one, found in read]
        match.reductions = [r for r in made if r is not None]


def _same_weights(finder: Finder, match: Match, final: Node, weights: Node, kind: str) -> tuple[Reading, Common] | None:
    """Return the reading of the node's operand if it is a function of the weights of the match, else None."""
    facts = finder.facts
    held = value(final) if kind in ("sum", "logsumexp") else value(weights)
    if torch.finfo(held.dtype).bits > torch.finfo(getattr(torch, match.spec.compute)).bits:
        return None  # requested in a wider dtype than the weights have
    if facts.regions[final] != facts.regions[match.final]:
        return None
    if op_name(final) == "amax" and final in facts.differentiable:
        return None  # its gradient is shared between equal weights
    read = final if kind == "logsumexp" else weights
    dimensions = variables(read)
    try:
        lifted = finder.lifter.lift(read, dimensions)
    except Opaque:
        return None
    ways = _exponentials(lifted, final, match) if kind == "logsumexp" else _softmaxes(lifted, dimensions)
    for way, j in ways:
        at = tuple(dict.fromkeys((*dimensions, j)))
        if found := _same_scores(finder, match, final, at, way, j):
            sources = [*match.read, *found[0].captures]  # all that the attention needs
            return found if all(x < final for x in sources) else None
    return None


def _softmaxes(lifted: Expr, dimensions: Index) -> Iterator[tuple[N.Normalised, Expr]]:
    """Yield (the softmax of the weights, the key), for each dimension that may be the keys'."""
    for j in reversed(dimensions):
        try:
            yield N.normalise(lifted, j), j
        except N.NotNormalised:
            continue


def _exponentials(lifted: Expr, final: Node, match: Match) -> Iterator[tuple[N.Normalised, Expr]]:
    """Yield (the softmax of the scores x, the key) if `final` is log(sum(exp(x))), for the weights of a match. t +
    log(sum(exp(x))) counts as log(sum(exp(x + t))), if each row provably has a score other than -inf."""
    logs = [t for t in addends(lifted) if t.op == "log" and t.args[0].op == "rsum"]
    found = summed(Term(ZERO, logs[0].args[0])) if len(logs) == 1 else None
    if found is None:
        return
    variable, score = found
    j = A.var(f"keys_{final.name}", variable.args[0])
    score = substitute(score, {variable: j})
    if more := [t for t in addends(lifted) if t is not logs[0]]:
        if any(c.kind == "f" for c in match.spec.captures) or not match.every_row_live:
            return  # subtracting a row maximum of -inf gives NaN
        score = without_zeros(A.add(score, *more))
    yield N.Normalised(score, A.PROB, safe=match.spec.safe), j


def _reduction(
    match: Match, final: Node, weights: Node, kind: str, reading: Reading, common: Common
) -> Reduction | None:
    axes = {letter: [v for a in of for v in common.made_of[a]] for letter, of in match.letters.items()}
    programs = [of_nodes(p, match) for p in (match.spec.score, *match.spec.extra)]
    weight = substitute(over_axes(reading.spec.weight, reading, common.ours), over_letters(axes))
    index = [substitute(x, common.ours) for x in reading.out_index]
    count, start, over = None, 0, "j"
    if kind == "logsumexp":
        return Reduction(final, match.spec, [], [], axes, tuple(index[:-1]), kind=kind)
    dimensions = variables(weights)
    if kind == "sum":
        asked = arguments(final).get("dim")
        asked = [asked] if isinstance(asked, int) else asked
        gone = {d % len(dimensions) for d in asked} if asked else set(range(len(dimensions)))  # type: ignore[union-attr]
        kept = [x for d, x in enumerate(index) if d not in gone]
        if op_name(final) == "mean":
            count = A.mul(A.ONE, *(dimensions[d].args[0] for d in sorted(gone)))
    elif reading.spec.dropout:
        return None  # the dropout mask depends on how the rows are cut
    elif kind == "rows":
        found = _some_rows(match, final, weights, index)
        if found is None or any(names_its_length(p) for p in (*programs, weight)):
            return None
        start, row = found
        kept = [substitute(x, {match.row: row}) for x in index]
        axes["i"] = [row]
        *programs, weight = (substitute(p, {S.I: A.add(S.I, A.const(start))}) for p in (*programs, weight))
    else:
        at = final.args[0] if op_name(final) == "getitem" else final
        dim = arguments(at)["dim"]  # type: ignore[arg-type]
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        plain = match.spec.normaliser == "softmax" and weight is A.PROB
        if not isinstance(dim, int) or not plain or index[dim] not in (match.column, match.row):
            return None
        over = "j" if index[dim] is match.column else "i"
        if op_name(final) == "amax" and over == "j":
            return None  # a region of whole rows computes it
        kept = [x for x in index if x is not index[dim]]
    draft = replace(match.spec, weight=weight, dropout=reading.spec.dropout, out_dtype=match.spec.compute)
    spec, captures, sizes = renumbered(draft, programs, match, reading)
    return Reduction(final, spec, captures, sizes, axes, tuple(kept), count, kind, start, over)


def _some_rows(match: Match, final: Node, weights: Node, index: list[Expr]) -> tuple[int, Expr] | None:
    """Return (the first row, the rows' variable) if a node takes a constant range of the weights' rows, else None."""
    n = match.row.args[0]
    out = variables(final)
    try:
        source, at = VIEWS[op_name(final)](final, out)
    except Opaque:
        return None
    changed = [d for d, (x, size) in enumerate(zip(at, dims(weights), strict=True))
               if x.op != "var" or x.args[0] is not size]  # fmt: skip
    if source is not weights or len(changed) != 1 or index[changed[0]] is not match.row or n.op != "const":
        return None
    place = at[changed[0]]
    row = next((v for v in out if v.value in place.free), None)
    start, count = (place, A.ONE) if row is None else (A.sub(place, row), row.args[0])
    if start.op != "const" or count.op != "const" or 2 * int(count.value) > int(n.value):  # type: ignore[call-overload]
        return None  # more than half of the weights are materialized anyway
    return int(start.value), A.var(f"rows_{final.name}", count)  # type: ignore[call-overload]


def names_its_length(program: Expr) -> bool:
    """Return whether a program uses the number of rows, which differs for some of the rows."""
    return any(e.op == "size" and e.value == "T" for e in reach([program], lambda e: e.args if e.op != "var" else ()))


def _split(match: Match, common: Common) -> None:
    """Split the match's batch axes in the way that a sum splits them."""
    if all(len(of) == 1 for of in common.made_of.values()):
        return
    theirs = common.theirs
    score, weight, *extra = (
        over_axes(p, match, theirs) for p in (match.spec.score, match.spec.weight, *match.spec.extra)
    )
    at = (tuple(substitute(x, theirs) for x in operand.index) for operand in match.operands)
    match.operands = tuple(replace(operand, index=index) for operand, index in zip(match.operands, at))
    match.out_index = tuple(substitute(x, theirs) for x in match.out_index)
    match.kv_axes = [v for a in match.kv_axes for v in common.made_of[a]]
    match.group_axes = [v for a in match.group_axes for v in common.made_of[a]]
    by = over_letters(match.letters)
    draft = replace(match.spec, weight=substitute(weight, by))
    named = [substitute(p, by) for p in (score, *extra)]
    match.spec, match.captures, match.sizes = renumbered(draft, named, match)


def over_letters(axes: dict[str, list[Expr]]) -> dict[Expr, Expr]:
    """Map each batch axis to its expression over b and h."""
    by: dict[Expr, Expr] = {}
    unflatten(by, axes["b"], S.B)
    unflatten(by, axes["h"], S.H)
    return by


def renumbered(
    draft: AttentionSpec, named: list[Expr], *sources: Reading
) -> tuple[AttentionSpec, list[Node], list[str]]:
    """Return the spec with another score and extra logits. All its programs load nodes of the graph; `sources` have the
    captures of these."""
    captures = {n: c for x in sources for n, c in zip(x.captures, x.spec.captures, strict=True)}
    used = {e.value for p in (*named, draft.weight) for e in walk(p) if e.op == "load"}
    held = tuple((n, c) for n, c in captures.items() if n in used)
    return S.canonical(replace(draft, score=named[0], extra=tuple(named[1:]), captures=held, sizes=()))  # type: ignore[return-value,arg-type]


def _same_scores(
    finder: Finder, match: Match, final: Node, dimensions: Index, found: N.Normalised, j: Expr
) -> tuple[Reading, Common] | None:
    """Return the reading of the weights with j as the key if their softmax is the match's, else None."""
    if j.args[0] is not match.column.args[0]:
        return None
    try:
        if found.dropout and found.draw != match.draw:
            return None
        out = tuple(x for x in dimensions if x is not j)
        for load, dot in finder.products(final, found.score, j):
            row = finder.row(found.score, load, dot, j, out, frozenset())
            whole, pairs = over_dot(found, load, dot), ((dot.left, dot.left_index), (dot.right, dot.right_index))
            parts = Parts(final, dimensions, row, j, dot.reduced, None, pairs, whole, dot.node)
            reading = finder.reader.read(parts, tuple(x.node for x in match.operands[:2]))
            common = _common(match, reading, parts)
            if common is not None and _agrees(match, reading, common):
                return reading, common
    except (Opaque, N.NotNormalised, Refused):
        pass
    return None


@dataclass(frozen=True)
class Common:
    """The common axes of the match and of the reading of a sum, if one splits an axis that the other has whole.

    ours      axis of the reading -> expression over the common axes
    made_of   axis of the match -> the common axes that it consists of
    """

    ours: dict[Expr, Expr]
    made_of: dict[Expr, list[Expr]]

    @property
    def theirs(self) -> dict[Expr, Expr]:
        """Map each axis of the match to its expression over the common axes."""
        return {a: flat(of) for a, of in self.made_of.items()}


def _common(match: Match, reading: Reading, parts: Parts) -> Common | None:
    ours, theirs = reading.axes, match.axes
    inner = list(zip((parts.row, parts.column, parts.width), (match.row, match.column, match.width), strict=True))
    if any(x.args[0] is not y.args[0] for x, y in inner):
        return None
    by_ours, made_of = dict(inner), {y: [y] for _, y in inner}
    while ours and theirs:
        x, y = _least(ours, theirs)
        if not x:
            return None
        if len(x) == 1:
            by_ours[x[0]] = flat(y)
            made_of.update({a: [a] for a in y})
        else:
            by_ours.update({a: a for a in x})
            made_of[y[0]] = x
        ours, theirs = ours[len(x) :], theirs[len(y) :]
    return None if ours or theirs else Common(by_ours, made_of)


def _least(ours: list[Expr], theirs: list[Expr]) -> tuple[list[Expr], list[Expr]]:
    """Return the shortest prefixes of both that have the same extent, one of them a single axis."""
    for n in range(1, max(len(ours), len(theirs)) + 1):
        for x, y in ((ours[:n], theirs[:1]), (ours[:1], theirs[:n])):
            if extent(x) is extent(y):
                return x, y
    return [], []


def _agrees(match: Match, reading: Reading, common: Common) -> bool:
    """Return whether the two are one softmax of one score of the same operands."""
    for mine, other in zip(reading.operands, match.operands[:2], strict=True):
        if [substitute(x, common.ours) for x in mine.index] != [substitute(x, common.theirs) for x in other.index]:
            return False
    ours, theirs = reading.spec, match.spec
    if (ours.normaliser, ours.safe, ours.compute) != (theirs.normaliser, theirs.safe, theirs.compute):
        return False
    if ours.dropout and ours.dropout != theirs.dropout:
        return False
    mine = [over_axes(x, reading, common.ours) for x in (ours.score, *ours.extra)]
    other = [over_axes(x, match, common.theirs) for x in (theirs.score, *theirs.extra)]
    if mine == other:
        return True
    # if the match treats an added fill as replacing the score, so may the reading
    return [A.in_place(x) for x in mine] == other and (not match.training or match.every_row_live)


def over_axes(program: Expr, source: Reading, to_common: dict[Expr, Expr]) -> Expr:
    """Return a program over the common axes, with the captures and sizes of the graph again."""
    batch, heads = batch_and_heads(source.kv_axes, source.group_axes)
    by = {S.B: flat(batch), S.H: flat(heads)}
    return substitute(substitute(of_nodes(program, source), by), to_common)


def of_nodes(program: Expr, source: Reading) -> Expr:
    names = dict(zip(source.spec.sizes, source.sizes, strict=True))

    def change(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if old.op == "load":
            return A.load(source.captures[old.value], args, old.kind)  # type: ignore[call-overload]
        if old.op == "size" and old.value in names:
            return A.size(names[str(old.value)])
        return None

    return rebuild(program, change)
