"""Rewriting: one attnfx::attention call for each decided match, and nothing left of what it replaces.

Needs the graph that the matches were found in; changes it in place. Promises that the graph's inputs and outputs keep
their shapes, dtypes and strides; `check` says so in code.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.mask.runtime_summary import Summary
from attnfx.passes.fx.analysis import detached, written_operands
from attnfx.passes.fx.nodes import MARKS, dims, fake_mode, is_tensor, size_expr, value
from attnfx.passes.lift.access import radix
from attnfx.passes.lift.tables import Index
from attnfx.passes.match.results import Match, Reduction
from attnfx.passes.match.spec_builder import Operand, extent
from attnfx.spec import AXES

aten = torch.ops.aten
STACK = ("stack_trace", "nn_module_stack", "source_fn_stack")  # where in the user's code a node is from


class CannotEmit(Exception):
    """The views that an operand needs cannot be written; the site is kept."""


class Operators(NamedTuple):
    """The overloads of torch.ops.attnfx: attention, attention_weights, attention_weights_max and mask_summary."""

    attention: Any
    weights: Any
    largest: Any
    summary: Any


Carriers = dict[Expr, tuple[Node, int | None]]


def size_carriers(gm: GraphModule) -> Carriers:
    """Where each symbolic size can be read: an input that is the size itself, or the first tensor that has it as a
    dimension. A size is bound before what it sizes, so the first carrier stands before every site that needs it."""
    found: Carriers = {}
    for n in gm.graph.nodes:
        held = value(n)
        if n.op == "placeholder" and isinstance(held, torch.SymInt):
            found.setdefault(size_expr(held), (n, None))
    for n in gm.graph.nodes:
        if is_tensor(n):
            for d, extent in enumerate(dims(n)):
                if extent.op != "const":
                    found.setdefault(extent, (n, d))
    return found


class Emitter:
    """Inserts nodes before one node, with example values; sizes are expressions."""

    def __init__(self, gm: GraphModule, before: Node, carriers: Carriers | None = None):
        self.gm, self.graph, self.before = gm, gm.graph, before
        self.carriers = carriers or {}
        self.sizes: dict[Expr, Node] = {}
        self.kept = {k: v for k, v in before.meta.items() if k in (*STACK, *MARKS)}

    def call(self, target, *args: Any, **kwargs: Any) -> Node:  # type: ignore[no-untyped-def]
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        plain: Any = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_mode(plain, self.before.meta.get("val")):
            node.meta = {**self.kept, "val": target(*plain[0], **plain[1])}  # type: ignore[index]
        return node

    def seed(self, device: torch.device) -> Node:
        """A draw of PyTorch's generator that dropout is seeded by."""
        made = self.call(aten.randint.low, -(2**63), 2**63 - 1, [1], dtype=torch.int64, device=device)
        for mark in MARKS:  # it is saved, and not drawn again
            made.meta.pop(mark, None)
        return made

    def size(self, e: Expr) -> int | Node:
        """A size as a number, or as a node that computes it."""
        if e.op == "const":
            return int(e.value)  # type: ignore[call-overload]
        if e not in self.sizes:
            self.sizes[e] = self._size(e)
        return self.sizes[e]

    def _size(self, e: Expr) -> Node:
        node, dim = self.carriers.get(e, (self.before, None))
        if node < self.before:
            return node if dim is None else self.call(aten.sym_size.int, node, dim)
        if e.op in ("add", "mul"):
            parts = [self.size(a) for a in e.args]
            out = parts[0]
            for p in parts[1:]:
                out = self.call(operator.add if e.op == "add" else operator.mul, out, p)
            assert isinstance(out, Node)
            return out
        raise CannotEmit(f"the size {e} is carried by no tensor")

    def operand(self, source: Operand, axes: list[Expr]) -> Node:
        """The operand with one dimension per axis (size 1 where it does not depend on it), in this order."""
        node, index = source.node, list(source.index)
        parts: list[list[Expr]] = []
        for d in reversed(range(len(index))):  # from the last, so that removing a dimension moves no other
            found = radix(index[d])
            if found is None:
                raise CannotEmit(f"{source.node.name} is gathered")
            offset, terms = found
            extent = dims(node)[d]
            if not terms:
                node = self.call(aten.select.int, node, d, self.size(offset))
                continue
            total = A.mul(*(v.args[0] for v, _ in terms))
            step = terms[-1][1]
            if offset is not A.ZERO or total is not extent or step is not A.ONE:
                last = A.add(offset, A.mul(step, A.add(total, A.const(-1))), A.ONE)
                if A.le(last, extent) is A.FALSE:  # a part of a `cat`, read beyond its own end
                    raise CannotEmit(f"{source.node.name} is shorter than what is read of it")
                node = self.call(aten.slice.Tensor, node, d, self.size(offset), self.size(last), self.size(step))
            parts.insert(0, [v for v, _ in terms])
        flat = [v for group in parts for v in group]
        if len(flat) != len(parts):
            node = self.call(aten.reshape.default, node, [self.size(v.args[0]) for v in flat])
        order = [flat.index(a) for a in axes if a in flat]
        if len(order) != len(flat):
            raise CannotEmit(f"{source.node.name} depends on an index that is no axis")
        if order != sorted(order):
            node = self.call(aten.permute.default, node, order)
        for at, a in enumerate(axes):
            if a not in flat:
                node = self.call(aten.unsqueeze.default, node, at)
        return node

    def shaped(self, node: Node, axes: list[Expr], shape: list[Expr]) -> Node:
        """Expand where an axis of the operand has size 1 and is larger, then reshape."""
        want = [a.args[0] for a in axes]
        if any(h is not w for h, w in zip(dims(node), want, strict=True)):
            node = self.call(aten.expand.default, node, [self.size(w) for w in want])
        if list(dims(node)) != shape:
            node = self.call(aten.reshape.default, node, [self.size(n) for n in shape])
        return node


