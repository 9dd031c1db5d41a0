"""Trace a Dynamo graph to pre-dispatch ATen: matmul, softmax and dropout stay one node each, mutation stays as it was.

Needs a graph module as Dynamo passes it to a backend (placeholders carry fakes in `meta["example_value"]`). Promises a
graph module of the same calling convention, whose nodes carry `meta["val"]`, or raises `Untraceable`. The given graph
is not changed. Higher-order operators stay one node each, with their submodules as Dynamo made them; plain checkpointed
regions were inlined before (the pass `inline_checkpoints`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
from torch.utils._pytree import tree_map, tree_map_only

from attnfx.passes.fx.analysis import storage, written_operands
from attnfx.passes.fx.cleanup import mark_unread_draws
from attnfx.passes.fx.examples import Transformed, Untraceable, example
from attnfx.passes.fx.nodes import number
from attnfx.passes.lift.graph import Graph
from attnfx.passes.prepare.expand_vmap import uses_functorch

aten = torch.ops.aten
# Functions that are one operator, with a fresh result, on tensors and numbers. Dispatching them would find nothing that
# Dynamo has not seen, and would take half of the tracing time.
DIRECT = {
    operator.add: aten.add.Tensor, operator.sub: aten.sub.Tensor, operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor, operator.neg: aten.neg.default, torch.rsqrt: aten.rsqrt.default,
    torch.tanh: aten.tanh.default, torch.matmul: aten.matmul.default, torch.nn.functional.linear: aten.linear.default,
}  # fmt: skip


def _unless_cast(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Decompose an operator outside autocast, which may treat its parts in another way than the operator."""
    return NotImplemented if torch._C._is_any_autocast_enabled() else op.decompose(*args, **kwargs)


