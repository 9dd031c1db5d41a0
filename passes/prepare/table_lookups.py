"""Replace products with looked-up rows of a table by lookups in the product with the table.

    sum_d  q[.., i, d] * table[g(i, j), d]   =   (q @ table^T)[.., i, g(i, j)]

Models often write relative positions of keys like the left side, with a tensor of T x S x D before the product. The
right side is a small product, which the score of an attention loads at a computed place, like any other table.

Adds the small products to the graph; only loads in score programs will read them. Needs `meta["val"]`.
"""

from __future__ import annotations

from math import prod

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import INT
from attnfx.passes.fx.nodes import PRODUCTS, dims, is_tensor, number, op_name, value
from attnfx.passes.lift.access import free
from attnfx.passes.lift.contraction import contraction
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.lifter import LookedUp
from attnfx.passes.lift.products import skip
from attnfx.passes.lift.tables import VIEWS

aten = torch.ops.aten
LOOKUPS = ("index", "_unsafe_index", "embedding", "index_select")


def run(graph: Graph) -> int:
    """Add a small product for each product with rows that are looked up in a table, if the table has at most half as
    many rows as there are lookups. Note it in `graph.tables`; return how many there are."""
    products = [n for n in graph.gm.graph.nodes if n.op == "call_function" and op_name(n) in PRODUCTS and is_tensor(n)]
    found = {n: _small(graph, n) for n in products if any(map(_looked_up, n.all_input_nodes))}
    graph.tables.update((n, x) for n, x in found.items() if x is not None)
    return len(graph.tables)


def _looked_up(x: Node) -> bool:
    return op_name(skip(x, VIEWS)) in LOOKUPS


def _small(graph: Graph, n: Node) -> LookedUp | None:
    facts, out = graph.facts, tuple(A.var(f"o{d}", size) for d, size in enumerate(dims(n)))
    whole = contraction(n, out)
    if whole is None or not value(n).is_floating_point():
        return None
    for c in (whole, whole.turned):
        if not _looked_up(c.left) or c.reduced not in c.right_index:
            continue
        row = graph.lifter.lift(c.left, c.left_index)
        table, other = row.value, c.right
        if row.op != "load" or not isinstance(table, Node) or len(row.args) != 2 or c.reduced not in row.args:
            continue
        width, last = row.args.index(c.reduced), c.right_index.index(c.reduced)
        place, kept = row.args[1 - width], [d for d in range(len(c.right_index)) if d != last]
        apart = {str(v.value) for v in out} & place.free - free(c.right_index)
        rows = number(value(table).shape[1 - width])
        places = prod(number(size) for v, size in zip(out, value(n).shape, strict=True) if str(v.value) in apart)
        if place.kind != INT or not apart or 2 * rows > places:
            continue
        if facts.regions[table] != facts.regions[n] or facts.regions[other] != facts.regions[n]:
            continue
        emit = graph.emitter(n)
        turned = emit.call(aten.permute.default, other, [*kept, last])
        small = emit.call(aten.matmul.default, turned, table if width == 0 else emit.call(aten.mT.default, table))
        if value(small).dtype == value(n).dtype:
            return LookedUp(small, out, (*(c.right_index[d] for d in kept), place))
    return None