def dimensions(match: Match) -> dict[str, Expr]:
    """B, H, G, T, S, D, Dv of the operator call."""
    sizes = {letter: extent(axes) for letter, axes in match.letters.items()}
    return {
        "B": sizes["b"], "G": extent(match.kv_axes[-1:] if len(match.kv_axes) > 1 else []), "H": sizes["h"],
        "T": sizes["i"], "S": sizes["j"], "D": match.width.args[0], "Dv": match.value_width.args[0],
    }  # fmt: skip


def rewrite(
    gm: GraphModule, match: Match, operators: Operators, tier: str, carriers: Carriers,
    reductions: Sequence[Reduction], summary: Summary | None = None, fused: tuple[float, bool] | None = None,
) -> list[tuple[Node, Node]]:  # fmt: skip
    """Insert the operator and let all users of `match.final` read it; those of `reductions` likewise read sums of the
    weights. With `summary`, the mask is summarised first. With `fused`, (scale, causal), PyTorch's own operator is
    called instead; it gives no sums. Gives each node that was replaced, `match.final` first, and what stands for it.
    Raises CannotEmit before changing users.

    `operators` are given by the caller: passes know no kernels.
    """
    final = match.final
    emit = Emitter(gm, min([final, *(r.final for r in reductions)]), carriers)
    n = dimensions(match)
    kv, axes = match.kv_axes, match.axes
    sources = {x.node for x in (match.query, match.key, match.value)}
    cut_off = detached([final, *(r.final for r in reductions)], sources)

    def operand(source: Operand, axes: list[Expr]) -> Node:
        made = emit.operand(source, axes)  # behind a detach it has no gradient, not one of zeros
        return emit.call(aten.detach.default, made) if source.node in cut_off else made

    q = operand(match.query, [*axes, match.row, match.width])
    k = operand(match.key, [*kv, match.column, match.width])
    v = operand(match.value, [*kv, match.column, match.value_width])
    q = emit.shaped(q, [*axes, match.row, match.width], [n["B"], n["H"], n["T"], n["D"]])
    k = emit.shaped(k, [*kv, match.column, match.width], [n["B"], n["G"], n["S"], n["D"]])
    v = emit.shaped(v, [*kv, match.column, match.value_width], [n["B"], n["G"], n["S"], n["Dv"]])
    dtypes = [value(x).dtype for x in (q, k, v)]  # type: ignore[union-attr]
    if len(set(dtypes)) > 1:
        wide = max(dtypes, key=lambda t: torch.finfo(t).bits)
        q, k, v = (
            x if t == wide else emit.call(aten.to.dtype, x, wide) for x, t in zip((q, k, v), dtypes, strict=True)
        )
    full = [*kv, *match.group_axes, match.row, match.value_width]
    if fused is not None:
        assert not reductions
        out = _fused(emit, q, k, v, *fused, grouped=n["G"] is not n["H"])
        return _instead([(final, like(emit, _ordered(emit, out, full, match.out_index), final))])
    seed = emit.seed(value(q).device) if match.spec.random else None
    captures, given = _arguments(emit, match)
    states = []
    if summary is not None:
        named = dict(zip(match.spec.sizes, given))
        sizes = [*(emit.size(n[size]) for size in AXES.values()), *(named[name] for name in summary.names)]
        states = [emit.call(operators.summary, [captures[s] for s in summary.slots], sizes, summary.spec.to_json())]
    made = emit.call(operators.attention, q, k, v, captures, given, seed, match.spec.to_json(), tier, *states)
    out = emit.call(operator.getitem, made, 0)
    replaced = [(final, like(emit, _ordered(emit, out, full, match.out_index), final))]
    for r in reductions:
        logsumexp = emit.call(operator.getitem, made, 1)
        if r.kind == "logsumexp":
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
    return _instead(replaced)


