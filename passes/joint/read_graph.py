"""Convert a graph of ATen operators, as AOTAutograd makes it, to the plain records of the memory model.

Needs `meta["val"]` on each node. Inductor's own tables of lowerings tell whether an operator is a loop that may be
inlined, a reduction, or a kernel.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from attnfx.memory.records import Graph, Kind, Op, Result
from attnfx.memory.workspace import Operand, Use, fused_kernel, workspace
from attnfx.passes.fx.analysis import written_operands
from attnfx.passes.fx.copies import copied
from attnfx.passes.fx.nodes import arguments, is_tensor, number, op_name
from attnfx.spec import from_json
from attnfx.targets import sdpa_dispatch as fused

# torch/_inductor/ir.py, StorageBox.should_realize_on_reuse
HEAVY = frozenset("exp log log10 log1p log2 sigmoid tanh".split())
REDUCTIONS = frozenset("sum mean prod amax amin max min var var_mean any all argmax argmin xor_sum".split())
# Operators whose lowering calls a kernel or writes at computed places.
KERNELS = frozenset("mm bmm addmm baddbmm convolution convolution_backward _int_mm sort cumsum cumprod "
                    "_scaled_dot_product_flash_attention_for_cpu".split())  # fmt: skip
FUSED = re.compile(r"_scaled_dot_product_(flash|efficient|cudnn)_attention(_for_cpu)?(_backward)?")
SCATTERS = frozenset("index_put index_put_ scatter scatter_ scatter_add scatter_reduce scatter_add_ scatter_reduce_ "
                     "_unsafe_index_put _unsafe_masked_index_put_accumulate copy_".split())  # fmt: skip


def tensor_bytes(x: torch.Tensor) -> int:
    """Return the bytes of memory that a tensor of this shape and these strides spans."""
    if any(number(n) == 0 for n in x.shape):
        return 0
    return (1 + sum((number(n) - 1) * abs(number(s)) for n, s in zip(x.shape, x.stride()))) * x.element_size()


def numel(x: torch.Tensor) -> int:
    return prod(map(number, x.shape))


def strides(x: torch.Tensor) -> list[int]:
    return [*map(number, x.stride())]


def flops(n: Node) -> int:
    """Return the floating-point operations of a kernel by PyTorch's own formulas, 0 for one without a formula."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(getattr(n.target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = map_arg((n.args, n.kwargs), lambda x: x.meta.get("val"))  # type: ignore[misc]
    return int(formula(*args, **kwargs, out_val=n.meta["val"]))


def attention_workspace(n: Node, cpu: bool, shape: Callable[[Node], Sequence[int]] | None = None, chunk: int = 0
                        ) -> int:  # fmt: skip
    """Return the bytes that an attention operator of attnfx or ATen takes while it runs, 0 for any other operator.
    `shape` returns an operand's shape if it differs from the shape in the graph. `chunk` is the largest number of
    scores that the chunked tier computes at once; 0 keeps the graph's own limit."""
    name = op_name(n)
    if FUSED.fullmatch(name):  # called by the model, a rewrite or one of Inductor's patterns
        backward = name.endswith("backward")
        of = [x for x in n.args[backward : backward + 3] if isinstance(x, Node)]
        query, key, value = ([*map(number, x.meta["val"].shape if shape is None else shape(x))] for x in of)
        element = of[0].meta["val"].element_size()
        if not cpu:  # a graph captured on a CPU has the CPU's operator, also if planned for a GPU
            return fused.workspace(query, key, value[-1], element) if backward else 0
        return fused_kernel(query[-2], key[-2], query[-1], element, backward, torch.get_num_threads())
    if not name.startswith("attnfx::attention"):
        return 0
    given = arguments(n)
    nodes = [x for x in n.args if isinstance(x, Node) and is_tensor(x)]
    operands = {x: operand(x.meta["val"], None if shape is None else shape(x)) for x in nodes}
    if name not in ("attnfx::attention", "attnfx::attention_backward"):
        return max((x.bytes for x in operands.values()), default=0)  # blocks of whole rows: about as much as an operand
    query, key, value = (operands[given[role]] for role in ("query", "key", "value"))
    grad = operands.get(given.get("grad_out"))  # type: ignore[arg-type]
    use = Use(from_json(given["spec"]), query, key, value, grad, cpu, torch.get_num_threads())
    tier = given["tier"].split(",")[0]
    return workspace(use, f"chunked:{chunk}" if chunk and tier.partition(":")[0] == "chunked" else tier)