def _cosine_similarity(x: torch.Tensor, y: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    """Normalize the operands before they are broadcast; PyTorch expands them first, to a vector for each pair. As
    there, the least norm `eps` does not change the gradient."""
    if x.dtype != y.dtype or x.ndim != y.ndim or not x.is_floating_point() or torch._C._is_any_autocast_enabled():
        return NotImplemented
    if x.shape[dim] != y.shape[dim]:
        return NotImplemented
    units = []
    for a in (x, y):
        norm = torch.linalg.vector_norm(a, 2, dim, True)
        units.append(a / (norm + (norm.clamp_min(eps) - norm).detach()))
    return (units[0] * units[1]).sum(dim)


# Composite operators that later passes read as the operators that they consist of.
STACKING = (
    aten.hstack.default, aten.vstack.default, aten.atleast_1d.default, aten.atleast_1d.Sequence,
    aten.atleast_2d.default, aten.atleast_2d.Sequence,
)  # fmt: skip
PAIRS = (
    aten.inner.default, aten.tensordot.default, aten.linalg_vecdot.default, aten.linalg_multi_dot.default,
    aten.pairwise_distance.default,
)  # fmt: skip
DECOMPOSITIONS = {
    **{op: op.decompose for op in (*STACKING, aten.linalg_matmul.default)},
    **{op: partial(_unless_cast, op) for op in (*PAIRS, aten.prelu.default)},
    aten.cosine_similarity.default: _cosine_similarity,
}


class _Retrace(Interpreter):
    """An interpreter that runs a Dynamo graph under make_fx, keeping higher-order operators and reads of symbolic
    numbers."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode):
        super().__init__(gm)
        self.regions: list[torch.autocast] = []
        # Dynamo's example value is not a snapshot: a tensor whose shape is changed later has that later shape in it
        snapshots = not any(_changes_shape(n) for n in gm.graph.nodes)
        # made before tracing starts, which would record their creation. They do not require a gradient, because such a
        # leaf cannot be changed in place
        self.kept = {
            n: tree_map_only(torch.Tensor, lambda t: example(t, mode, learns=False), n.meta["example_value"])
            for n in gm.graph.nodes
            if n.op == "call_function" and (isinstance(n.target, HigherOrderOperator) or (snapshots and _is_direct(n)))
        }

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.amp.autocast_mode._enter_autocast:  # the context manager records the node and takes effect
            region = torch.autocast(*args)
            region.__enter__()
            self.regions.append(region)
            return region
        if target is torch.amp.autocast_mode._exit_autocast:
            self.regions.remove(args[0])
            return args[0].__exit__(None, None, None)
        if isinstance(target, HigherOrderOperator):
            return self.keep(target, args, kwargs)
        if self.current in self.kept and not torch._C._is_any_autocast_enabled():
            return self.keep(DIRECT[target], args, kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "item" and isinstance(
            self.current.meta.get("example_value"), torch.SymInt | torch.SymFloat | torch.SymBool
        ):
            return self.keep(target, args, kwargs)
        if target == "contiguous":
            # if the method changes nothing, the trace does not record it. A compiler's strides may differ from eager's,
            # so an operator that relies on it, as a view does, still needs it
            return aten.contiguous.default(*args, **kwargs)
        return super().call_method(target, args, kwargs)

    def keep(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Record the current node without running it; its value is a fake like the one that Dynamo saw."""
        mode = get_proxy_mode()
        assert mode is not None
        tracer = mode.tracer
        node = self.current
        modules: dict[int, str] = {}
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and isinstance(self.env[operand], torch.nn.Module):
                modules[id(self.env[operand])] = str(operand.target)

        def proxy(leaf):
            if isinstance(leaf, torch.nn.Module):
                name = modules[id(leaf)]
                setattr(tracer.root, name, leaf)
                return tracer.create_proxy("get_attr", name, (), {})
            return tracer.unwrap_proxy(leaf)

        inputs = tree_map(proxy, (args, kwargs), is_leaf=lambda x: isinstance(x, torch.nn.Module))
        name = node.name if target is node.target else target.overloadpacket.__name__
        made = tracer.create_proxy(node.op, target, *inputs, name=name)
        return track_tensor_tree(self.kept.get(node, node.meta["example_value"]), made, constant=None, tracer=tracer)

    def run_node(self, n: Node):
        self.current = n
        result = super().run_node(n)
        # If the trace gets another dtype than Dynamo (autocast rules differ by operator), add a cast
        seen = n.meta.get("example_value")
        if isinstance(result, torch.Tensor) and isinstance(seen, torch.Tensor) and n.op.startswith("call"):
            if result.dtype != seen.dtype:
                result = result.to(seen.dtype)
        return result


def _changes_shape(n: Node) -> bool:
    """Return whether an operator changes its operand's shape or strides in place: unsqueeze_, transpose_, resize_."""
    name = n.target if n.op == "call_method" else getattr(n.target, "__name__", "")
    packet = getattr(aten, str(name), None) if str(name).endswith("_") and not str(name).startswith("_") else None
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    return any(torch.Tag.inplace_view in o.tags for o in overloads)


def _is_direct(n: Node) -> bool:
    if n.target not in DIRECT or n.kwargs:
        return False
    seen = [a.meta.get("example_value") if isinstance(a, Node) else a for a in (n, *n.args)]
    tensors = [isinstance(x, FakeTensor) and x.layout == torch.strided for x in seen]
    return (
        tensors[0]
        and tensors[1]
        and all(t or x is None or type(x) in (int, float) for t, x in zip(tensors, seen, strict=True))
    )


def placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def example_values(gm: GraphModule) -> list[Any]:
    return [n.meta.get("example_value", n.meta.get("val")) for n in placeholders(gm)]


def _writes_shared_memory(traced: GraphModule, fakes: Sequence[Any]) -> bool:
    """Return whether an input is written that overlaps another one, which the traced inputs do not tell."""
    held: dict[int, list[tuple[Node, int, int]]] = {}
    for n, x in zip(placeholders(traced), fakes):
        if isinstance(x, torch.Tensor):
            held.setdefault(x.untyped_storage()._cdata, []).append((n, *_bytes(x)))
    pairs = [
        (n, other)
        for inputs in held.values()
        for (n, first, last), (other, begin, end) in combinations(inputs, 2)
        if first < end and begin < last
    ]
    changed = {storage(x) for n in traced.graph.nodes for x in written_operands(n)} if pairs else set()
    return any(storage(n) in changed for pair in pairs for n in pair)


def _bytes(held: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of its storage that a tensor reaches, and the one behind the last."""
    first = number(held.storage_offset())
    steps = sum((number(n) - 1) * number(step) for n, step in zip(held.shape, held.stride()))
    return first * held.itemsize, (first + steps + 1) * held.itemsize


def run(graph: Graph) -> int:
    """Replace Dynamo's graph by its trace in pre-dispatch ATen; return the number of nodes."""
    gm = graph.gm
    fakes = example_values(gm)
    if any(getattr(n.target, "__name__", "") == "_get_data_attr" for n in gm.graph.nodes):
        raise Untraceable("a tensor's .data is used, which a trace does not follow; use .detach()")
    if any(v is None for v in fakes):
        raise Untraceable("an input has no example value")
    inputs = [example(v, graph.mode) for v in fakes]
    if uses_functorch(gm):
        raise Transformed("the graph contains a functorch transform that cannot be expanded")
    retrace = _Retrace(gm, graph.mode)
    make = make_fx(retrace.run, DECOMPOSITIONS, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)
    try:
        with fx_traceback.preserve_node_meta():
            traced = make(*inputs)
    except Exception as problem:
        for region in reversed(retrace.regions):
            region.__exit__(None, None, None)
        raise Untraceable(
            f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
        ) from problem
    if _writes_shared_memory(traced, fakes):
        raise Transformed("the graph writes an input in place whose memory another input shares")
    for old, new in zip(placeholders(graph.dynamo), placeholders(traced), strict=True):
        for key, value in old.meta.items():
            new.meta.setdefault(key, value)
        if "example_value" in old.meta:
            new.meta["example_value"] = old.meta["example_value"]
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    traced.meta.update(gm.meta)
    mark_unread_draws(traced)
    graph.gm, graph.traced = traced, True
    return len(traced.graph.nodes)
