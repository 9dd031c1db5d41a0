"""Emit a call of PyTorch's `flex_attention` operator: its two functions as subgraphs, its block mask, and its result.

Needs a graph as `passes/rewrite/attention.py` does. The caller supplies the call, an `attnfx.kernels.flex.tier.Call`,
whose parts are Python functions that are traced here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from attnfx.ir.expr import Expr, walk
from attnfx.passes.fx.nodes import dims, fake_mode, value
from attnfx.passes.lift.emitter import Emitter
from attnfx.passes.rewrite.subgraph import OWN, base_of

aten = torch.ops.aten
SHARED = "attnfx_shared"  # marks the nodes of a block mask: all sites with the mask share them
# The partition of the keys for a single query on a CPU, which PyTorch compiles apart if tiles divide it. That kernel
# loses rows whose scores are far below zero next to a partition without a live key.
CPU_OPTIONS = {"PARTITION_SIZE": 64}
FLASH_OPTIONS = {"BACKEND": "FLASH"}
LARGEST = 1e25  # product of two elements that leaves room for their sum, and for the program to multiply it


def flex(
    emit: Emitter, call: Any, query: Node, key: Node, val: Node, captures: Sequence[Node],
    sizes: Mapping[str, int | Node], summed: bool,
) -> tuple[Node, Node | None]:  # fmt: skip
    """Emit the call; return the nodes of its output (B, H, T, Dv) and, with `summed`, its log-sum-exp (B, H, T).

    captures  the spec's captures, by slot
    sizes     B, H, T, S and the spec's own sizes
    """
    site = _Site(emit, call, query, captures, sizes)
    return site.attention(query, key, val, summed)


class _Site:
    def __init__(self, emit: Emitter, call: Any, query: Node, captures: Sequence[Node],
                 sizes: Mapping[str, int | Node]) -> None:  # fmt: skip
        self.emit, self.call, self.sizes = emit, call, sizes
        self.device, self.query = value(query).device, query
        self.tensors = [*captures, *self._tables()]
        self.memory: dict[int, Node] = {}
        self.copies: dict[Node, Node] = {}
        self.known = {name: value(n) for name, n in sizes.items()}

    def _tables(self) -> list[Node]:
        names, cpu = list(self.sizes), torch.device("cpu")
        out = []
        for n, table in enumerate(self.call.form.tables):
            if table.exact or all(isinstance(size, int) for size in self.sizes.values()):
                with torch.no_grad(), unset_fake_temporarily():
                    out.append(self._constant("flex_table", self.call.table(n, self.sizes, cpu)))
            else:
                made = lambda *sizes, n=n: [self.call.table(n, dict(zip(names, sizes)), self.device)]  # noqa: E731
                out += self._inlined(made, list(self.sizes.values()), True)
        return out

    # -- parts of the graph -------------------------------------------------------------------------
    def _name(self, prefix: str) -> str:
        taken = (f"{prefix}_{n}" for n in range(len(self.emit.graph.nodes)))
        return next(name for name in taken if not hasattr(self.emit.gm, name))

    def _get(self, name: str, held: Any) -> Node:
        with self.emit.graph.inserting_before(self.emit.before):
            node = self.emit.graph.get_attr(name)
        node.meta = {**self.emit.kept, OWN: True}
        if held is not None:
            node.meta["val"] = held
        return node

    def _constant(self, prefix: str, tensor: torch.Tensor) -> Node:
        """Emit a constant of the CPU on the site's device; equal ones are one attribute."""
        absent = self.device.type == "cuda" and not torch.cuda.is_available()  # a graph that is only looked at
        tensor = tensor if absent else tensor.to(self.device)
        for name, held in self.emit.gm.named_buffers():
            same = name.startswith(prefix) and held.dtype == tensor.dtype and held.device == tensor.device
            if same and held.shape == tensor.shape and torch.equal(held, tensor):
                break
        else:
            name = self._name(prefix)
            self.emit.gm.register_buffer(name, tensor, persistent=False)
        with fake_mode(value(self.query)):
            held = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        found = self._get(name, held)
        return self.emit.call(aten.to.device, found, self.device, held.dtype) if absent else found

    def _traced(self, function: Callable[..., Any], examples: Sequence[Any]) -> GraphModule:
        with fake_mode(value(self.query)), torch.no_grad():
            return make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*examples)

    def _body(self, prefix: str, part: tuple[Any, Callable[..., Any]], scored: bool) -> tuple[Node, tuple[Any, ...]]:
        """Emit one of the operator's functions as a subgraph; return it and its operands."""
        program, function = part
        operands = []
        for slot in program.slots:
            node = self._apart(self.tensors[slot])
            if scored and self.call.learns(slot) and not dims(node):  # PyTorch differentiates loads at an index
                node = self.emit.call(aten.reshape.default, node, [1])
            operands.append(node)
        for name in program.symbolic:
            number = {"dtype": torch.int64, "device": self.device}
            operands.append(self.emit.call(aten.scalar_tensor.default, self.sizes[name], **number))
        if not scored:  # masks stop gradients
            operands = [self.emit.call(aten.detach.default, n) for n in operands]
        with fake_mode(value(self.query)):
            kinds = [value(self.query).dtype] * scored + [torch.int32] * 4
            given = [torch.zeros((), dtype=kind, device=self.device) for kind in kinds]
            given += [value(n).detach() for n in operands]
        traced = self._traced(function, given)
        for n in traced.graph.find_nodes(op="call_function", target=aten.index.Tensor):
            n.target, n.args = operator.getitem, (n.args[0], tuple(n.args[1]))  # PyTorch's form of a load
        traced.recompile()
        name = self._name(prefix)
        self.emit.gm.add_module(name, traced)
        return self._get(name, None), tuple(operands)

    def _inlined(self, function: Callable[..., Any], operands: Sequence[Node | int], shared: bool) -> list[Any]:
        """Emit the nodes that a function of tensors and sizes consists of, and return its results."""
        nodes = [n for n in operands if isinstance(n, Node)]

        def of_nodes(*held: Any) -> Any:
            found = iter(held)
            return function(*(next(found) if isinstance(n, Node) else n for n in operands))

        traced = self._traced(of_nodes, [value(n) for n in nodes])
        copies: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes))
        for n in traced.graph.nodes:
            if n.op == "output":
                return [copies.get(x) for x in n.args[0]]
            if n.op == "get_attr":
                copies[n] = self._constant("flex_constant", getattr(traced, str(n.target)))
            elif n.op != "placeholder":
                with self.emit.graph.inserting_before(self.emit.before):
                    made = self.emit.graph.node_copy(n, lambda x: copies[x])
                made.meta = {**self.emit.kept, "val": n.meta["val"], SHARED: shared}
                copies[n] = made
        raise AssertionError("a traced graph ends with its output")

    # -- block mask ------------------------------------------------------------------------------------
    def _tiles(self, backward: bool) -> list[Node | None]:
        form, call = self.call.form, self.call
        slots = call.slots(form.tiles)
        tensors = [self.tensors[s] for s in slots]
        names = [name for name, n in self.sizes.items() if isinstance(n, Node)]
        used = {str(e.value) for e in walk(form.tiles) if e.op == "size"} | {"T", "S"}
        used |= {size for letter, size in zip("bh", "BH") if letter in form.tiles.free}
        names = [name for name in names if name in used]
        known = {name: n for name, n in self.sizes.items() if isinstance(n, int)}

        constant = not tensors and not names  # known at compile time
        device = torch.device("cpu") if constant else self.device

        def tiles(*given: Any) -> list[torch.Tensor | None]:
            captures = dict(zip(slots, given))
            sizes = {**dict.fromkeys(self.sizes, None), **known, **dict(zip(names, given[len(slots) :]))}
            return call.tiles(captures, sizes, device, backward)

        if constant:
            with torch.no_grad(), unset_fake_temporarily():
                found = enumerate(tiles())
                return [None if x is None else self._constant(f"flex_tiles_{n}", x) for n, x in found]
        tensors = [self.emit.call(aten.detach.default, n) if value(n).requires_grad else n for n in tensors]
        return self._inlined(tiles, [*tensors, *(self.sizes[name] for name in names)], True)

    # -- the call ----------------------------------------------------------------------------------------
    def attention(self, query: Node, key: Node, val: Node, summed: bool) -> tuple[Node, Node | None]:
        emit, call = self.emit, self.call
        on_cpu = call.dead and not call.gpu  # without the log-sum-exp
        overflows = on_cpu and call.form.finite and self._tables_are_finite()
        counted = on_cpu and not overflows  # a column of ones sums the weights
        huge = self._huge(query, key) if overflows else None
        if counted:
            size = [self.sizes["B"], self._size(val, 1), self.sizes["S"], 1]
            ones = emit.call(aten.new_ones.default, val, size)
            val = emit.call(aten.cat.default, [val, ones], 3)
        lse = summed or bool(call.spec.extra) or (call.dead and call.gpu)
        made = self._operator(self._whole(query), self._whole(key), self._whole(val), lse)
        out, logsumexp = emit.call(operator.getitem, made, 0), None
        if lse:
            logsumexp = emit.call(aten.mul.Tensor, emit.call(operator.getitem, made, 1), call.unit)
        if counted:
            width = self._size(val, 3, -1)
            total = emit.call(aten.slice.Tensor, out, 3, width)
            out = self._lost(emit.call(aten.slice.Tensor, out, 3, 0, width), emit.call(aten.eq.Scalar, total, 0.0))
        elif huge is not None:
            out = self._lost(out, self._inlined(_zero_if, [out, huge], False)[0])
        elif call.dead:
            dead = emit.call(aten.eq.Scalar, logsumexp, float("-inf"))
            out = self._lost(out, emit.call(aten.unsqueeze.default, dead, -1))
        if call.spec.extra:
            out, logsumexp = self._with_extra(out, logsumexp)
        return out if call.form.factor is None else self._times(out, self._by_row(call.form.factor)), logsumexp

    def _tables_are_finite(self) -> bool:
        tables = self.tensors[len(self.call.spec.captures) :]
        return all(n.op == "get_attr" and bool(getattr(self.emit.gm, str(n.target)).isfinite().all()) for n in tables)

    def _huge(self, query: Node, key: Node) -> Node:
        """Emit whether a product may leave the range of numbers. Otherwise every row with a live key has a finite
        score; a row whose scores are all -inf is zero."""

        def huge(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
            most = q.abs().amax().to(self.call.compute) * k.abs().amax().to(self.call.compute)
            return [torch.logical_not(most * max(1.0, abs(self.call.form.scale)) < LARGEST)]

        return self._inlined(huge, [query, key], False)[0]

    def _lost(self, out: Node, dead: Node) -> Node:
        """Make the rows without a live key NaN, and their gradients, as in eager."""
        return self._times(out, self.emit.call(aten.where.Scalar, dead, float("nan"), 1.0))

    def _times(self, out: Node, factor: Node) -> Node:
        factor = self.emit.call(aten.to.dtype, factor, value(out).dtype)
        return self.emit.call(aten.mul.Tensor, out, factor)

    def _size(self, node: Node, dim: int, more: int = 0) -> int | Node:
        n = value(node).shape[dim]
        if isinstance(n, int):
            return n + more
        found = self.emit.call(aten.sym_size.int, node, dim)
        return self.emit.call(operator.add, found, more) if more else found

    def _apart(self, capture: Node) -> Node:
        """Return a capture, copied on a CPU if it views memory of another operand: PyTorch's generated code names an
        operand by its memory."""
        first = self.memory.setdefault(value(capture).untyped_storage()._cdata, capture)
        if self.call.gpu or first is capture:
            return capture
        if capture not in self.copies:
            self.copies[capture] = self._copied(capture)
        return self.copies[capture]

    def _whole(self, operand: Node) -> Node:
        """Return query, key or value in memory of its own on a CPU, without gaps. PyTorch's generated code reads the
        sizes off that memory and needs a dense last dim, and Inductor may store a computed operand in another order: a
        view by strides fixes the order."""
        base, held = base_of(operand), value(operand)
        first = self.memory.setdefault(held.untyped_storage()._cdata, operand) is operand
        if self.call.gpu:
            return operand
        given = base.op != "call_function" and len(dims(base)) == 4
        if first and given and held.stride(-1) == 1 and held.storage_offset() == value(base).storage_offset():
            return operand
        own = torch.Tag.pointwise in getattr(base.target, "tags", ()) or base.target is aten.cat.default
        plain = first and operand is base and own and held.is_contiguous()
        made = operand if plain else self._copied(operand)
        sizes: list[Any] = [self._size(made, d) for d in range(4)]
        steps: list[Any] = [1]
        for n in sizes[:0:-1]:
            last: Any = steps[0]
            known = isinstance(n, int) and isinstance(last, int)
            steps.insert(0, n * last if known else self.emit.call(operator.mul, n, last))
        return self.emit.call(aten.as_strided.default, made, sizes, steps)

    def _copied(self, n: Node) -> Node:
        """Copy a tensor by an operator that changes no value: Inductor removes a clone with equal strides."""
        kind, n = value(n).dtype, self.emit.call(aten.contiguous.default, n)
        if kind == torch.bool:
            return self.emit.call(aten.logical_or.default, n, n)
        lowest = float("-inf") if kind.is_floating_point else torch.iinfo(kind).min
        return self.emit.call(aten.clamp_min.default, n, lowest)

    def _operator(self, query: Node, key: Node, val: Node, lse: bool) -> Node:
        from torch.nn.attention import flex_attention as library

        call, operands = self.call, (query, key, val)
        fakes = [value(n).detach() for n in operands]
        tiles = self._tiles(torch.is_grad_enabled() and call.gpu)
        lengths = self.sizes["T"], self.sizes["S"]
        stands = {id(value(n)): n for n in (*tiles, *lengths) if isinstance(n, Node)}
        held = call.arguments([value(n) for n in tiles], [value(n) for n in lengths], _mask)
        score, loaded = self._body("flex_score", call.score(self.known), True)
        mask, masking = self._body("flex_mask", call.mask(self.known), False)
        own: Any = dict(FLASH_OPTIONS if call.flash else {} if call.gpu else CPU_OPTIONS)
        options: Any = library._apply_kernel_options(fakes[0], fakes[1], fakes[2], lse, own)
        target, rest = torch.ops.higher_order.flex_attention, (call.form.scale, options)
        listed = (*(stands.get(id(x), x) for x in held[:-1]), mask)
        with self.emit.graph.inserting_before(self.emit.before):
            node = self.emit.graph.call_function(target, (*operands, score, listed, *rest, loaded, masking))
        others = [tree_map(value, x) for x in (loaded, masking)]
        with fake_mode(value(self.query)), torch._C._AutoDispatchBelowAutograd():
            # on the CPU, which every build of PyTorch has
            cpu = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu") for x in fakes]
            made = target(*cpu, _score, held, *rest, *others)
            made = tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device) for x in made)
        node.meta = {**self.emit.kept, "val": made}
        return node

    def _by_row(self, e: Expr) -> Node:
        """Emit an expression of the row, with four dims that broadcast over the output."""
        slots, names = self.call.slots(e), list(self.sizes)

        def rows(*given: Any) -> list[torch.Tensor]:
            captures, known = dict(zip(slots, given)), dict(zip(names, given[len(slots) :]))
            found = self.call.by_row(e, captures, known, self.device)
            return [found.reshape((1,) * (3 - found.ndim) + tuple(found.shape)).unsqueeze(-1)]

        return self._inlined(rows, [*(self.tensors[s] for s in slots), *self.sizes.values()], False)[0]

    def _with_extra(self, out: Node, logsumexp: Node | None) -> tuple[Node, Node]:
        """Include the extra logits in the softmax."""
        emit = self.emit
        logits = [emit.call(aten.squeeze.dim, self._by_row(e), -1) for e in self.call.spec.extra]
        both = logsumexp
        for logit in logits:
            both = emit.call(aten.logaddexp.default, both, logit)
        share = emit.call(aten.exp.default, emit.call(aten.sub.Tensor, logsumexp, both))
        return self._times(out, emit.call(aten.unsqueeze.default, share, -1)), both  # type: ignore[return-value]


def _zero_if(out: torch.Tensor, huge: torch.Tensor) -> list[torch.Tensor]:
    return [huge & (out == 0).all(-1, keepdim=True)]


def _score(score: torch.Tensor, *_: Any) -> torch.Tensor:
    return score


def _mask(b: torch.Tensor, *_: Any) -> torch.Tensor:
    return b >= 0
