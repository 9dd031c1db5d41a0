"""Lift the value of a graph node at an index tuple to a scalar expression.

`Lifter.lift(node, index)` walks from a node towards its inputs on demand. Views, permutes, expands, slices and gathers
change the index; pointwise operators become expressions; reductions bind a variable. Any other node becomes a load of
its own value. Nothing is approximated: an operator that is not understood stays a load, and the matcher decides whether
a load of that node is sound.

Needs a graph with `meta["val"]` on each node, without in-place operators on the values that are walked (the pass
`functionalize`).
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import FLOAT, INT, Expr, node, walk
from attnfx.passes.fx.nodes import (
    PRODUCTS,
    Opaque,
    dims,
    is_tensor,
    kind_of,
    op_name,
    size_expr,
    slot_node,
    value,
)
from attnfx.passes.lift.tables import ADDING, INDEXING, POINTWISE, REDUCTIONS, VIEWS, Index

Key = tuple[Node, Index, bool]  # a node, an index into it, and whether its operators stay as they were
MAX_DEPTH = 400  # most operators from the lifted value down to a value that is read; a value beyond is loaded
MAX_FACTORS, MAX_TERMS = 64, 256  # of a product, and of a sum of products of integers: repeated squares double both
NESTED = 40  # most calls of `lift` inside each other: each takes about six frames of Python's stack


class _Deeper(Exception):
    """Ask for the value `key`, which lies `depth` operators deep, to be lifted first."""

    def __init__(self, key: Key, depth: int):
        super().__init__()
        self.key, self.depth = key, depth


class Lifter:
    """A translator of one graph's nodes to expressions, which it memoizes.

    written     nodes whose memory is written in place: they are loaded as they are
    frozen      nodes computed under no_grad: gradients do not flow through them
    reductions  reduction -> the node and the index that it was lifted from
    cut         nodes that were loaded because they lie deeper than MAX_DEPTH
    """

    def __init__(self, written: Set[Node] = frozenset(), frozen: Set[Node] = frozenset()) -> None:
        self.written = written
        self.frozen = frozen
        self.reductions: dict[Expr, tuple[Node, Index]] = {}
        self.memo: dict[Key, Expr | Opaque] = {}
        self.exact = False  # inside a float computation that decides an integer: operators stay as they were
        self.cut: set[Node] = set()
        self.depth = self.nested = 0

    def lift(self, at: Node, index: Index) -> Expr:
        """Return the expression of `at[index]`. Raises Opaque if it is not a tensor."""
        key = (at, index, self.exact)
        if key not in self.memo:
            if self.nested >= NESTED:
                raise _Deeper(key, self.depth)
            if self.nested:
                self._enter(key, self.depth)
            else:
                self._start(key)
        found = self.memo[key]
        if isinstance(found, Opaque):
            raise Opaque
        return found

    def _start(self, key: Key) -> None:
        """Lift a value and, before it, the values below it that are too deep for Python's stack. The memo keeps each
        lifted value, so that a second attempt at a value goes straight to the missing one."""
        waiting = [(key, 0)]
        while waiting:
            try:
                self._enter(*waiting[-1])
                waiting.pop()
            except _Deeper as below:
                waiting.append((below.key, below.depth))

    def _enter(self, key: Key, depth: int) -> None:
        """Lift a value that lies `depth` operators deep into the memo."""
        at, index, exact = key
        before = self.depth, self.nested, self.exact
        self.depth, self.nested, self.exact = depth + 1, self.nested + 1, exact
        try:
            if self.depth > MAX_DEPTH:
                self.cut.add(at)
            found = self.load(at, index) if self.depth > MAX_DEPTH else self._lift(at, index)
            self.memo[key] = A.detach(found) if at in self.frozen else found
        except Opaque as problem:
            self.memo[key] = problem
        finally:
            self.depth, self.nested, self.exact = before

    def most(self, at: Node) -> int | None:
        """Return MAX_DEPTH if a value was loaded because it lies deeper, else None."""
        return MAX_DEPTH if at in self.cut else None

    def _lift(self, at: Node, index: Index) -> Expr:
        if at.op == "call_function" and at not in self.written:
            name = op_name(at)
            if name in VIEWS:
                try:
                    source, inner = VIEWS[name](at, index)
                except Opaque:
                    pass
                else:
                    return self.lift(source, inner)
            for table in (POINTWISE, INDEXING, REDUCTIONS, ADDING):
                rule = table.get(name)
                if rule is not None:
                    try:
                        out = rule(self, at, index)
                    except Opaque:
                        break
                    if _expanded(out):
                        break
                    if out.op in ("rsum", "rmax", "softmax"):
                        self.reductions.setdefault(out, (at, index))
                    return self._typed(out, at)
        if at.op == "get_attr" and (number := _literal(at)) is not None:
            return A.const(number)
        return self.load(at, index)

    def _typed(self, e: Expr, at: Node) -> Expr:
        dtype = value(at).dtype  # type: ignore[union-attr]
        kind = kind_of(dtype)
        if e.kind != kind:
            e = A.to_float(e) if kind == FLOAT else A.to_int(e) if kind == INT else A.to_bool(e)
        return A.half(e) if dtype == torch.float16 else e

    def load(self, at: Node, index: Index) -> Expr:
        if not is_tensor(at):
            raise Opaque
        extents = dims(at)
        index = tuple(A.ZERO if n is A.ONE else x for x, n in zip(index, extents, strict=True))
        return A.load(at, index, kind_of(value(at).dtype))  # type: ignore[union-attr]

    # -- operands -----------------------------------------------------------------------------
    def operand(self, x: object, index: Index) -> Expr:
        """Lift a pointwise operand, broadcast to `index`: a node or a Python number."""
        if isinstance(x, bool | int | float):
            return A.const(x)
        if isinstance(x, Node):
            held = value(x)
            if isinstance(held, torch.Tensor):
                return self.lift(x, broadcast(x, index))
            if isinstance(held, torch.SymInt | int):
                return size_expr(held)
            if isinstance(held, float):
                return A.const(held)
            if isinstance(held, torch.SymFloat):
                return A.load(x, (), FLOAT)
        raise Opaque

    def integer_source(self, x: object, index: Index) -> Expr:
        """Lift an operand that decides an integer. A computed float is kept operator by operator, because another
        library's logarithm, or a merged constant, may round to the other side. A value computed from scores is lifted
        as usual."""
        e = self.operand(x, index)
        if e.kind != FLOAT or A.as_integer(e) is not None or e.op in ("const", "load") or not isinstance(x, Node):
            return e
        if any(n.op in ("rsum", "rmax", "softmax") or (n.op == "load" and _product(n.value)) for n in walk(e)):
            return e
        if e.op == "where" and all(a.op == "const" for a in e.args[1:]):
            return e
        before, self.exact = self.exact, True
        try:
            return self.operand(x, index)
        finally:
            self.exact = before


def _expanded(e: Expr) -> bool:
    """Return whether an expression is a product, or an expanded product of sums, of too many factors or terms."""
    if e.op == "mul":
        return len(e.args) > MAX_FACTORS
    return e.op == "add" and e.kind == INT and len(e.args) > MAX_TERMS


def _literal(at: Node) -> bool | int | float | None:
    """Return the number that a constant of the traced graph holds, such as of torch.tensor(-1e9), or None."""
    module = at.graph.owning_module
    held = getattr(module, str(at.target), None)
    if any(not op_name(u).startswith("lift_fresh") for u in at.users) or not isinstance(held, torch.Tensor):
        return None
    plain = held.numel() == 1 and not held.dtype.is_complex and not isinstance(held, torch._subclasses.FakeTensor)
    return held.item() if plain else None


def _product(slot: object) -> bool:
    """Return whether a load reads a contraction, which may be the scores."""
    return op_name(slot_node(slot)) in PRODUCTS


def broadcast(x: Node, index: Index) -> Index:
    """Return the index of an operand that broadcasts to a result read at `index`."""
    extents = dims(x)
    inner = index[len(index) - len(extents) :]
    return tuple(A.ZERO if n is A.ONE else i for i, n in zip(inner, extents, strict=True))


def exact_node(at: Node, name: str, args: tuple[Expr, ...]) -> Expr:
    """Keep a float operator as PyTorch would run it: constants stay Python numbers, nothing is merged."""
    dtype = str(value(at).dtype).removeprefix("torch.")  # type: ignore[union-attr]
    return node("aten", FLOAT, args, f"{name}:{dtype}")
