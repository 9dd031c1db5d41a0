"""Read weights at their keys instead of at their distances to the keys, in products with values for each distance.

    sum_c  skewed[.., i, c] * table[c, e],   skewed[.., i, c] = w[.., i, c + start(i)], or 0 beyond the keys
        becomes   sum_j  w[.., i, j] * table[j - start(i), e]

Relative positions in the values are often written like the left side: the weights are padded, flattened and viewed
again, so that diagonals become columns. That mixes rows. The right side keeps them apart, and the vector for each row
and key is computed with the row. Needs `meta["val"]`; changes the graph in place; promises the same results.
"""

from __future__ import annotations

from string import ascii_lowercase

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import Expr, walk
from attnfx.passes.fx.nodes import PRODUCTS, dims, is_tensor, op_name, take_place, value
from attnfx.passes.lift.access import Operand, variables
from attnfx.passes.lift.contraction import contraction
from attnfx.passes.lift.emitter import CannotEmit, Emitter, like
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.tables import VIEWS, Index

aten = torch.ops.aten
PADS = ("constant_pad_nd", "pad")
NOTHING = A.const(0.0)


def run(graph: Graph) -> int:
    """Align the weights of each such product; return how many were aligned."""
    changed = 0
    for n in list(graph.gm.graph.nodes):
        product = op_name(n) in PRODUCTS and is_tensor(n)
        made = _aligned(graph, n) if product else None
        if made is not None:
            take_place(like(graph.emitter(n), made, n), n)
            graph.grew()
            changed += 1
    return changed


def _aligned(graph: Graph, n: Node) -> Node | None:
    out = variables(n)
    found = contraction(n, out)
    for c in (found, found.turned) if found is not None else ():
        weights, at, rows = _padded(c.left), c.left_index, c.left_index[:-1]
        width = [v for v in c.right_index if v is not c.reduced and v is not A.ZERO]
        if weights is None or len(dims(weights)) != len(at) or at[-1] is not c.reduced or len(width) != 1:
            continue
        if set(out) != {*rows, *width} or len(out) != len(rows) + 1:
            continue
        key = A.var(f"keys_{n.name}", dims(weights)[-1])
        lifted = Lifter(graph.facts.written | {weights}, graph.facts.frozen).lift(c.left, at)
        start = _start(lifted, c.reduced, A.load(weights, (*rows, key), "f"), key)
        if start is not None:
            try:
                return _product(
                    graph.emitter(n), weights, (*rows, key), Operand(c.right, c.right_index), c.reduced, start, out
                )
            except CannotEmit:
                return None
    return None


def _padded(x: Node) -> Node | None:
    """Return the tensor that an operand pads and views, or None."""
    padded = False
    while op_name(x) in PADS or (op_name(x) in VIEWS and "dropout" not in op_name(x)):
        padded |= op_name(x) in PADS
        x = x.args[0]  # type: ignore[assignment]
    return x if padded and is_tensor(x) else None


def _start(lifted: Expr, column: Expr, load: Expr, key: Expr) -> Expr | None:
    """Return the key that column 0 reads, if column c reads the key c + start and all other columns are zero."""
    places = [e.args[-1] for e in walk(lifted) if e.op == "load" and e.value is load.value]
    for place in dict.fromkeys(places):
        turns = [place]
        if place.op == "mod":
            turns = [A.sub(place.args[0], A.mul(A.const(turn), place.args[1])) for turn in range(3)]
        for start in (A.sub(x, column) for x in turns):
            if column.value not in start.free and _proved(lifted, column, load, key, start):
                return start
    return None


def _proved(lifted: Expr, column: Expr, load: Expr, key: Expr, start: Expr) -> bool:
    keys, columns = key.args[0], column.args[0]
    at = A.sub(key, start)
    inside = A.ge(at, A.ZERO) is A.TRUE and A.lt(at, columns) is A.TRUE
    if not inside or substitute(lifted, {column: at}) is not load:
        return False
    first, last = A.neg(start), A.sub(keys, start)  # the columns of key 0 and of the end of the keys
    before, after = poly.bounds(first)[1], poly.bounds(A.sub(columns, last))[1]
    if before is None or after is None:
        return False
    n, m = A.var("before", A.from_poly(before)), A.var("after", A.from_poly(after))
    outside = A.sub(A.sub(first, A.ONE), n), A.add(last, m)
    return all(substitute(lifted, {column: x}) is NOTHING for x in outside)


def _product(
    emit: Emitter, weights: Node, at: Index, table: Operand, column: Expr, start: Expr, out: Index
) -> Node | None:
    row, key = at[-2:]
    offset = substitute(start, {row: A.ZERO})
    if row.op != "var" or A.sub(start, offset) not in (row, A.neg(row)):
        return None
    width = next(v for v in out if v not in at)
    device = value(weights).device
    i, j = (emit.call(aten.arange.default, emit.size(x.args[0]), device=device) for x in (row, key))
    i = emit.call(aten.unsqueeze.default, i, -1)
    gap = emit.call(aten.sub.Tensor if A.sub(start, offset) is row else aten.add.Tensor, j, i)
    place = emit.call(aten.sub.Tensor, gap, emit.size(offset)) if offset is not A.ZERO else gap
    near = emit.call(aten.index.Tensor, emit.operand(table, [column, width]), [place])
    letters = {v: ascii_lowercase[n] for n, v in enumerate((*at, width))}
    terms = ("".join(letters[v] for v in vs) for vs in (at, (row, key, width), out))
    return emit.call(aten.einsum.default, "{},{}->{}".format(*terms), [weights, near])
