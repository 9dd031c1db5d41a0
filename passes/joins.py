"""Parts of one result, written out one by one: joined where they are computed instead of where they are read.

A loop over chunks ends in a `cat` of the chunks, or writes each into its place of an empty tensor. `join` turns such
writes into a `cat`, and moves a `cat` back through what was done to each part alike (a transpose, a reshape, a linear
layer), up to the product that made the part: cat(f(x_0), f(x_1), ..) is f(cat(x_0, x_1, ..)) where f keeps the rows
that are joined apart. Needs `meta["val"]`; changes the graph in place; promises the same results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes import separable_views  # noqa: F401  (its rules are added by its import)
from attnfx.passes.facts import Facts, storage, written_operands
from attnfx.passes.graphs import dims, is_tensor, op_name, size_expr, value
from attnfx.passes.match import SDPA, batched
from attnfx.passes.rewrite import STACK, Emitter, like, size_carriers
from attnfx.passes.separable import Along, Made, NotSeparable, split
from attnfx.rowprogram import Ref

aten = torch.ops.aten
CATS = ("cat", "concat", "concatenate")
NEAR = 16  # nodes from a part back to the product that it comes from
EMPTY = ("empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros")


def join(gm: GraphModule) -> int:
    """Gives how many joins were made or moved."""
    facts = Facts(gm)
    changed = sum(_written_in_parts(gm, facts, n) for n in list(gm.graph.nodes) if op_name(n) in EMPTY)
    regions = Facts(gm).regions if changed else facts.regions
    for n in list(gm.graph.nodes):
        found = parts(n)
        at: Node | None = n if found is not None and _of_products(found[0]) else None
        while at is not None and (found := parts(at)) is not None:
            if any(regions[x] != regions[n] for x in found[0]):
                break  # what a linear layer gives depends on the autocast region, and its gradient on that of no_grad
            at = _moved_back(gm, at)
            changed += at is not None
    if changed:
        gm.recompile()
    return changed


def parts(n: Node) -> tuple[list[Node], int] | None:
    """The operands of a `cat`, two or more that nothing else reads, and its dimension."""
    if n.op != "call_function" or op_name(n) not in CATS or not is_tensor(n):
        return None
    given: Any = n.args[0]
    dim = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)
    if not isinstance(dim, int) or not isinstance(given, list | tuple) or len(set(given)) != len(given):
        return None
    rank = len(dims(n))
    if len(given) < 2 or any(len(x.users) != 1 or len(dims(x)) != rank for x in given):
        return None
    if any(value(x).dtype != value(n).dtype for x in given):
        return None
    return list(given), dim % rank


def _of_products(found: list[Node]) -> bool:
    """Whether each part comes from a product or an attention, so that a join of these may be worth it."""
    for at in found:
        for _ in range(NEAR):
            if batched(at) or op_name(at) in SDPA:
                break
            source = at.args[0] if at.op == "call_function" and at.args else None
            if not isinstance(source, Node):
                return False
            at = source
        else:
            return False
    return True


# -- writes into parts of an empty tensor ---------------------------------------------------------
def _written_in_parts(gm: GraphModule, facts: Facts, base: Node) -> bool:
    held = value(base)
    if not isinstance(held, torch.Tensor) or held.layout != torch.strided or not held.is_contiguous():
        return False
    writes = sorted((w for w in map(_write, base.users) if w is not None), key=lambda w: facts.position[w[0]])
    if len(writes) < 2 or not _of_products([source for _, source, *_ in writes]):
        return False
    last = facts.position[writes[-1][0]]
    views = {x for copy, *_ in writes for x in copy.all_input_nodes[:1]}  # the slices, each written once
    if any(u not in views and facts.position[u] < last for u in base.users):
        return False
    family = {n for n in gm.graph.nodes if storage(n) == storage(base)}
    if any(n not in views and n is not base and facts.position[n] <= last and n not in {w[0] for w in writes}
           for n in family):  # fmt: skip
        return False
    if len({d for _, _, d, _ in writes}) != 1 or len({facts.regions[w[0]] for w in writes}) != 1:
        return False
    writes.sort(key=lambda w: w[3].value if w[3].op == "const" else 0)  # type: ignore[arg-type,return-value]
    dim, at = writes[0][2], A.ZERO
    for copy, source, _, start in writes:
        written = copy.args[0]
        if start is not at or dims(source) != dims(written):  # type: ignore[arg-type]
            return False
        if value(source).dtype != held.dtype or value(source).device != held.device:
            return False
        at = A.add(at, dims(written)[dim])  # type: ignore[arg-type]
    if at is not dims(base)[dim]:
        return False
    final = max((w[0] for w in writes), key=facts.position.__getitem__)
    emit = Emitter(gm, final.next)
    emit.kept = {k: v for k, v in final.meta.items() if k in STACK}
    made = emit.call(aten.cat.default, [w[1] for w in writes], dim)
    for copy, *_ in writes:
        gm.graph.erase_node(copy)
    base.replace_all_uses_with(made, delete_user_cb=lambda u: u not in views, propagate_meta=False)
    return True


def _write(view: Node) -> tuple[Node, Node, int, Expr] | None:
    """(the write, what is written, dimension, where it starts) for a slice of which nothing is done but one write."""
    if op_name(view) != "slice" or len(view.users) != 1:
        return None
    copy = next(iter(view.users))
    if op_name(copy) != "copy_" or copy.args[0] is not view or copy.users or not is_tensor(copy.args[1]):
        return None
    given = dict(zip(("self", "dim", "start", "end", "step"), view.args)) | dict(view.kwargs)
    dim, start, step = given.get("dim", 0), given.get("start"), given.get("step", 1)
    if step != 1 or not isinstance(dim, int):
        return None
    held = value(start) if start is not None else 0
    if not isinstance(held, int | torch.SymInt) or (isinstance(held, int) and held < 0):
        return None
    return copy, copy.args[1], dim % len(dims(view)), size_expr(held)  # type: ignore[return-value]


# -- a join moved back ----------------------------------------------------------------------------
def _moved_back(gm: GraphModule, at: Node) -> Node | None:
    """The join before the last operator of each part, or None where it has to stay."""
    found = parts(at)
    assert found is not None
    operands, dim = found
    if any(batched(x) or written_operands(x) for x in operands):
        return None
    try:
        calls = [split(x, dim, dims(x)[dim]) for x in operands]
    except NotSeparable:
        return None
    first = calls[0]
    sources = [_source(made, first) for made in calls]
    if any(x is None for x in sources):
        return None
    before, row = [x.node for x in sources if x is not None], sources[0].dim  # type: ignore[union-attr]
    if len(set(before)) != len(before) or any(
        len(x.users) != 1 or len(dims(x)) != len(dims(before[0])) for x in before
    ):
        return None
    if any(dims(x)[row] is not dims(p)[dim] for x, p in zip(before, operands, strict=True)):
        return None
    packet, _, overload = first.op.partition(".")
    target = getattr(getattr(aten, packet), overload)
    emit = Emitter(gm, at, size_carriers(gm))
    joined = emit.call(aten.cat.default, before, row)
    rows = emit.size(dims(at)[dim])

    def given(x: Any) -> Any:
        return joined if isinstance(x, Along) else rows if isinstance(x, Ref) else x

    made = emit.call(target, *map_aggregate(first.args, given), **map_aggregate(dict(first.kwargs), given))  # type: ignore[misc,arg-type]
    made = like(emit, made, at)
    made.meta = {**at.meta, **made.meta}
    at.replace_all_uses_with(made, propagate_meta=False)
    gm.graph.erase_node(at)
    for x in operands:
        gm.graph.erase_node(x)
    return joined


def _source(made: Made, like: Made) -> Along | None:
    """The one operand with rows of a call, where it is the same call as `like` but for that."""
    alongs: list[Along] = []
    plain = True

    def visit(x: Any) -> Any:
        nonlocal plain
        if isinstance(x, Along):
            alongs.append(x)
            return x.dim
        plain &= not isinstance(x, Ref) or x.kind == "rows"
        return x

    mine = map_aggregate((made.op, made.args, dict(made.kwargs)), visit)
    count = len(alongs)
    theirs = map_aggregate((like.op, like.args, dict(like.kwargs)), visit)
    if count != 1 or not plain or mine != theirs or "." not in made.op:
        return None
    return alongs[0]


__all__ = ["join", "parts"]