def operand(x: torch.Tensor, shape: Sequence[int] | None = None) -> Operand:
    """Return the model's record of a tensor. `shape` replaces its shape; the order of its dims in memory stays."""
    sizes, steps = tuple(map(number, x.shape)), strides(x)
    if shape is None:
        return Operand(sizes, tuple(steps), x.element_size())
    inner = Fraction(1)  # growth of the strides, caused by the inner dims
    for d in sorted(range(x.ndim), key=lambda d: (steps[d], -d)):
        if steps[d]:
            steps[d] = round(steps[d] * inner)
            inner *= Fraction(shape[d], sizes[d] or 1)
    return Operand(tuple(shape), tuple(steps), x.element_size())


def near_readers(gm: GraphModule) -> GraphModule:
    """Return a copy in which each operation comes right before its first reader. Inductor orders inference graphs this
    way (torch/_inductor/fx_passes/post_grad.py, reorder_for_locality)."""
    made, _ = copied(gm)
    seen: set[Node] = set()
    for n in reversed(made.graph.nodes):
        seen.add(n)
        for source in n.all_input_nodes:
            if source.op == "call_function" and source.target is not operator.getitem and seen.issuperset(source.users):
                n.prepend(source)
    return made


def lay_out(gm: GraphModule) -> None:
    """Update the strides in `meta["val"]`. A kernel that a pass inserts may return other strides than the operators
    that it replaces, and the values computed from its result still record the old strides."""
    changed: set[Node] = set()
    for n in gm.graph.nodes:
        old = n.meta.get("val")
        if not isinstance(n.target, OpOverload) or not isinstance(old, torch.Tensor):
            continue
        if not is_view(n) and changed.isdisjoint(n.all_input_nodes):
            continue
        args, kwargs = map_arg((n.args, n.kwargs), lambda x: x.meta.get("val"))  # type: ignore[misc]
        new = n.target(*args, **kwargs)
        if strides(new) != strides(old):
            n.meta["val"] = new
            changed.add(n)


def read(gm: GraphModule, cpu: bool) -> Graph:
    """Return the records of a graph that will run on a CPU (`cpu`) or on a GPU."""
    lay_out(gm)
    ops: list[Op] = []
    held: set[str] = set()
    outputs: tuple[str, ...] = ()
    for n in gm.graph.nodes:
        if n.op == "output":
            outputs = tuple(x.name for x in tree_leaves(n.args[0]) if isinstance(x, Node) and x.name in held)
            continue
        made = _op(n, held, cpu)
        if made is not None:
            ops.append(made)
            held.update(r.name for r in made.results)
    return Graph(tuple(ops), outputs)


def _results(n: Node | None, name: str, value: Any) -> Iterator[Result]:
    """Yield the tensors in an operator's value. One in a list has the name of the node that takes it out."""
    if isinstance(value, torch.Tensor):
        yield Result(name, tensor_bytes(value), str(value.dtype).removeprefix("torch."))
    elif isinstance(value, (list, tuple)):
        takers: dict[Any, Node] = {}
        for user in n.users if n is not None else ():
            if user.target is operator.getitem:
                takers.setdefault(user.args[1], user)
        for i, x in enumerate(value):
            taker = takers.get(i)
            yield from _results(taker, f"{name}[{i}]" if taker is None else taker.name, x)


