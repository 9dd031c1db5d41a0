"""Lift gathers, concatenations and writes into a part: several sources, or a computed index."""

from __future__ import annotations

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.expr import INT, Expr
from attnfx.passes.fx.nodes import Opaque, argument, axis, dims, is_tensor, op_name, shape, value
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.tables import INDEXING, VIEWS, Index, rule
from attnfx.passes.lift.views import source, whole


@rule(INDEXING, "cat", "concat", "concatenate")
def _cat(lifter: Lifter, at: Node, index: Index) -> Expr:
    parts = [p for p in at.args[0] if len(shape(p)) == len(index)]  # type: ignore[union-attr,arg-type]
    dim = int(argument(at, 1, "dim", 0)) % len(index)  # type: ignore[arg-type]
    out: Expr | None = None
    starts = [A.ZERO]
    for p in parts:
        starts.append(A.add(starts[-1], dims(p)[dim]))
    for p, start in reversed(list(zip(parts, starts, strict=False))):
        piece = lifter.lift(p, (*index[:dim], A.sub(index[dim], start), *index[dim + 1 :]))
        end = A.add(start, dims(p)[dim])
        inside = A.lt(index[dim], end)
        if A.lt(index[dim], start) is A.TRUE:
            continue
        out = piece if out is None else A.where(inside, piece, out)
    if out is None:
        raise Opaque
    return out


@rule(INDEXING, "slice_scatter", "select_scatter", "diagonal_scatter")
def _scatter(lifter: Lifter, at: Node, index: Index) -> Expr:
    """Read what a write through a view leaves: the written part at the places that the view reads."""
    part = at.args[1]
    if not is_tensor(part):
        raise Opaque
    own = tuple(A.var(f"w{m}_{at.name}", n) for m, n in enumerate(dims(part)))  # type: ignore[arg-type]
    x, places = VIEWS[op_name(at).removesuffix("_scatter")](at, own)
    alone = [e in own and sum(e.value in p.free for p in places) == 1 for e in places]
    whole = [one and e.args[0] is n for one, e, n in zip(alone, places, dims(x), strict=True)]
    solved, here = _inverse({d: e for d, e in enumerate(places) if not whole[d]}, own, index)
    solved |= {e: index[d] for d, e in enumerate(places) if whole[d]}
    before = lifter.lift(x, index)
    if tuple(A.substitute(e, solved) for e in places) == index:
        written = lifter.lift(part, tuple(solved[k] for k in own))  # type: ignore[arg-type]
    else:  # a part that is computed from the values at its places reads each of them where it is written
        lifter.memo[x, places, lifter.exact] = before
        written = A.substitute(lifter.lift(part, own), solved)  # type: ignore[arg-type]
    return A.where(here, written, before)


def _inverse(places: dict[int, Expr], own: Index, index: Index) -> tuple[dict[Expr, Expr], Expr]:
    """Solve places[d] = index[d] for the variables of `own` in the places, which must be affine in one of them. Return
    the solution, and the condition under which it solves all equations and lies within the variables' sizes."""
    solved = {k: A.ZERO for k in own if k.args[0] is A.ONE}
    used = [k for k in own if any(k.value in e.free for e in places.values())]
    rests = [(d, k, A.substitute(e, {k: A.ZERO})) for d, e in places.items() for k in used if k.value in e.free]
    for d, k, rest in sorted(rests, key=lambda found: found[2] is not A.ZERO):
        step = A.sub(A.substitute(places[d], {k: A.ONE}), rest)
        if places[d] is A.add(rest, A.mul(step, k)) and k.value not in rest.free | step.free:
            gap = A.sub(index[d], rest)
            solved.setdefault(k, gap if step is A.ONE else A.floordiv(gap, step))
    if any(k not in solved for k in used) or any(k.value in e.free for e in solved.values() for k in own):
        raise Opaque
    here = [A.eq(A.substitute(e, solved), index[d]) for d, e in places.items()]
    here += [A.and_(A.ge(solved[k], A.ZERO), A.lt(solved[k], k.args[0])) for k in used]
    return solved, A.and_(*here)


@rule(INDEXING, "copy", "fill")
def _copy(lifter: Lifter, at: Node, index: Index) -> Expr:
    return lifter.operand(at.args[1], index)


@rule(INDEXING, "stack")
def _stack(lifter: Lifter, at: Node, index: Index) -> Expr:
    parts = at.args[0]
    dim = int(argument(at, 1, "dim", 0)) % len(index)  # type: ignore[arg-type]
    inner = (*index[:dim], *index[dim + 1 :])
    pieces = [lifter.lift(p, inner) for p in parts]  # type: ignore[union-attr,arg-type]
    out = pieces[-1]
    for n in range(len(pieces) - 2, -1, -1):
        out = A.where(A.eq(index[dim], A.const(n)), pieces[n], out)
    return out


