"""Lift views and slices: one source, read at another index."""

from __future__ import annotations

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.expr import Expr
from attnfx.passes.fx.nodes import Opaque, argument, arguments, axis, dims, op_name, shape, size_expr, value
from attnfx.passes.lift.lifter import broadcast
from attnfx.passes.lift.tables import VIEWS, Index, rule


def source(at: Node) -> Node:
    x = at.args[0]
    if not isinstance(x, Node):
        raise Opaque
    return x


def whole(x: object) -> Expr:
    """Return a size or an offset, given as an int, a symbolic int or a node of either, as an expression."""
    x = value(x)
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise Opaque
    return size_expr(x)


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
        raise Opaque  # a view that reinterprets the bits
    return x, regroup(dims(at), index, dims(x))


def regroup(have: tuple[Expr, ...], index: Index, want: tuple[Expr, ...]) -> Index:
    """Return the index into shape `want` of the element (row-major) that `index` names in shape `have`."""
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
    given = arguments(at)
    dim, position = int(given["dim"]) % len(dims(x)), whole(given["index"])
    if position.op == "const" and position.value < 0:  # type: ignore[operator]
        position = A.add(position, dims(x)[dim])
    return x, (*index[:dim], position, *index[dim:])


@rule(VIEWS, "slice", "narrow")
def _slice(at: Node, index: Index) -> tuple[Node, Index]:
    x = source(at)
    given = arguments(at)
    dim = int(given["dim"]) % len(dims(x))
    extent = dims(x)[dim]
    start = A.ZERO if given["start"] is None else whole(given["start"])
    step = whole(given.get("step", 1))
    if start.op == "const":
        if start.value < 0:  # type: ignore[operator]
            start = A.maximum(A.add(start, extent), A.ZERO)
    elif not poly.nonnegative(poly.bounds(start)[0]):
        # a symbolic start like s1 - s0: valid only if it is not negative, which the result's size proves
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
    given = arguments(at)
    offset = whole(given["offset"])
    a, b = (int(given[name]) % rank for name in ("dim1", "dim2"))
    if offset.op != "const":
        raise Opaque
    row, column = (A.ZERO, offset) if offset.value >= 0 else (A.neg(offset), A.ZERO)  # type: ignore[operator]
    rest = iter(index[:-1])
    at_ = {a: A.add(index[-1], row), b: A.add(index[-1], column)}
    return x, tuple(at_[d] if d in at_ else next(rest) for d in range(rank))


SPLITTING = ("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split", "unsafe_chunk", "hsplit")


@rule(VIEWS, "getitem")
def _getitem(at: Node, index: Index) -> tuple[Node, Index]:
    """Read an element of split, chunk or unbind as a part of the source."""
    parent = source(at)
    number = at.args[1]
    if not isinstance(number, int) or parent.op != "call_function":
        raise Opaque
    name = op_name(parent)
    x = source(parent)
    results = value(parent)
    if name not in SPLITTING:
        raise Opaque
    number %= len(results)  # type: ignore[arg-type]
    if name == "unbind":
        dim = int(argument(parent, 1, "dim", 0)) % len(shape(x))  # type: ignore[arg-type]
        return x, (*index[:dim], A.const(number), *index[dim:])
    dim = int(argument(parent, 2, "dim", 0)) % len(shape(x))  # type: ignore[arg-type]
    start = A.add(A.ZERO, *(size_expr(r.shape[dim]) for r in results[:number]))  # type: ignore[index]
    return x, (*index[:dim], A.add(start, index[dim]), *index[dim + 1 :])
