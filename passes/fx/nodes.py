"""Query and edit FX nodes: helpers that several passes share."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import BOOL, FLOAT, INT, Expr
from attnfx.report.records import Refusal
from attnfx.spec import UNKNOWN_SIZE


def op_name(node: Node) -> str:
    """Return an operator's name. An `aten` operator has its packet's name ("softmax"), one of another library
    "namespace::name". A Python function has its own name after a dot, except for "getitem"."""
    target = node.target
    if isinstance(target, OpOverload):
        return (
            target._overloadpacket.__name__
            if target.namespace == "aten"
            else f"{target.namespace}::{target._overloadpacket.__name__}"
        )
    if target is operator.getitem:
        return "getitem"
    return "." + getattr(target, "__name__", str(target))


def calls(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    """Yield each call in a Dynamo graph and in the bodies in it, with the name of the called function or method."""
    nodes = (n for module in gm.modules() if isinstance(module, GraphModule) for n in module.graph.nodes)
    for n in nodes:
        if n.op in ("call_function", "call_method"):
            yield n, str(n.target) if n.op == "call_method" else getattr(n.target, "__name__", str(n.target))


def label(node: Node) -> str:
    """Return a node's name for messages: its operator, or the operator whose tuple it is taken from."""
    if node.op != "call_function":
        return node.name
    source = node.args[0] if op_name(node) == "getitem" else None
    return label(source) if isinstance(source, Node) else op_name(node).removeprefix(".")


def value(x: object) -> Any:
    """Return a node's example value, or the constant itself."""
    return x.meta.get("val") if isinstance(x, Node) else x


def shape(node: Node) -> Sequence[int | torch.SymInt]:
    return value(node).shape  # type: ignore[union-attr]


def is_tensor(node: object) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shares_memory(new: Node, old: Node) -> bool:
    """Return whether a new value has the layout of an old one. If so, let its example value have that memory, so that
    views of the old value count as views of the new one."""
    mine, held = value(new), value(old)
    if any(not isinstance(x, torch.Tensor) or x.layout != torch.strided for x in (mine, held)):
        return False
    layouts = [(x.dtype, *map(size_expr, (*x.shape, *x.stride()))) for x in (mine, held)]
    if layouts[0] != layouts[1]:
        return False
    new.meta["val"] = held
    return True


def take_place(new: Node, old: Node, of: Callable[[Node], bool] = lambda reader: True) -> None:
    """Let users of a node, all or the ones that `of` accepts, read a new node, which takes over the meta that it
    lacks, and the memory of the old one if the layout is the same."""
    new.meta = {**old.meta, **new.meta}
    shares_memory(new, old)
    old.replace_all_uses_with(new, delete_user_cb=of, propagate_meta=False)


@contextmanager
def fake_mode(*held: object) -> Iterator[None]:
    """Enter the fake mode of the example values, in which operators accept symbolic sizes."""
    mode = detect_fake_mode(list(held))
    assert mode is not None
    with mode, enable_python_dispatcher():
        yield


def kind_of(dtype: torch.dtype) -> str:
    return BOOL if dtype == torch.bool else FLOAT if dtype.is_floating_point else INT


def dims(node: Node) -> tuple[Expr, ...]:
    return tuple(size_expr(n) for n in shape(node))


def number(n: Any) -> int:
    """Return a size as an int; a symbolic size has the example's size, or UNKNOWN_SIZE without one."""
    if isinstance(n, int):
        return n
    hint = n.node.hint if isinstance(n, torch.SymInt) else None
    return int(hint) if hint is not None else UNKNOWN_SIZE


def memory_order(x: Node) -> tuple[int, ...]:
    """Return the dimensions in memory order, the slowest first; empty for a value that is contiguous or not dense."""
    shape, strides = ([number(n) for n in found] for found in (value(x).shape, value(x).stride()))
    order = tuple(sorted(range(len(shape)), key=lambda d: -strides[d]))
    step = 1
    for d in reversed(order):
        if shape[d] != 1 and strides[d] != step:
            return ()
        step *= shape[d]
    return () if list(order) == sorted(order) else order


def spanned(x: Node, rank: int) -> frozenset[int]:
    """Return the dimensions of a result of this rank along which an operand is not broadcast."""
    return frozenset(d for d, size in enumerate(dims(x), rank - len(dims(x))) if size is not A.ONE)


def size_expr(n: int | torch.SymInt) -> Expr:
    """Return a size as an expression. Anything but a polynomial of symbols becomes one named size."""
    if isinstance(n, int):
        return A.const(int(n))
    return _from_sympy(n.node.expr)


def _from_sympy(e) -> Expr:  # type: ignore[no-untyped-def]
    if e.is_Integer:
        return A.const(int(e))
    if e.is_Symbol:
        return A.size(str(e))
    if e.is_Add:
        return A.add(*(_from_sympy(a) for a in e.args))
    if e.is_Mul and all(a.is_Integer or not a.is_Number for a in e.args):
        return A.mul(*(_from_sympy(a) for a in e.args))
    if e.is_Pow and e.exp.is_Integer and 0 < int(e.exp) <= 4:
        return A.mul(*([_from_sympy(e.base)] * int(e.exp)))
    if type(e).__name__ == "FloorDiv":  # einsum yields a product of sizes divided by one of them
        whole = sympy.cancel(e.args[0] / e.args[1])
        if whole.as_numer_denom()[1] == 1:
            return _from_sympy(whole)
    return A.size(str(e))


