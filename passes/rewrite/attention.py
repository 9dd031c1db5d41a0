"""Replace each decided match by one attnfx::attention call, so that the nodes of the match become dead code.

Needs the graph that the matches were found in; changes it in place. Promises that the graph's inputs and outputs keep
their shapes, dtypes and strides.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.mask.runtime_summary import Summary
from attnfx.passes.fx.analysis import Facts, learning
from attnfx.passes.fx.nodes import dims, take_place, value
from attnfx.passes.lift.access import Operand, extent, radix
from attnfx.passes.lift.emitter import CannotEmit, Emitter, like, own
from attnfx.passes.lift.graph import Graph
from attnfx.passes.lift.tables import Index
from attnfx.passes.match.results import Match, Reduction
from attnfx.passes.rewrite.flex import flex as emit_flex
from attnfx.spec import AXES

aten = torch.ops.aten


class Operators(NamedTuple):
    """The overloads of torch.ops.attnfx: attention, attention_weights, attention_weights_max and mask_summary."""

    attention: Any
    weights: Any
    largest: Any
    summary: Any


def dimensions(match: Match) -> dict[str, Expr]:
    """Return B, H, G, T, S, D, Dv of the operator call."""
    sizes = {letter: extent(axes) for letter, axes in match.letters.items()}
    return {
        "B": sizes["b"], "G": extent(match.kv_axes[-1:] if len(match.kv_axes) > 1 else []), "H": sizes["h"],
        "T": sizes["i"], "S": sizes["j"], "D": match.width.args[0], "Dv": match.value_width.args[0],
    }  # fmt: skip


def rewrite(
    graph: Graph, facts: Facts, match: Match, operators: Operators, tier: str, reductions: Sequence[Reduction],
    summary: Summary | None = None, fused: tuple[float, bool, bool] | None = None, flex: Any = None,
) -> list[tuple[Node, Node]]:  # fmt: skip
    """Insert the operator, and let all users of `match.final` read it. Return each replaced node with its replacement,
    `match.final` first. Raises CannotEmit before changing users.

    Users of `reductions` read reductions of the weights, which further calls compute. With `summary`, the mask is
    summarized first. With `fused`, (scale, causal, flash), PyTorch's own operator is called instead, which cannot
    return them; `flash` asks for the operator of FlashAttention. With `flex`, an `attnfx.kernels.flex.tier.Call`,
    PyTorch's `flex_attention` is called.

    `facts` are the facts of the graph before any rewriting. The caller supplies `operators`: passes import no kernels.
    """
    final = match.final
    emit = graph.emitter(min([final, *(r.final for r in reductions)]))
    n = dimensions(match)
    kv, axes = match.kv_axes, match.axes
    sources = {n for x in match.operands for n in x.nodes}
    taught = learning([final, *(r.final for r in reductions)], sources)

    def operand(source: Operand, axes: list[Expr]) -> Node:
        made = emit.operand(source, axes)  # a detached operand must not get a gradient of zeros
        return emit.call(aten.detach.default, made) if taught.isdisjoint(source.nodes) else made

    query, key, val = match.operands
    q = operand(query, [*axes, match.row, match.width])
    k = operand(key, [*kv, match.column, match.width])
    v = operand(val, [*kv, match.column, match.value_width])
    q = emit.shaped(q, [*axes, match.row, match.width], [n["B"], n["H"], n["T"], n["D"]])
    k = emit.shaped(k, [*kv, match.column, match.width], [n["B"], n["G"], n["S"], n["D"]])
    v = emit.shaped(v, [*kv, match.column, match.value_width], [n["B"], n["G"], n["S"], n["Dv"]])
    wide = max((value(x).dtype for x in (q, k, v)), key=lambda t: torch.finfo(t).bits)
    q, k, v = (x if value(x).dtype == wide else emit.call(aten.to.dtype, x, wide) for x in (q, k, v))
    full = [*kv, *match.group_axes, match.row, match.value_width]
    if fused is not None:
        assert not reductions
        out = _fused(emit, q, k, v, *fused, grouped=n["G"] is not n["H"])
        return _instead(emit, facts, [(final, like(emit, _ordered(emit, out, full, match.out_index), final))])
    seed = emit.seed(value(q).device) if match.spec.random else None
    captures, given = _arguments(emit, match)
    named = dict(zip(match.spec.sizes, given))
    logsumexp: Node | None = None
    if flex is not None:
        sizes = {size: emit.size(n[size]) for size in AXES.values()} | named
        out, logsumexp = emit_flex(emit, flex, q, k, v, captures, sizes, bool(reductions))
    else:
        states = []
        if summary is not None:
            counts = [*(emit.size(n[size]) for size in AXES.values()), *(named[name] for name in summary.names)]
            held = [captures[s] for s in summary.slots]
            states = [emit.call(operators.summary, held, counts, summary.spec.to_json())]
        made = emit.call(operators.attention, q, k, v, captures, given, seed, match.spec.to_json(), tier, *states)
        out = emit.call(operator.getitem, made, 0)
        logsumexp = emit.call(operator.getitem, made, 1) if reductions else None
    replaced = [(final, like(emit, _ordered(emit, out, full, match.out_index), final))]
    for r in reductions:
        if r.kind == "logsumexp":
            assert logsumexp is not None
            rows = [a for letter in "bhi" for a in r.axes[letter]]
            replaced.append((r.final, like(emit, _ordered(emit, logsumexp, rows, r.kept), r.final)))
            continue
        drawn = seed if r.spec.random else None
        operands = [q, k, logsumexp]
        if r.kind == "rows":
            end = r.start + emit.size(extent(r.axes["i"]))  # type: ignore[operator]
            operands[::2] = [emit.call(aten.slice.Tensor, x, 2, r.start, end) for x in (q, logsumexp)]
        named = frozenset().union(*(x.free for x in r.kept))
        keep = [letter for letter, axes in r.axes.items() if r.kind == "rows" or any(a.value in named for a in axes)]
        given = [*operands, *_arguments(emit, r), drawn, r.spec.to_json()]
        if r.kind in ("max", "argmax"):
            keep = [letter for letter in AXES if letter != r.over]
            largest = emit.call(operators.largest, *given, r.over)
            weights = emit.call(operator.getitem, largest, int(r.kind == "argmax"))
        else:
            weights = emit.call(operators.weights, *given, "".join(keep))
        left = [a for letter in keep for a in r.axes[letter]]
        replaced.append((r.final, like(emit, _total(emit, weights, left, r), r.final)))
    return _instead(emit, facts, replaced)


def _fused(emit: Emitter, q: Node, k: Node, v: Node, scale: float, causal: bool, flash: bool, grouped: bool) -> Node:
    """Emit the call of PyTorch's fused operator. Its kernels need a last dim without gaps, and rows that start where
    they can load 16 bytes at once."""
    packed = (x if _loads_whole(value(x)) else emit.call(aten.contiguous.default, x) for x in (q, k, v))
    if flash:
        made = emit.call(aten._scaled_dot_product_flash_attention.default, *packed, 0.0, causal, False, scale=scale)
        return emit.call(operator.getitem, made, 0)
    call = aten.scaled_dot_product_attention.default
    return emit.call(call, *packed, None, 0.0, causal, scale=scale, enable_gqa=grouped)


def _loads_whole(x: torch.Tensor) -> bool:
    step = 16 // x.element_size()
    starts = (*x.stride()[:-1], x.storage_offset())
    return x.stride(-1) == 1 and all(statically_known_true(n % step == 0) for n in starts)


def _instead(emit: Emitter, facts: Facts, replaced: list[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
    """Let the users of each old node read its new one; return the pairs."""
    replaced = [(old, own(emit, facts, new, old)) for old, new in replaced]
    for old, new in replaced:
        take_place(new, old)
    return replaced


def _arguments(emit: Emitter, source: Match | Reduction) -> tuple[list[Node], list[int | Node]]:
    return [emit.tensor(c) for c in source.captures], [emit.size(A.size(name)) for name in source.sizes]


def _total(emit: Emitter, made: Node, axes: list[Expr], r: Reduction) -> Node:
    """Reduce a sum over whole axes of (b, h, i, j) to the requested sum or mean. `axes` are its dimensions."""
    named = frozenset().union(*(x.free for x in r.kept))
    if [a.args[0] for a in axes] != list(dims(made)):
        made = emit.call(aten.reshape.default, made, [emit.size(a.args[0]) for a in axes])
    if gone := [d for d, a in enumerate(axes) if a.value not in named]:
        made = emit.call(aten.sum.dim_IntList, made, gone)
        axes = [a for a in axes if a.value in named]
    if r.count is not None:
        made = emit.call(aten.div.Scalar, made, emit.size(r.count))
    return _ordered(emit, made, axes, r.kept)


def _ordered(emit: Emitter, out: Node, axes: list[Expr], wanted: Index) -> Node:
    """Return `out` with one dimension for each axis, in the order in which the index `wanted` names them."""
    if [a.args[0] for a in axes] != list(dims(out)):
        out = emit.call(aten.reshape.default, out, [emit.size(a.args[0]) for a in axes])
    named: list[Expr] = []
    for x in wanted:
        found = radix(x)
        if found is None:
            raise CannotEmit("the output is read at computed positions")
        named.extend(v for v, _ in found[1] if v in axes)
    missing = [a for a in axes if a not in named]
    if any(a.args[0] is not A.ONE for a in missing):
        raise CannotEmit("the output lacks a dimension of the attention")
    order = [axes.index(a) for a in (*named, *missing)]
    return emit.call(aten.permute.default, out, order) if order != sorted(order) else out
