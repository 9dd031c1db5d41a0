"""Convert a region of whole rows to a row program, and replace the region by one call of `attnfx::attention_rows`.

Needs the graph that the region was found in; changes it in place. Promises the same results.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from attnfx.ir.expr import Expr
from attnfx.ir.serialize import to_json
from attnfx.passes.fx.analysis import Facts, learning
from attnfx.passes.fx.nodes import dims, is_tensor, memory_order, op_name, size_expr, take_place, value
from attnfx.passes.fx.order import move_before
from attnfx.passes.lift.emitter import CannotEmit, Emitter, like, own
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.row_rules import NONE, ROWS, Along
from attnfx.passes.rows.live_keys import operands
from attnfx.passes.rows.region import Region
from attnfx.spec.rows import Call, Live, Ref, Result, RowProgram


def replace_region(graph: Graph, found: Region, target: Any, compiled: bool) -> list[tuple[Node, Node]]:
    """Insert one call of `attnfx::attention_rows` (`target`), and let all users of the region's results read it. Return
    each result with its replacement. Raises CannotEmit before changing users."""
    facts = graph.facts
    users = [u for n in found.results for u in n.users if u not in found.calls and op_name(u) != "sym_size"]
    before = min([found.final, *users])
    read = [*(n for n, _ in found.inputs), *found.numbers]
    if not move_before(facts, read, before, found.calls):
        raise CannotEmit("an operand is computed after a result of the attention is first read")
    # a size that is read off the region's own values would depend on the call that replaces them
    carriers = {e: carrier for e, carrier in graph.carriers.items() if carrier[0] not in found.calls}
    emit = Emitter(graph.gm, before, carriers, graph.made)
    for n in list(found.calls):
        for user in [u for u in n.users if op_name(u) == "sym_size"]:
            size: Any = Emitter(graph.gm, user, carriers, graph.made).size(dims(n)[user.args[1]])  # type: ignore[index]
            user.replace_all_uses_with(size, propagate_meta=False)
    program, inputs, sizes = _program(emit, found, facts, compiled)
    seed = emit.seed(value(found.final).device) if found.random else None
    made = emit.call(target, inputs, sizes, seed, program.to_json())
    replaced = []
    for at, old in enumerate(found.results):
        replaced.append((old, own(emit, facts, like(emit, emit.call(operator.getitem, made, at), old), old)))
    inside = set(found.calls)
    for old, new in replaced:
        take_place(new, old, lambda u: u not in inside)
    return replaced


def _program(
    emit: Emitter, found: Region, facts: Facts, compiled: bool
) -> tuple[RowProgram, list[Node], list[int | Node]]:
    narrowed = found.narrowed
    made = list((narrowed or found).calls.values())
    read = list(dict.fromkeys(x for m in made for x in operands(m) if not found.holds(x)))
    numbers: dict[Any, int] = {x: at for at, x in enumerate([*read, *found.numbers, *found.calls])}
    read.extend(Along(emit.tensor(n), NONE) for n in found.numbers)
    inputs = [x.node for x in read]
    sizes: dict[Expr, int] = {}

    def size(n: Any) -> int | Ref:
        e = size_expr(n)
        return int(e.value) if e.op == "const" else Ref("size", sizes.setdefault(e, len(sizes)))  # type: ignore[call-overload]

    def text(x: Any) -> Any:
        if isinstance(x, Along):
            return Ref("value", numbers[x.node if found.holds(x) else x])
        if isinstance(x, Node):
            held = value(x)
            if isinstance(held, int | torch.SymInt):
                return size(held)
            return Ref("value", numbers[Along(x, NONE)]) if is_tensor(x) else Ref("number", numbers[x])
        if isinstance(x, torch.dtype | torch.layout | torch.memory_format):
            kind = {torch.dtype: "dtype", torch.layout: "layout"}.get(type(x), "memory_format")
            return Ref(kind, str(x).removeprefix("torch."))
        if isinstance(x, torch.device):
            return Ref("device", str(x))
        if isinstance(x, list | tuple):
            return tuple(text(a) for a in x)
        if x is None or isinstance(x, bool | int | float | str | Ref):
            return x
        raise CannotEmit(f"an argument of type {type(x).__name__} cannot be stored in a row program")

    calls = tuple(Call(m.op, text(m.args), tuple((k, text(v)) for k, v in m.kwargs.items())) for m in made)
    results = []
    for n in found.results:
        row = found.rows[n]
        shape = [ROWS if d == row else size(s) for d, s in enumerate(value(n).shape)]
        dtype = str(value(n).dtype).removeprefix("torch.")
        results.append(Result(numbers[n], None if row == NONE else row, tuple(shape), dtype, memory_order(n)))
    weight = size(found.weight)
    taught = facts.differentiable & learning(found.results, inputs)
    rows = tuple(None if x.dim == NONE else x.dim for x in read)
    keys = tuple(None if x.keys == NONE else x.keys for x in read)
    live = Live(keys, to_json([narrowed.score]), narrowed.least) if narrowed else None
    program = RowProgram(rows, tuple(n in taught for n in inputs), weight, calls, tuple(results), compiled, live)
    return program, inputs, [emit.size(e) for e in sizes]