# of a stack trace: the file, the line's number, and the line itself
_FRAME = re.compile(r'^\s*File "([^"]*)", line (\d+)(?:, in [^\n]*\n[ \t]*([^\n]*))?', re.MULTILINE)


def _frame(node: Node) -> tuple[str, str, str]:
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if "/torch/nn/" not in f[0]]
    return frames[-1] if frames else ("", "", "")


def where_in_source(node: Node) -> str:
    """Return the user's line as "file.py:88", or "" if the graph does not record it. Skips the files of torch.nn."""
    file, number, _ = _frame(node)
    return f"{os.path.basename(file)}:{number}" if file else ""


def refusal(code: str, message: str, *nodes: Node, **facts: object) -> Refusal:
    """Return a refusal with the names of its nodes and the first user's line that a node has. Its facts, as
    `attnfx.report.advice` lists them, are read off the nodes; the given ones come first."""
    place = next((p for p in map(where_in_source, nodes) if p), "")
    known: dict[str, object] = {**facts_of(nodes[0]), "end": where_in_source(nodes[-1])} if nodes else {}
    told = {name: str(fact) for name, fact in {**known, **facts}.items() if fact is not None and str(fact)}
    return Refusal(code, message, tuple(n.name for n in nodes), "", place, told)


def facts_of(n: Node) -> dict[str, object]:
    """Return a node's operator, place, line, shape, dtype and plain arguments."""
    found: dict[str, object] = {"operator": label(n), "place": where_in_source(n), "source": _frame(n)[2]}
    if is_tensor(n):
        found |= {"shape": shape_text(dims(n)), "dtype": value(n).dtype}
    schema = getattr(n.target, "_schema", None)
    given = {} if schema is None else {a.name: x for a, x in zip(schema.arguments, n.args, strict=False)} | n.kwargs
    return {**{name: x for name, x in given.items() if isinstance(x, bool | int | float | str)}, **found}


def shape_text(shape: Iterable[Expr | str]) -> str:
    """Return a shape as text, as in "(2, s0, 8)"."""
    return f"({', '.join(map(str, shape))})"


class Opaque(Exception):
    """An operator without a scalar expression here: its node is loaded."""


def argument(at: Node, position: int, name: str, default: object = None) -> object:
    if name in at.kwargs:
        return at.kwargs[name]
    return at.args[position] if len(at.args) > position else default


def arguments(at: Node) -> dict[str, Any]:
    """Return the arguments of a call by name, with the defaults of the operator's schema."""
    schema = at.target._schema.arguments  # type: ignore[union-attr]
    return {a.name: a.default_value for a in schema} | {a.name: x for a, x in zip(schema, at.args)} | dict(at.kwargs)


def set_argument(at: Node, name: str, x: Any) -> None:
    position = [a.name for a in at.target._schema.arguments].index(name)  # type: ignore[union-attr]
    at.update_arg(position, x) if position < len(at.args) else at.update_kwarg(name, x)


def axis(at: Node, position: int = 1, name: str = "dim", rank: int | None = None) -> int:
    dim = argument(at, position, name)
    rank = len(shape(at.args[0])) if rank is None else rank  # type: ignore[arg-type]
    if not isinstance(dim, int):
        raise Opaque
    return dim % max(rank, 1)


PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "addmm", "einsum", "__matmul__")


@dataclass(frozen=True)
class Product:
    """Load slot for the product alone of a node that also adds something (baddbmm, addmm)."""

    node: Node


def slot_node(slot: object) -> Node:
    return slot.node if isinstance(slot, Product) else slot  # type: ignore[return-value]


SDPA = ("scaled_dot_product_attention",)
REGION, POLICY = "ac_graph_id", "recompute"  # PyTorch's names of the marks
MARKS = (REGION, POLICY)
CATS = ("cat", "concat", "concatenate")


def parts(n: Node, names: tuple[str, ...] = CATS) -> tuple[list[Node], int] | None:
    """Return the operands of a `cat` and its dimension, if it joins two or more that nothing else reads; else None."""
    if n.op != "call_function" or op_name(n) not in names or not is_tensor(n):
        return None
    given: Any = n.args[0]
    dim = argument(n, 1, "dim", 0)
    if not isinstance(dim, int) or not isinstance(given, list | tuple) or len(set(given)) != len(given):
        return None
    rank = len(dims(given[0])) if given else 0
    if len(given) < 2 or any(len(x.users) != 1 or len(dims(x)) != rank for x in given):
        return None
    if any(value(x).dtype != value(n).dtype for x in given):
        return None
    return list(given), dim % len(dims(n))


STACK = ("stack_trace", "nn_module_stack", "source_fn_stack")  # meta that locates a node in the user's code