@rule(INDEXING, "constant_pad_nd", "pad")
def _pad(lifter: Lifter, at: Node, index: Index) -> Expr:
    x = source(at)
    if op_name(at) == "pad" and argument(at, 2, "mode", "constant") != "constant":
        raise Opaque
    widths = argument(at, 1, "pad")
    fill = argument(at, 2 if op_name(at) == "constant_pad_nd" else 3, "value", 0)
    extents, inner = dims(x), list(index)
    inside = A.TRUE
    for n in range(len(widths) // 2):  # type: ignore[arg-type]
        d = len(inner) - 1 - n
        inner[d] = A.sub(inner[d], whole(widths[2 * n]))  # type: ignore[index]
        inside = A.and_(inside, A.ge(inner[d], A.ZERO), A.lt(inner[d], extents[d]))
    filler = lifter.operand(0 if fill is None else fill, ())
    return A.where(inside, lifter.lift(x, tuple(inner)), filler)


def _index_tensors(at: Node) -> tuple[dict[int, Node], int, int]:
    """Return the integer tensors of advanced indexing by the dimension that they index, how many dimensions they have
    together, and the first of these in the result: where the tensors are, or in front if they are apart."""
    tensors = {d: t for d, t in enumerate(at.args[1]) if t is not None}  # type: ignore[arg-type]
    if any(value(t).dtype in (torch.bool, torch.uint8) for t in tensors.values()):  # type: ignore[union-attr]
        raise Opaque
    together = max(tensors) - min(tensors) == len(tensors) - 1
    return tensors, max(len(shape(t)) for t in tensors.values()), min(tensors) if together else 0  # type: ignore[return-value]


@rule(INDEXING, "index")
def _index(lifter: Lifter, at: Node, index: Index) -> Expr:
    """Lift advanced indexing with integer tensors, which broadcast together; None keeps a dimension."""
    x = source(at)
    tensors, depth, first = _index_tensors(at)
    among = index[first : first + depth]
    rest = iter((*index[:first], *index[first + depth :]))
    inner: list[Expr] = []
    extents = dims(x)
    for d in range(len(extents)):
        inner.append(_position(lifter.operand(tensors[d], among), extents[d]) if d in tensors else next(rest))
    return lifter.lift(x, tuple(inner))


def by_mask(at: Node) -> tuple[int, Node] | None:
    """Return the first indexed dimension and the mask of x[.., mask, ..] = number, or None for another index_put."""
    given = [(d, t) for d, t in enumerate(at.args[1]) if t is not None]  # type: ignore[arg-type]
    masked = len(given) == 1 and value(given[0][1]).dtype == torch.bool and value(at.args[2]).numel() == 1
    return given[0] if masked and not argument(at, 3, "accumulate", False) else None  # type: ignore[return-value]


@rule(INDEXING, "index_put")
def _index_put(lifter: Lifter, at: Node, index: Index) -> Expr:
    """Read what x[.., i, j, ..] = value leaves, for a number under a mask, or for integer tensors that are affine in
    one of their own dimensions."""
    x, written = source(at), at.args[2]
    if (masked := by_mask(at)) is not None:
        first, mask = masked
        number = lifter.operand(written, (A.ZERO,) * len(shape(written)))  # type: ignore[arg-type]
        return A.where(lifter.lift(mask, index[first : first + len(shape(mask))]), number, lifter.lift(x, index))
    if argument(at, 3, "accumulate", False):
        raise Opaque
    tensors, rank, first = _index_tensors(at)
    extents = [A.ONE] * rank
    for t in tensors.values():
        for m, n in enumerate(dims(t), rank - len(shape(t))):
            extents[m] = n if n is not A.ONE else extents[m]
    own = tuple(A.var(f"w{m}_{at.name}", n) for m, n in enumerate(extents))
    places = {d: _position(lifter.operand(t, own), dims(x)[d]) for d, t in tensors.items()}
    solved, here = _inverse(places, own, index)
    if len(solved) != len(own):
        raise Opaque
    left = [i for d, i in enumerate(index) if d not in tensors]
    put = lifter.operand(written, (*left[:first], *(solved[k] for k in own), *left[first:]))
    return A.where(here, put, lifter.lift(x, index))


def _position(e: Expr, extent: Expr) -> Expr:
    """Return a gathered position from the start; a negative one counts from the end."""
    if e.kind != INT:
        raise Opaque
    low, _ = poly.bounds(e)
    if poly.nonnegative(low):
        return e
    return A.where(A.ge(e, A.ZERO), e, A.add(e, extent))


@rule(INDEXING, "index_select")
def _index_select(lifter: Lifter, at: Node, index: Index) -> Expr:
    x, dim = source(at), axis(at)
    position = lifter.operand(at.args[2], (index[dim],))
    return lifter.lift(x, (*index[:dim], position, *index[dim + 1 :]))


@rule(INDEXING, "gather")
def _gather(lifter: Lifter, at: Node, index: Index) -> Expr:
    x, dim = source(at), axis(at)
    position = lifter.operand(at.args[2], index)
    return lifter.lift(x, (*index[:dim], position, *index[dim + 1 :]))


@rule(INDEXING, "embedding")
def _embedding(lifter: Lifter, at: Node, index: Index) -> Expr:
    table, indices = at.args[:2]
    if not isinstance(table, Node) or not isinstance(indices, Node) or argument(at, 2, "padding_idx", -1) != -1:
        raise Opaque  # a padded row takes no gradient
    return lifter.lift(table, (lifter.lift(indices, index[:-1]), index[-1]))


@rule(INDEXING, "one_hot")
def _one_hot(lifter: Lifter, at: Node, index: Index) -> Expr:
    return A.to_int(A.eq(lifter.lift(source(at), index[:-1]), index[-1]))
