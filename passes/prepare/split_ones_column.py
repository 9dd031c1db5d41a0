"""Replace a column of ones in the values, which sums up the weights, by a sum of the weights.

    n = w @ cat([v, ones], -1);   n[..., :-1] / n[..., -1:]   becomes   (w @ v) / w.sum(-1, keepdim=True)

A product that is only read in parts along its width becomes a product for each part. A part of the values that is one
everywhere becomes a sum. Needs `meta["val"]`; changes the graph in place; promises the same results up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.nodes import Opaque, dims, is_tensor, op_name, take_place
from attnfx.passes.lift.access import Operand
from attnfx.passes.lift.emitter import CannotEmit, Emitter
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.tables import VIEWS, Index

aten = torch.ops.aten
PRODUCTS = ("matmul", "bmm", "__matmul__")
PARTS = ("slice", "select", "narrow", "getitem")
SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")
JOINED = ("cat", "concat", "concatenate", "constant_pad_nd", "pad")
MOST = 4  # parts of one product


@dataclass(frozen=True)
class Part:
    """A reader of the product: values[..., `at`]. `column` runs along the width; None stands for a single column."""

    node: Node
    at: Expr
    column: Expr | None
    ones: bool


def run(graph: Graph) -> int:
    """Split each product with a column of ones; return how many were split."""
    changed = 0
    for n in list(graph.gm.graph.nodes):
        if op_name(n) not in PRODUCTS or not is_tensor(n) or len(dims(n)) < 3 or not _joined(n.args[1]):
            continue
        readers = [r for u in n.users for r in (u.users if op_name(u) in SPLITS else (u,))]
        if not 2 <= len(readers) <= MOST:
            continue
        facts, lifter = graph.facts, graph.lifter
        if n in facts.written or len({facts.regions[u] for u in (n, *readers)}) > 1:
            continue
        parts = [_part(lifter, n, r) for r in readers]
        found = [p for p in parts if p is not None]
        if len(found) < len(parts) or {p.ones for p in found} != {True, False}:
            continue
        try:
            made = [_computed(graph.emitter(n), n, p) for p in found]
        except CannotEmit:
            continue
        for p, new in zip(found, made, strict=True):
            take_place(new, p.node)
        graph.changed()
        changed += 1
    return changed


def _joined(x: object) -> bool:
    """Return whether values are a concatenation or padded, as with a column of ones."""
    while isinstance(x, Node) and op_name(x) in VIEWS and x.args:
        x = x.args[0]
    return isinstance(x, Node) and op_name(x) in JOINED


def _part(lifter: Lifter, n: Node, reader: Node) -> Part | None:
    """Return a reader of the product that takes all of it except along the width, or None."""
    if op_name(reader) not in PARTS or not is_tensor(n.args[1]):
        return None
    out: Index = tuple(A.var(f"p{d}", x) for d, x in enumerate(dims(reader)))
    try:
        source, index = VIEWS[op_name(reader)](reader, out)
    except Opaque:
        return None
    single = len(out) < len(index)
    if source is not n or index[:-1] != (out if single else out[:-1]):
        return None
    values = lifter.lift(n.args[1], (*_rows(n), index[-1]))  # type: ignore[arg-type]
    return Part(reader, index[-1], None if single else out[-1], values is A.const(1.0))


def _rows(n: Node) -> Index:
    """Return the index into the values of a product, without their width."""
    return tuple(A.var(f"v{d}", x) for d, x in enumerate(dims(n.args[1])[:-1]))  # type: ignore[arg-type]


def _computed(emit: Emitter, n: Node, p: Part) -> Node:
    weights, values = n.args[:2]
    assert isinstance(values, Node)
    if p.ones:
        made = emit.call(aten.sum.dim_IntList, weights, [-1], p.column is not None)
        if dims(made) != dims(p.node):
            made = emit.call(aten.expand.default, made, [emit.size(x) for x in dims(p.node)])
        return made
    rows = _rows(n)
    width = [p.column] if p.column is not None else []
    piece = emit.operand(Operand(values, (*rows, p.at)), [*rows, *width])
    if p.column is not None:
        return emit.call(n.target, weights, piece)  # type: ignore[arg-type]
    return emit.call(aten.squeeze.dim, emit.call(n.target, weights, emit.call(aten.unsqueeze.default, piece, -1)), -1)  # type: ignore[arg-type]