def _aside(n: Node, held: set[str]) -> frozenset[str]:
    """Return the operands that a loop does not read in the order in which it writes its result."""
    value = n.meta["val"]

    def steps(x: torch.Tensor, shape: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (size, stride) of each dim larger than 1, for `x` broadcast to `shape`, with neighbors merged."""
        out: list[tuple[int, int]] = []
        along = [0 if number(size) == 1 else stride for size, stride in zip(x.shape, strides(x))]
        for size, stride in zip(map(number, shape), [0] * (len(shape) - x.ndim) + along):
            if size == 1:
                continue
            if out and out[-1][1] == size * stride:
                out[-1] = (out[-1][0] * size, stride)
            else:
                out.append((size, stride))
        return out

    def straight(x: Node) -> bool:
        other = x.meta["val"]
        if not isinstance(value, torch.Tensor) or other.ndim > value.ndim or numel(other) != numel(value):
            return False
        return number(other.storage_offset()) == 0 and steps(other, value.shape) == steps(value, value.shape)

    return frozenset(x.name for x in n.all_input_nodes if x.name in held and not straight(x))


def _op(n: Node, held: set[str], cpu: bool) -> Op | None:
    if n.name in held:  # a list element that its operator's record already names
        return None
    reads = tuple(x.name for x in n.all_input_nodes if x.name in held)
    results = tuple(_results(n, n.name, n.meta.get("val")))
    if n.op in ("placeholder", "get_attr"):
        return Op(n.name, "input", (), results) if results else None
    if not results:
        return None
    where = module_of(n)
    if n.target is operator.getitem:  # an element taken out again, or a list whose elements have names
        source = n.args[0]
        if not isinstance(n.meta["val"], torch.Tensor):
            return None
        same = next((u.name for u in source.users if u.name in held and u.args[1:] == n.args[1:]), None)  # type: ignore[union-attr]
        return Op(n.name, "view", (same,) if same else reads, (Result(n.name, 0),), where=where)
    if is_view(n):
        return Op(n.name, "view", reads[:1], tuple(Result(r.name, 0) for r in results), where=where)
    kind = kind_of(n)
    dtype = results[0].dtype
    changes = tuple(x.name for x in written_operands(n) if x.name in held)
    if changes and all(isinstance(r, Node) for r in n.args[:1]):
        results = tuple(Result(r.name, 0) for r in results)
    name, inner, rows = op_name(n), 1, True
    if kind == "scatter":  # writes to a copy of its first operand; a constant is not copied
        first = n.args[0]
        if isinstance(first, Node) and not first.all_input_nodes and first.op != "placeholder":
            reads = tuple(r for r in reads if r != first.name)
    value = n.meta["val"]
    if kind == "scatter":
        value = n.all_input_nodes[-1].meta["val"]
    outer = numel(next(x for x in tree_leaves(value) if isinstance(x, torch.Tensor)))
    if kind == "reduce":
        inner, rows = _reduced(n, outer)
    # a copy in the layout of its operand
    same = name == "clone" and strides(value) == strides(n.all_input_nodes[0].meta["val"])
    return Op(
        n.name, kind, reads, results, outer, inner, rows, changes, attention_workspace(n, cpu),
        _aside(n, held) if kind == "loop" else frozenset(), same, name in HEAVY, name,
        flops(n) if kind == "kernel" else 0, dtype, where,
    )  # fmt: skip


def is_view(n: Node) -> bool:
    if not isinstance(n.target, OpOverload):
        return False
    if n.target in (torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default):
        return True
    returns = n.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def kind_of(n: Node) -> Kind:
    from torch._inductor.lowering import fallbacks, lowerings

    if op_name(n) in SCATTERS:
        return "scatter"
    if op_name(n) in KERNELS or n.target in fallbacks or n.target not in lowerings:
        return "kernel"
    pointwise = op_name(n) in ("max", "min") and len(n.all_input_nodes) > 1  # of two tensors
    if op_name(n) in REDUCTIONS and not pointwise:
        return "reduce"
    return "loop" if isinstance(n.meta["val"], torch.Tensor) else "kernel"  # a loop has one result


def _reduced(n: Node, outer: int) -> tuple[int, bool]:
    """Return (elements that are reduced into one, whether the reduced dims are the last ones)."""
    source = n.all_input_nodes[0].meta["val"]
    inner = max(numel(source) // max(outer, 1), 1)
    given = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
    if given is None or given == []:
        return inner, True
    dims = sorted(d % source.ndim for d in (given if isinstance(given, (list, tuple)) else [given]))  # type: ignore[operator]
    rest = [d for d in range(source.ndim) if d not in dims and number(source.shape[d]) != 1]
    dims = [d for d in dims if number(source.shape[d]) != 1]
    return inner, not rest or not dims or max(rest) < min(dims)


def module_of(n: Node) -> str:
    """Return the path of the module that a node came from, or "" if the graph does not record it."""
    stack = n.meta.get("nn_module_stack") or n.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return re.sub(r"^(L\['\w+'\]|L__self___|self)\.?", "", path)
