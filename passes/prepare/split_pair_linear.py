"""Split linear layers over pairs of rows into layers over the rows: queries x keys x width is never materialized.

    linear(cat([q[:, :, None].expand(..), k[:, None].expand(..)], -1), w)
        becomes   linear(q, w1)[:, :, None] + linear(k, w2)[:, None]
    linear(q[:, :, None] * k[:, None], w)   becomes   einsum("bid,bjd,od->bijo", q, k, w)

The pairs must lead to a softmax. Narrow dtypes are widened, so that a sum of parts is rounded once, like the layer's
own sum. Needs `meta["val"]`; changes the graph in place; promises the same results up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import ascii_lowercase

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.reach import reach
from attnfx.passes.fx.nodes import CATS, argument, dims, is_tensor, op_name, shape, spanned, take_place, value
from attnfx.passes.lift.emitter import CannotEmit, Emitter
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.products import reaches_softmax

aten = torch.ops.aten
LAYERS = ("linear", "matmul", "mm")
EXPANSIONS = ("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "clone", "contiguous")
NARROW = (torch.float16, torch.bfloat16)


def run(graph: Graph) -> int:
    """Split each linear layer over pairs of rows into one over each; return how many were split."""
    changed = 0
    for n in list(graph.gm.graph.nodes):
        if op_name(n) not in LAYERS or not is_tensor(n.args[0]) or not is_tensor(n.args[1]):
            continue
        parts = _parts(n.args[0])
        leaves = [a for x in parts for a in _factors(x)]
        if (
            len(shape(n.args[1])) > 2
            or not _pairs(leaves, len(shape(n.args[0])))
            or not reaches_softmax(n, anyhow=True)
        ):
            continue
        facts = graph.facts
        within = {n, *_between(n.args[0], leaves)}
        if any(x in facts.written for x in (*within, *leaves)) or len({facts.regions[x] for x in within}) > 1:
            continue
        if facts.casts(n):
            continue  # autocast rounds a layer's operands
        try:
            made = _apart(graph.emitter(n), n, parts)
        except CannotEmit:
            continue
        take_place(made, n)
        graph.grew()
        changed += 1
    return changed


def _parts(x: Node) -> list[Node]:
    """Return the operands that are concatenated along the width, or the operand itself."""
    if op_name(x) in CATS and len(shape(x)) > 2:
        given, dim = x.args[0], argument(x, 1, "dim", 0)
        if dim in (-1, len(shape(x)) - 1) and all(len(shape(a)) == len(shape(x)) for a in given):  # type: ignore[union-attr,arg-type]
            return list(given)  # type: ignore[arg-type]
    return [x]


def _factors(x: Node) -> list[Node]:
    """Return the two rows whose product a part is, or the rows that it repeats, without the expansions."""
    if op_name(x) == "mul" and all(is_tensor(a) for a in x.args):
        both = [_compact(a) for a in x.args]  # type: ignore[arg-type]
        if _pairs(both, len(shape(x))) and all(value(a).dtype == value(x).dtype for a in both):
            return both
    return [_compact(x)]


def _compact(x: Node) -> Node:
    """Return the tensor that broadcasts to `x`."""
    while op_name(x) in EXPANSIONS and isinstance(x.args[0], Node) and len(shape(x.args[0])) == len(shape(x)):
        if any(a is not b and a is not A.ONE for a, b in zip(dims(x.args[0]), dims(x), strict=True)):
            break
        x = x.args[0]
    return x


def _between(rows: Node, leaves: list[Node]) -> Iterator[Node]:
    """Yield the nodes from a layer's input back to the leaves, which are left out."""

    def operands(x: Node) -> list[Node]:
        given = x.all_input_nodes[:1] if op_name(x) in EXPANSIONS else x.all_input_nodes  # the others are sizes
        return [a for a in given if a not in leaves]

    return reach([rows], operands)


def _pairs(leaves: Sequence[Node], rank: int) -> bool:
    """Return whether rows of two operands are combined pair by pair, each with a dimension of its own."""
    spans = [spanned(x, rank) for x in leaves]
    return any(x - y and y - x for x in spans for y in spans)


def _apart(emit: Emitter, n: Node, parts: list[Node]) -> Node:
    """Emit the sum of the layer's results for each part of the width."""
    weight, turned = n.args[1], op_name(n) == "linear"
    bias = argument(n, 2, "bias") if turned else None
    dtype, start, total = value(n).dtype, A.ZERO, None

    def wide(x: Node) -> Node:
        return emit.call(aten.to.dtype, x, torch.float32) if dtype in NARROW else x

    for part in parts:
        end = A.add(start, dims(part)[-1])
        piece = wide(emit.call(aten.slice.Tensor, weight, 1 if turned else 0, emit.size(start), emit.size(end)))
        made = _layer(emit, n, [wide(x) for x in _factors(part)], piece, turned)
        total, start = made if total is None else emit.call(aten.add.Tensor, total, made), end
    assert total is not None
    if bias is not None:
        total = emit.call(aten.add.Tensor, total, bias)
    if dims(total) != dims(n):
        total = emit.call(aten.expand.default, total, [emit.size(x) for x in dims(n)])
    return emit.call(aten.to.dtype, total, dtype) if dtype in NARROW else total


def _layer(emit: Emitter, n: Node, factors: list[Node], weight: Node, turned: bool) -> Node:
    if len(factors) == 1:
        return emit.call(aten.linear.default if turned else aten.matmul.default, *factors, weight)
    rank = max(len(shape(x)) for x in factors)
    given = [ascii_lowercase[rank - len(shape(x)) : rank] for x in factors]
    out = "z" if len(shape(weight)) == 2 else ""
    of_weight = f"z{ascii_lowercase[rank - 1]}" if turned and out else f"{ascii_lowercase[rank - 1]}{out}"
    equation = f"{','.join(given)},{of_weight}->{ascii_lowercase[: rank - 1]}{out}"
    return emit.call(aten.einsum.default, equation, [*factors, weight])
