"""Lifting rules of views, slices, gathers and concatenations: what they do to an index."""

from __future__ import annotations

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.expr import INT, Expr
from attnfx.passes.graphs import dims, op_name, shape, size_expr, value
from attnfx.passes.lift import INDEXING, VIEWS, Index, Lifter, Opaque, argument, axis, broadcast, rule


def source(at: Node) -> Node:
    x = at.args[0]
    if not isinstance(x, Node):
        raise Opaque
    return x


def whole(x: object) -> Expr:
    """A size or an offset given as a number, a symbolic number or a node of one."""
    x = value(x)
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise Opaque
    return size_expr(x)


# -- views: one source, another index -----------------------------------------------------------
@rule(VIEWS, "clone", "contiguous", "alias", "lift_fresh", "lift_fresh_copy", "lift", "dropout_eval")
def _same(at: Node, index: Index) -> tuple[Node, Index]:
    return source(at), index


@rule(VIEWS, "dropout", "dropout_", "feature_dropout", "native_dropout_eval")
def _dropout(at: Node, index: Index) -> tuple[Node, Index]:
    if argument(at, 2, "train") is False or argument(at, 1, "p") == 0:
        return source(at), index
    raise Opaque


@rule(VIEWS, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze")
def _reshape(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    if value(x).dtype != value(at).dtype:  # type: ignore[union-attr]
        raise Opaque  # a view of the bits
    return x, regroup(dims(at), index, dims(x))


def regroup(have: tuple[Expr, ...], index: Index, want: tuple[Expr, ...]) -> Index:
    """The index into shape `want` that names the same element (row-major) as `index` into shape `have`."""
    out: list[Expr] = []
    i = j = 0
    while j < len(want) or i < len(have):
        if j < len(want) and want[j] is A.ONE:
            out.append(A.ZERO)
            j += 1
            continue
        if i < len(have) and have[i] is A.ONE:
            i += 1
            continue
        if i >= len(have) or j >= len(want):
            raise Opaque
        group, target = [i], [j]
        a, b = have[i], want[j]
        i, j = i + 1, j + 1
        while a is not b:
            # extend the side that divides the other; sizes are polynomials, compared exactly
            if j < len(want) and poly.divide(poly.of(a), poly.of(b)) is not None:
                b = A.mul(b, want[j])
                target.append(j)
                j += 1
            elif i < len(have) and poly.divide(poly.of(b), poly.of(a)) is not None:
                a = A.mul(a, have[i])
                group.append(i)
                i += 1
            elif i < len(have) or j < len(want):  # neither divides: take one more on both sides
                if i < len(have):
                    a = A.mul(a, have[i])
                    group.append(i)
                    i += 1
                if j < len(want):
                    b = A.mul(b, want[j])
                    target.append(j)
                    j += 1
            else:
                raise Opaque
        flat = A.ZERO
        for n in group:
            flat = A.add(A.mul(flat, have[n]), index[n])
        parts: list[Expr] = []
        for n in reversed(target[1:]):
            parts.append(A.mod(flat, want[n]))
            flat = A.floordiv(flat, want[n])
        out.append(flat)
        out.extend(reversed(parts))
    return tuple(out)


@rule(
    VIEWS, "permute", "transpose", "t", "mT", "numpy_T", "swapaxes", "swapdims", "movedim", "matrix_H", "adjoint", "mH"
)
def _permute(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    order = permutation(at, len(index))
    inner: list[Expr] = [A.ZERO] * len(index)
    for to, origin in enumerate(order):
        inner[origin] = index[to]
    return x, tuple(inner)


def permutation(at: Node, rank: int) -> list[int]:
    name = op_name(at)
    order = list(range(rank))
    if name == "permute":
        return [int(d) % rank for d in argument(at, 1, "dims")]  # type: ignore[union-attr]
    if name in ("transpose", "swapaxes", "swapdims"):
        a, b = (int(d) % rank for d in at.args[1:3])  # type: ignore[arg-type]
    elif name == "movedim":
        moves = [d if isinstance(d, list | tuple) else [d] for d in at.args[1:3]]
        froms, tos = ([int(d) % rank for d in side] for side in moves)  # type: ignore[union-attr]
        rest = iter(d for d in order if d not in froms)
        return [froms[tos.index(d)] if d in tos else next(rest) for d in order]
    elif rank < 2:
        return order
    elif name == "numpy_T":
        return order[::-1]
    else:
        a, b = rank - 2, rank - 1
    order[a], order[b] = order[b], order[a]
    return order


@rule(VIEWS, "expand", "expand_as", "broadcast_to")
def _expand(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    return x, broadcast(x, index)


@rule(VIEWS, "select")
def _select(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    dim, position = axis(at), whole(at.args[2])
    if position.op == "const" and position.value < 0:  # type: ignore[operator]
        position = A.add(position, dims(x)[dim])
    return x, (*index[:dim], position, *index[dim:])


@rule(VIEWS, "slice", "narrow")
def _slice(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    dim = axis(at)
    extent = dims(x)[dim]
    given = argument(at, 2, "start")
    start = A.ZERO if given is None else whole(given)
    step = whole(argument(at, 4, "step", 1)) if op_name(at) == "slice" else A.ONE
    if start.op == "const":
        if start.value < 0:  # type: ignore[operator]
            start = A.maximum(A.add(start, extent), A.ZERO)
    elif not poly.nonnegative(poly.bounds(start)[0]):
        # a symbolic start like s1 - s0: right only where it is not negative, which the result's size proves
        if dims(at)[dim] is not A.sub(extent, start) or step is not A.ONE:
            raise Opaque
    return x, (*index[:dim], A.add(start, A.mul(step, index[dim])), *index[dim + 1 :])


@rule(VIEWS, "flip")
def _flip(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    extents, inner = dims(x), list(index)
    for d in argument(at, 1, "dims"):  # type: ignore[union-attr]
        d = int(d) % len(inner)
        inner[d] = A.sub(A.add(extents[d], A.const(-1)), inner[d])
    return x, tuple(inner)


@rule(VIEWS, "unfold")
def _unfold(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    dim, step = axis(at), whole(at.args[3])
    return x, (*index[:dim], A.add(A.mul(step, index[dim]), index[-1]), *index[dim + 1 : -1])


@rule(VIEWS, "repeat", "tile")
def _repeat(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    extents = dims(x)
    inner = index[len(index) - len(extents) :]
    return x, tuple(
        i if n is m else A.mod(i, n) for i, n, m in zip(inner, extents, dims(at)[-len(extents) :], strict=True)
    )


@rule(VIEWS, "repeat_interleave")
def _repeat_interleave(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    repeats, dim = argument(at, 1, "repeats"), argument(at, 2, "dim")
    if not isinstance(dim, int):
        raise Opaque
    dim %= len(index)
    return x, (*index[:dim], A.floordiv(index[dim], whole(repeats)), *index[dim + 1 :])


@rule(VIEWS, "roll")
def _roll(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    shifts, over = argument(at, 1, "shifts"), argument(at, 2, "dims", [])
    if not over:
        raise Opaque
    inner, extents = list(index), dims(x)
    for shift, d in zip(shifts, over, strict=True):  # type: ignore[arg-type]
        d = int(d) % len(inner)
        inner[d] = A.mod(A.sub(inner[d], whole(shift)), extents[d])
    return x, tuple(inner)


@rule(VIEWS, "diagonal")
def _diagonal(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    rank = len(shape(x))
    offset = whole(argument(at, 1, "offset", 0))
    a, b = (int(argument(at, n, name, n - 2)) % rank for n, name in ((2, "dim1"), (3, "dim2")))  # type: ignore[arg-type]
    if offset.op != "const":
        raise Opaque
    row, column = (A.ZERO, offset) if offset.value >= 0 else (A.neg(offset), A.ZERO)  # type: ignore[operator]
    rest = iter(index[:-1])
    at_ = {a: A.add(index[-1], row), b: A.add(index[-1], column)}
    return x, tuple(at_[d] if d in at_ else next(rest) for d in range(rank))


@rule(VIEWS, "getitem")
def _getitem(at: Node, index: Index) -> tuple[Node, Index]:
    """An element of split, chunk or unbind: the source, shifted."""
    parent = source(at)
    number = at.args[1]
    if not isinstance(number, int) or parent.op != "call_function":
        raise Opaque
    name = op_name(parent)
    x = source(parent)
    results = value(parent)
    if name not in (
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "tensor_split",
        "unsafe_split",
        "unsafe_chunk",
        "hsplit",
    ):
        raise Opaque
    number %= len(results)  # type: ignore[arg-type]
    if name == "unbind":
        dim = int(argument(parent, 1, "dim", 0)) % len(shape(x))  # type: ignore[arg-type]
        return x, (*index[:dim], A.const(number), *index[dim:])
    dim = int(argument(parent, 2, "dim", 0)) % len(shape(x))  # type: ignore[arg-type]
    start = A.add(A.ZERO, *(size_expr(r.shape[dim]) for r in results[:number]))  # type: ignore[index]
    return x, (*index[:dim], A.add(start, index[dim]), *index[dim + 1 :])


# -- several sources ------------------------------------------------------------------------------
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


@rule(INDEXING, "slice_scatter")
def _slice_scatter(lifter: Lifter, at: Node, index: Index) -> Expr:
    part = at.args[1]
    dim = axis(at, 2)
    given, step = argument(at, 3, "start"), argument(at, 5, "step", 1)
    start = A.ZERO if given is None else whole(given)
    if step != 1 or not isinstance(part, Node) or (start.op != "const" and not poly.nonnegative(poly.bounds(start)[0])):
        raise Opaque
    if start.op == "const" and start.value < 0:  # type: ignore[operator]
        start = A.maximum(A.add(start, dims(at)[dim]), A.ZERO)
    here = A.sub(index[dim], start)
    inside = A.and_(A.le(start, index[dim]), A.lt(here, dims(part)[dim]))
    written = lifter.lift(part, (*index[:dim], here, *index[dim + 1 :]))
    return A.where(inside, written, lifter.lift(source(at), index))


@rule(INDEXING, "select_scatter")
def _select_scatter(lifter: Lifter, at: Node, index: Index) -> Expr:
    dim, place = axis(at, 2), whole(at.args[3])
    if place.op == "const" and place.value < 0:  # type: ignore[operator]
        place = A.add(place, dims(at)[dim])
    written = lifter.operand(at.args[1], (*index[:dim], *index[dim + 1 :]))
    return A.where(A.eq(index[dim], place), written, lifter.lift(source(at), index))


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


@rule(INDEXING, "index")
def _index(lifter: Lifter, at: Node, index: Index) -> Expr:
    """Advanced indexing with integer tensors (kept positions None): the tensors broadcast together."""
    x, indices = source(at), at.args[1]
    rank = len(shape(x))
    given = [(d, t) for d, t in enumerate(indices) if t is not None]  # type: ignore[arg-type]
    if any(value(t).dtype == torch.bool for _, t in given):  # type: ignore[union-attr]
        raise Opaque
    positions = [d for d, _ in given]
    depth = max(len(shape(t)) for _, t in given)  # type: ignore[arg-type]
    together = positions == list(range(positions[0], positions[0] + len(positions)))
    first = positions[0] if together else 0
    among = index[first : first + depth]
    rest = iter((*index[:first], *index[first + depth :]))
    inner: list[Expr] = []
    extents = dims(x)
    tensors = dict(given)
    for d in range(rank):
        inner.append(_position(lifter.operand(tensors[d], among), extents[d]) if d in tensors else next(rest))
    return lifter.lift(x, tuple(inner))


def _position(e: Expr, extent: Expr) -> Expr:
    """A gathered position: negative numbers count from the end."""
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
