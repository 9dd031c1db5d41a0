"""Merge an attention that a loop computed in chunks of queries into one attention.

    cat([softmax(q[:, :, i : i + c] @ k.mT) @ v for i in range(0, T, c)], 2)

Each chunk is matched as a site of its own. `merge` then makes one match of the chunks if they are proved to be parts of
one attention. They must have the same keys and values, and read consecutive queries of one tensor. They must have one
program, in which the chunk's first row is added to i. A chunk may leave out keys that its mask covers. The proof
substitutes i + first row into one chunk's indices and programs, and compares with the other chunk's: expressions are in
a normal form, so equal ones are identical.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch.fx import Node

from attnfx import spec as S
from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import Expr
from attnfx.passes.fx.nodes import CATS, dims, op_name, parts
from attnfx.passes.lift.access import Operand
from attnfx.passes.lift.tables import VIEWS, Index
from attnfx.passes.match.matcher import Finder
from attnfx.passes.match.merge_head_loops import common, out_index, roll
from attnfx.passes.match.results import Finding, Match
from attnfx.passes.match.weight_reductions import names_its_length, of_nodes
from attnfx.passes.match.weight_uses import drawn_for_others
from attnfx.spec import fill_of

STACKS = (*CATS, "stack")


def merge(finder: Finder, findings: list[Finding]) -> list[Finding]:
    """Return the findings, with one finding in place of all that are parts of one attention."""
    of_final = {f.final: f for f in findings if f.match is not None}
    for n in list(finder.gm.graph.nodes):
        joined = parts(n, STACKS)
        found = [_of(x, of_final) for x in joined[0]] if joined is not None else []
        seen = [_as(f.match, x) for f, x in zip(found, joined[0], strict=True) if f and f.match] if joined else []
        chunks = [m for m in seen if m is not None]
        if joined is None or len(chunks) != len(joined[0]) or len(set(found)) != len(found):
            continue
        if any(drawn_for_others(f.match) for f in found if f and f.match):
            continue
        stacked = op_name(n) == "stack"
        merged = None if stacked else _merged(finder, n, joined[1], chunks)
        merged = merged or roll(finder, n, joined[1], stacked, chunks)
        if merged is not None:
            gone = [f for f in found if f is not None]
            merged.anchors = [a for f in gone for a in f.anchors]
            one = of_final[n] = Finding(n, match=merged, anchors=merged.anchors)
            findings = [one if f is gone[0] else f for f in findings if f is gone[0] or f not in gone]
    return findings


def _of(part: Node, of_final: dict[Node, Finding]) -> Finding | None:
    """Return the finding whose result a node is, or is a view of."""
    while part not in of_final and op_name(part) in VIEWS and len(part.users) == 1:
        part = part.args[0]  # type: ignore[assignment]
    return of_final.get(part)


def _as(match: Match, part: Node) -> Match | None:
    """Return the match as one that ends with a view of its result, or None if the view leaves something out."""
    index = match.out_index if part is match.final else out_index(part, match)
    if index is None:
        return None
    index = tuple(A.ZERO if n is A.ONE else e for e, n in zip(index, dims(part), strict=True))
    return replace(match, final=part, out_index=index)


def _merged(finder: Finder, final: Node, dim: int, chunks: list[Match]) -> Match | None:
    facts = finder.facts
    if any(facts.regions[m.final][0] != facts.regions[final][0] for m in chunks):
        return None  # some chunks have another grad mode
    if any(m.out_index[dim] is not m.row and m.row.args[0] is not A.ONE for m in chunks):
        return None
    operands: list[list[Operand]] = []
    for name in ("query", "key", "value"):
        found = common(finder, [getattr(m, name) for m in chunks])
        if found is None:
            return None
        operands.append(found)
    read = [*(x[0].node for x in operands), *(c for m in chunks for c in m.captures)]
    if any(x in facts.written for x in read):
        return None  # two chunks may have read different values
    starts = [A.ZERO]
    for match in chunks:
        starts.append(A.add(starts[-1], match.row.args[0]))
    if starts.pop() is not dims(final)[dim]:
        return None
    # a chunk's program may lack terms that do not matter in it, as a window in the first rows
    for n in dict.fromkeys((0, len(chunks) // 2, len(chunks) - 1)):
        like, at = chunks[n], [x[n] for x in operands]
        if like.row.args[0] is A.ONE or (n and starts[n].op != "const"):
            continue
        if any(names_its_length(p) for p in like.spec.programs):
            continue
        others = zip(chunks, zip(*operands, strict=True), starts, strict=True)
        if all(_continues(like, m, at, list(x), A.sub(start, starts[n]), dim) for m, x, start in others):
            return _whole(like, at, starts[n], final, dim, chunks)
    return None


def _whole(like: Match, operands: list[Operand], start: Expr, final: Node, dim: int, chunks: list[Match]) -> Match:
    """Return the match of all rows, from a chunk whose first row is `start`."""
    row = A.var(f"rows_{final.name}", dims(final)[dim])
    here = {like.row: A.sub(row, start)}
    query, key, val = (replace(x, index=tuple(substitute(e, here) for e in x.index)) for x in operands)
    out = tuple(substitute(e, {like.row: row}) for e in like.out_index)
    spec = like.spec
    if start is not A.ZERO:
        score, weight, *extra = (substitute(p, {S.I: A.sub(S.I, start)}) for p in spec.programs)
        spec = replace(spec, score=score, weight=weight, extra=tuple(extra))
    return replace(
        like, final=final, spec=spec, query=query, key=key, value=val, out_index=out, row=row, draw=None,
        training=any(m.training for m in chunks), reductions=[], chunks=len(chunks),
    )  # fmt: skip


def _continues(
    like: Match, other: Match, operands: list[Operand], others: list[Operand], start: Expr, dim: int
) -> bool:
    """Return whether `other` is `like`, moved on by `start` rows."""
    mine, theirs = like.spec, other.spec
    if len(like.kv_axes) != len(other.kv_axes) or len(like.group_axes) != len(other.group_axes):
        return False
    if replace(mine, score=theirs.score, weight=theirs.weight, extra=theirs.extra, captures=theirs.captures,
               sizes=theirs.sizes) != theirs or len(mine.extra) != len(theirs.extra):  # fmt: skip
        return False
    taught = dict(zip(like.captures, mine.captures, strict=True))
    if any(taught.get(n) not in (None, c) for n, c in zip(other.captures, theirs.captures, strict=True)):
        return False
    inner = [(other.width, like.width), (other.value_width, like.value_width)]
    pairs = [*inner, *zip(other.axes, like.axes, strict=True)]
    if any(x.args[0] is not y.args[0] for x, y in pairs):
        return False
    # over the rows and keys of the other chunk: equal expressions need variables of equal range
    row = A.ZERO if other.row.args[0] is A.ONE else A.var("row", other.row.args[0])
    column = A.var("column", other.column.args[0])
    there, here = A.add(row, start), dict(pairs) | {other.row: row, other.column: column}
    if other.column.args[0] is not like.column.args[0] and not _dead_beyond(like, there, other.column.args[0]):
        return False

    def same(x: Index, y: Index) -> bool:
        moved = {like.row: there, like.column: column}
        return tuple(substitute(e, moved) for e in x) == tuple(substitute(e, here) for e in y)

    outs = [[e for d, e in enumerate(index) if d != dim] for index in (like.out_index, other.out_index)]
    if not same(tuple(outs[0]), tuple(outs[1])):
        return False
    if not all(same(x.index, y.index) for x, y in zip(operands, others, strict=True)):
        return False
    ours, own = {S.I: there, S.J: column}, {S.I: row, S.J: column}
    programs = zip(mine.programs, theirs.programs, strict=True)
    return all(substitute(of_nodes(x, like), ours) == substitute(of_nodes(y, other), own) for x, y in programs)


def _dead_beyond(like: Match, row: Expr, count: Expr) -> bool:
    """Return whether the rows give weight to the first `count` keys only, so that a chunk may leave the others out: the
    mask of -inf is proved to cover them."""
    spec, more = like.spec, A.sub(like.column.args[0], count)
    if more.op != "const" or int(more.value) <= 0:  # type: ignore[call-overload]
        return False
    if spec.normaliser != "softmax" or spec.weight is not A.PROB or fill_of(spec.score) != -math.inf:
        return False
    beyond = A.add(A.var("beyond", more), count)
    keep = substitute(of_nodes(spec.score.args[0], like), {S.I: row, S.J: beyond})
    return keep.op == "const" and not keep.value