def _fused(emit: Emitter, q: Node, k: Node, v: Node, scale: float, causal: bool, grouped: bool) -> Node:
    """The call of PyTorch's fused operator, whose kernels want the last dim without holes, and rows that start where
    they can load 16 bytes at once."""
    packed = (x if _loads_whole(value(x)) else emit.call(aten.contiguous.default, x) for x in (q, k, v))
    call = aten.scaled_dot_product_attention.default
    return emit.call(call, *packed, None, 0.0, causal, scale=scale, enable_gqa=grouped)


def _loads_whole(x: torch.Tensor) -> bool:
    step = 16 // x.element_size()
    starts = (*x.stride()[:-1], x.storage_offset())
    return x.stride(-1) == 1 and all(statically_known_true(n % step == 0) for n in starts)


def _instead(replaced: list[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
    """Lets the users of each first node read the second."""
    for old, new in replaced:
        new.meta = {**old.meta, **new.meta}
        old.replace_all_uses_with(new, propagate_meta=False)
    return replaced


def _arguments(emit: Emitter, source: Match | Reduction) -> tuple[list[Node], list[int | Node]]:
    return [_tensor(emit, c) for c in source.captures], [emit.size(A.size(name)) for name in source.sizes]


def _total(emit: Emitter, made: Node, axes: list[Expr], r: Reduction) -> Node:
    """From a sum over whole axes of (b, h, i, j) to the sum or the mean that is asked for, over `axes`."""
    named = frozenset().union(*(x.free for x in r.kept))
    if [a.args[0] for a in axes] != list(dims(made)):
        made = emit.call(aten.reshape.default, made, [emit.size(a.args[0]) for a in axes])
    if gone := [d for d, a in enumerate(axes) if a.value not in named]:
        made = emit.call(aten.sum.dim_IntList, made, gone)
        axes = [a for a in axes if a.value in named]
    if r.count is not None:
        made = emit.call(aten.div.Scalar, made, emit.size(r.count))
    return _ordered(emit, made, axes, r.kept)


def _tensor(emit: Emitter, capture: Node) -> Node:
    """A capture as a tensor: a symbolic number is the tensor that it was read from."""
    if is_tensor(capture):
        return capture
    if capture.op == "call_method" and capture.target == "item":
        return capture.args[0]  # type: ignore[return-value]
    return emit.call(aten.scalar_tensor.default, capture, dtype=torch.float64)


def _ordered(emit: Emitter, out: Node, axes: list[Expr], wanted: Index) -> Node:
    """With one dimension for each of the axes, in the order in which the index `wanted` names them."""
    if [a.args[0] for a in axes] != list(dims(out)):
        out = emit.call(aten.reshape.default, out, [emit.size(a.args[0]) for a in axes])
    named: list[Expr] = []
    for x in wanted:
        found = radix(x)
        if found is None:
            raise CannotEmit("the output is gathered")
        named.extend(v for v, _ in found[1] if v in axes)
    missing = [a for a in axes if a not in named]
    if any(a.args[0] is not A.ONE for a in missing):
        raise CannotEmit("an axis is missing from the output")
    order = [axes.index(a) for a in (*named, *missing)]
    return emit.call(aten.permute.default, out, order) if order != sorted(order) else out


def like(emit: Emitter, out: Node, final: Node) -> Node:
    """To the shape, dtype and memory layout of the node that is replaced."""
    if list(dims(out)) != list(dims(final)):
        out = emit.call(aten.reshape.default, out, [emit.size(x) for x in dims(final)])
    have, want = value(out), value(final)
    if have.dtype != want.dtype:  # type: ignore[union-attr]
        out = emit.call(aten.to.dtype, out, want.dtype)  # type: ignore[union-attr]
    if want.is_contiguous() and not have.is_contiguous() and _layout_matters(final, have):
        out = emit.call(aten.contiguous.default, out)
    return out


LOOKAHEAD = 40  # nodes after a site in which its output's layout must have been absorbed


def _layout_matters(final: Node, out: torch.Tensor) -> bool:
    """Whether other strides than the original's show anywhere: in a view that they forbid, in what the graph returns.

    Runs the readers on example values with the strides that they would see, until each gives the original's again.
    """
    changed: dict[Node, torch.Tensor] = {final: out}
    waiting = set(final.users)
    n = final
    for _ in range(LOOKAHEAD):
        if not waiting:
            return False
        n = n.next
        if n not in waiting:
            continue
        waiting.discard(n)
        held = value(n)
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload) or n.target._schema.is_mutable:
            return True
        if not isinstance(held, torch.Tensor):
            return True
        args: Any = torch.fx.map_arg((n.args, n.kwargs), lambda x: changed.get(x, x.meta["val"]))
        try:
            with fake_mode(args, held):
                made = n.target(*args[0], **args[1])
        except (RuntimeError, ValueError):  # what example values raise for a view that the strides forbid
            return True
        if made.stride() != held.stride():
            changed[n] = made
            waiting.update(n.users)
    return True


UNREAD = "attnfx_unread"  # marks a random draw that nothing read when the graph was traced


def mark_unread_draws(gm: GraphModule) -> None:
    """Mark the random draws that nothing reads: dropping one would change all draws after it."""
    dead: set[Node] = set()
    for n in reversed(gm.graph.nodes):
        if not _impure(n) and all(u in dead for u in n.users):
            dead.add(n)
            if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
                n.meta[UNREAD] = True


def clean(gm: GraphModule) -> None:
    """Eliminate dead code in this graph alone: in-place operators, regions and unread random draws of the user stay,
    and so do the bodies of higher-order operators, which FX's own elimination enters."""
    for n in reversed(list(gm.graph.nodes)):
        if not n.users and not _impure(n) and UNREAD not in n.meta:
            gm.graph.erase_node(n)
    gm.recompile()


def _impure(n: Node) -> bool:
    if n.op in ("placeholder", "output") or written_operands(n):
        return True
    known = isinstance(n.target, torch._ops.OpOverload) or getattr(n.target, "__module__", "") == "_operator"
    return n.op == "call_function" and not known


def check(gm: GraphModule) -> None:
    """The invariants of a graph between passes; AssertionError names what is broken."""
    gm.graph.lint()
    for n in gm.graph.nodes:
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.returns:
            assert "val" in n.meta, f"{n.name} has no example value"


__all__ = ["CannotEmit", "Operators", "check", "clean", "dimensions", "like", "mark_unread_draws", "rewrite"]
