"""Emit FX nodes for index expressions: operands as views, sizes, and results laid out like the nodes they replace."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.analysis import Facts
from attnfx.passes.fx.nodes import MARKS, STACK, dims, fake_mode, is_tensor, label, size_expr, value
from attnfx.passes.lift.access import Operand, end, radix

aten = torch.ops.aten


class CannotEmit(Exception):
    """The views that an operand needs cannot be expressed; the site is kept, with `facts` for the advice."""

    def __init__(self, message: str, **facts: object):
        super().__init__(message)
        self.facts = facts


Carriers = dict[Expr, tuple[Node, int | None]]


def size_carriers(gm: GraphModule) -> Carriers:
    """Map each symbolic size to its carrier: the first node that is the size, or is a tensor with that dimension. A
    size is bound before it is used, so the first carrier comes before every site that needs it."""
    found: Carriers = {}
    for n in gm.graph.nodes:
        held = value(n)
        if isinstance(held, torch.SymInt):
            found.setdefault(size_expr(held), (n, None))
        elif is_tensor(n):
            for d, extent in enumerate(dims(n)):
                found.setdefault(extent, (n, d))
    return found


class Emitter:
    """A builder that inserts nodes with example values before one node, and appends them to `made`. Sizes are
    expressions."""

    def __init__(
        self, gm: GraphModule, before: Node, carriers: Carriers | None = None, made: list[Node] | None = None
    ) -> None:
        self.gm, self.graph, self.before = gm, gm.graph, before
        self.carriers = carriers or {}
        self.made = [] if made is None else made
        self.sizes: dict[Expr, Node] = {}
        self.kept = {k: v for k, v in before.meta.items() if k in (*STACK, *MARKS)}

    def call(self, target, *args: Any, **kwargs: Any) -> Node:  # type: ignore[no-untyped-def]
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        self.made.append(node)
        plain: Any = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_mode(plain, self.before.meta.get("val")):
            node.meta = {**self.kept, "val": target(*plain[0], **plain[1])}  # type: ignore[index]
        return node

    def seed(self, device: torch.device) -> Node:
        """Emit a random number of PyTorch's generator as the seed of dropout."""
        made = self.call(aten.randint.low, -(2**63), 2**63 - 1, [1], dtype=torch.int64, device=device)
        for mark in MARKS:  # the seed is saved: recomputation would draw another one
            made.meta.pop(mark, None)
        return made

    def tensor(self, x: Node) -> Node:
        """Return a symbolic number as the tensor that it was read from, or as a new one; a tensor as it is."""
        if is_tensor(x):
            return x
        if x.op == "call_method" and x.target == "item":
            return x.args[0]  # type: ignore[return-value]
        return self.call(aten.scalar_tensor.default, x, dtype=torch.float64)

    def size(self, e: Expr) -> int | Node:
        """Return a size as an int, or as a node that computes it."""
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
        raise CannotEmit(f"the size {e} cannot be read off a tensor", unread=e)

    def operand(self, source: Operand, axes: list[Expr]) -> Node:
        """Emit the operand with one dimension per axis, in this order (size 1 if it does not depend on the axis)."""
        node, index = source.node, list(source.index)
        if source.parts:
            node = self.call(aten.stack.default, list(source.parts), 0)
        parts: list[list[Expr]] = []
        for d in reversed(range(len(index))):  # from the last, so that removing one does not shift the others
            found = radix(index[d])
            if found is None:
                raise CannotEmit(f"{label(source.node)} is gathered at computed positions")
            offset, terms = found
            extent = dims(node)[d]
            if not terms:
                node = self.call(aten.select.int, node, d, self.size(offset))
                continue
            total = A.mul(*(v.args[0] for v, _ in terms))
            step = terms[-1][1]
            if offset is not A.ZERO or total is not extent or step is not A.ONE:
                last = end(offset, terms)
                node = self.call(aten.slice.Tensor, node, d, self.size(offset), self.size(last), self.size(step))
            parts.insert(0, [v for v, _ in terms])
        flat = [v for group in parts for v in group]
        if len(flat) != len(parts):
            node = self.call(aten.reshape.default, node, [self.size(v.args[0]) for v in flat])
        order = [flat.index(a) for a in axes if a in flat]
        if len(order) != len(flat):
            raise CannotEmit(f"{label(source.node)} depends on another index than those of the attention")
        if order != sorted(order):
            node = self.call(aten.permute.default, node, order)
        for at, a in enumerate(axes):
            if a not in flat:
                node = self.call(aten.unsqueeze.default, node, at)
        return node

    def shaped(self, node: Node, axes: list[Expr], shape: list[Expr]) -> Node:
        """Expand the operand along axes larger than its size 1 there, then reshape it."""
        want = [a.args[0] for a in axes]
        if any(h is not w for h, w in zip(dims(node), want, strict=True)):
            node = self.call(aten.expand.default, node, [self.size(w) for w in want])
        if list(dims(node)) != shape:
            node = self.call(aten.reshape.default, node, [self.size(n) for n in shape])
        return node


def like(emit: Emitter, out: Node, final: Node) -> Node:
    """Convert a result to the shape, dtype and memory layout of the node that it replaces."""
    if list(dims(out)) != list(dims(final)):
        out = emit.call(aten.reshape.default, out, [emit.size(x) for x in dims(final)])
    have, want = value(out), value(final)
    if have.dtype != want.dtype:  # type: ignore[union-attr]
        out = emit.call(aten.to.dtype, out, want.dtype)  # type: ignore[union-attr]
    if have.stride() == want.stride() or not _layout_matters(final, have):
        return out
    if want.is_contiguous():
        return emit.call(aten.contiguous.default, out)
    if any(not isinstance(n, torch.SymInt) and n == 0 for n in want.stride()):
        return out
    sizes, strides = ([emit.size(size_expr(n)) for n in found] for found in (want.shape, want.stride()))
    base = emit.call(aten.new_empty_strided.default, out, sizes, strides)
    return emit.call(aten.copy_.default, base, out)


def own(emit: Emitter, facts: Facts, out: Node, final: Node) -> Node:
    """Return `out` with the gradient and the memory of the value that it replaces: detached if that requires no
    gradient, copied if the graph writes to it in place, because an operator may have saved its output. `facts` are
    those of the graph before any rewriting."""
    learns = final in facts.differentiable or final not in facts.regions or not value(final).is_floating_point()
    if not learns and torch.is_grad_enabled():
        out = emit.call(aten.detach.default, out)
    return emit.call(aten.clone.default, out) if final in facts.regions and facts.changed_after(final) else out


LOOKAHEAD = 40  # nodes after a site within which a changed layout must disappear


def _layout_matters(final: Node, out: torch.Tensor) -> bool:
    """Return whether other strides than the original's are visible: in a view that they forbid, or in an output. Runs
    the readers on example values with the new strides, until each result has the original's strides again."""
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
        except (RuntimeError, ValueError):  # raised for a view that the strides forbid
            return True
        if made.stride() != held.stride():
            changed[n] = made
            waiting.update(n.users)
    return True
