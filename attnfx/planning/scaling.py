"""Express the sizes of values as functions of batch and length, fitted to the same graphs at two pairs of sizes.

A dim of a value is k * batch**i * length**j + c. The graphs are captured at two pairs of batch and length; the two
values of each dim determine k and c, and the simplest form that matches both is chosen. The second pair consists of
primes, so that other forms do not match by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from attnfx.memory.liveness import Event
from attnfx.memory.records import Op
from attnfx.passes.joint.read_graph import attention_workspace
from attnfx.planning.capture import Captured
from attnfx.planning.strategies import Strategy

FORMS = ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2))


@dataclass(frozen=True)
class Sizes:
    """The batch and the length of a call; the length is 0 if the inputs lack one."""

    batch: int
    length: int


@dataclass(frozen=True)
class Dim:
    """The size factor * batch**batches * length**lengths + rest."""

    batches: int
    lengths: int
    factor: Fraction
    rest: Fraction

    def at(self, s: Sizes) -> Fraction:
        return self.factor * s.batch**self.batches * s.length**self.lengths + self.rest


class Unknown(Exception):
    """The error if a size does not have this form, or if the graphs differ; the message gives the reason."""


@dataclass(frozen=True)
class Roles:
    """The dims of the inputs that are the batch or the length, as pairs (input, dim), and their sizes."""

    sizes: Sizes
    batch: frozenset[tuple[int, int]]
    length: frozenset[tuple[int, int]]

    def resized(self, inputs: Any, new: Sizes) -> Any:
        """Return inputs of the new sizes on "meta"."""
        leaves, tree = tree_flatten(inputs)
        for n, x in enumerate(leaves):
            if isinstance(x, torch.Tensor):
                shape = [
                    new.batch if (n, d) in self.batch else new.length if (n, d) in self.length else int(size)
                    for d, size in enumerate(x.shape)
                ]
                leaves[n] = torch.empty(shape, dtype=x.dtype, device="meta").requires_grad_(x.requires_grad)
        return tree_unflatten(leaves, tree)


def sizes_of(inputs: Any) -> Sizes:
    """Guess the batch and the length from the inputs' shapes. The batch is the first dim of the first input with two or
    more dims. The length is the second dim of the first integer input with two or more dims, or else of the first input
    with three dims."""
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.ndim >= 1]
    batch = next((x.shape[0] for x in leaves if x.ndim >= 2), leaves[0].shape[0] if leaves else 0)
    whole = [x for x in leaves if x.ndim >= 2 and not x.dtype.is_floating_point and x.dtype != torch.bool]
    long = [*whole, *(x for x in leaves if x.ndim == 3)]
    length = long[0].shape[1] if long else 0
    return Sizes(int(batch), int(length))


def roles(inputs: Any) -> Iterator[Roles]:
    """Yield interpretations of the inputs' dims, the likeliest first; a model refuses a wrong one.

    In the first, every leading dim of the batch's size is the batch, and every other dim of the length's size is the
    length. In the others, the length is only one dim of each input, or none, or an input other than the first has
    neither, such as a table with as many rows as the batch.
    """
    at = sizes_of(inputs)
    leaves = [(n, x) for n, x in enumerate(tree_leaves(inputs)) if isinstance(x, torch.Tensor) and x.ndim >= 1]
    batch = {(n, 0) for n, x in leaves if x.shape[0] == at.batch}
    long = {(n, d) for n, x in leaves for d, size in enumerate(x.shape) if size == at.length and (n, d) not in batch}
    long -= {(n, 0) for n, x in leaves if x.ndim > 1}
    once = {(n, d) for n, d in long if d == min(e for m, e in long if m == n)}
    first = min((n for n, x in leaves if (n, 0) in batch and x.ndim >= 2), default=-1)
    seen = set()
    for left in ({-1}, *({n} for n, _ in sorted(batch) if n != first), {n for n, _ in batch} - {first}):
        for chosen in (long, once, set()):
            made = Roles(
                at if chosen else replace(at, length=0),
                frozenset(p for p in batch if p[0] not in left), frozenset(p for p in chosen if p[0] not in left),
            )  # fmt: skip
            if made not in seen:
                seen.add(made)
                yield made


def near(s: Sizes, batch: int) -> Sizes:
    """Return primes other than the sizes: the batch from `batch` on, the length below the given one. A longer length
    might exceed a table of positions."""
    found = prime(max(batch, 2), 1)
    length = prime(s.length - 1, -1) if s.length > 8 else prime(s.length + 1, 1) if s.length else 0
    return Sizes(found if found != s.batch else prime(found + 1, 1), length)


def prime(n: int, by: int) -> int:
    while n < 2 or any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n += by
    return n


def fit(first: int, second: int, at: Sizes, then: Sizes) -> Dim:
    """Return the simplest function with the value `first` at sizes `at` and `second` at `then`. Raises Unknown."""
    if first == second:
        return Dim(0, 0, Fraction(0), Fraction(first))
    found = None
    for i, j in FORMS[1:]:
        here, there = at.batch**i * at.length**j, then.batch**i * then.length**j
        if here == there or (j and not at.length):
            continue
        factor = Fraction(second - first, there - here)
        rest = Fraction(first) - factor * here
        if rest == 0:
            return Dim(i, j, factor, Fraction(0))
        if found is None and factor.denominator == 1 and rest.denominator == 1 and abs(rest) <= max(at.length, 64):
            found = Dim(i, j, factor, rest)
    if found is None:
        raise Unknown(f"a size changes from {first} to {second} when batch and length change from {at} to {then}")
    return found


class Scaled:
    """One way to compile, with its memory at any sizes: `dims` has the dims of each value by its name "graph.name".

    The strategy's graphs were captured at the sizes `at`, the `second` graphs at `then`.
    """

    def __init__(self, strategy: Strategy, second: Sequence[Captured], at: Sizes, then: Sizes):
        self.strategy, self.at_first = strategy, at
        first = strategy.captured
        self.dims: dict[str, tuple[Dim, ...]] = {}
        self.attention: dict[str, Node] = {}
        if len(first) != len(second):
            raise Unknown("other sizes give another number of graphs")
        cache: dict[tuple[int, int], Dim] = {}
        for n, (a, b) in enumerate(zip(first, second)):
            one, two = _values(a), _values(b)
            if len(one) != len(two):
                raise Unknown("other sizes give another graph")
            for (name, node, x), (_, again, y) in zip(one, two):
                if _operator(node) != _operator(again) or x.ndim != y.ndim:
                    raise Unknown(f"other sizes give another graph, from {name} on")
                pairs = [(int(p), int(q)) for p, q in zip(x.shape, y.shape)]
                for pair in pairs:
                    if pair not in cache:
                        cache[pair] = fit(*pair, at, then)
                self.dims[f"{n}.{name}"] = tuple(cache[p] for p in pairs)
                if any(name in _operator(node) for name in ("attnfx", "_scaled_dot_product_")):
                    self.attention[f"{n}.{node.name}"] = node

    def at(self, s: Sizes) -> tuple[Strategy, list[Event]]:
        """Return the strategy, and the events of its step at other sizes."""
        cpu, chunk = self.strategy.target.kind == "cpu", self.strategy.chunk
        shares: dict[tuple[Dim, ...], Fraction] = {}

        def share(name: str) -> Fraction:
            """Return the factor by which a value's number of elements changes."""
            dims = self.dims.get(name)
            if dims is None:
                raise Unknown(f"the compiled graph has a value that the joint graph lacks: {name}")
            if dims not in shares:
                shares[dims] = Fraction(1)
                for d in dims:
                    if before := d.at(self.at_first):
                        shares[dims] *= d.at(s) / before
            return shares[dims]

        def other(n: int, op: Op) -> Op:
            if not op.results:
                return op
            made = tuple(replace(r, bytes=round(r.bytes * share(f"{n}.{r.name}"))) for r in op.results)
            if op.kind in ("input", "view"):
                return replace(op, results=made)
            here = share(f"{n}.{op.results[0].name}")
            outer = here if op.kind != "scatter" or not op.reads else share(f"{n}.{op.reads[-1]}")
            inner = share(f"{n}.{op.reads[0]}") / here if op.kind == "reduce" and here else Fraction(1)
            node = self.attention.get(f"{n}.{op.name}")
            shape = partial(self._shape, n, s)
            workspace = op.workspace if node is None else attention_workspace(node, cpu, shape, chunk)
            return replace(
                op, results=made, outer=round(op.outer * outer), inner=round(op.inner * inner), workspace=workspace
            )

        parts = [part.resized(partial(other, n)) for n, part in enumerate(self.strategy.parts)]
        return self.strategy, self.strategy.step_of(parts).events()

    def _shape(self, n: int, s: Sizes, node: Node) -> list[int]:
        return [round(d.at(s)) for d in self.dims[f"{n}.{node.name}"]]


def _operator(node: Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op


def _values(captured: Captured) -> list[tuple[str, Node, torch.Tensor]]:
    """Return (name, node, tensor) for each tensor of the graph; the parts of a node's value are "name[i]"."""
    out = []
    for node in captured.graph.graph.nodes:
        held = node.meta.get("val")
        if isinstance(held, torch.Tensor):
            out.append((node.name, node, held))
        elif isinstance(held, (list, tuple)):
            out += [(f"{node.name}[{i}]", node, x) for i, x in enumerate(held) if isinstance(x, torch.Tensor)]
    return out


def position_rows(captured: Captured) -> list[int]:
    """Return the rows of each embedding table indexed by positions alone: a longer call would read beyond its end."""
    counted: dict[Node, bool] = {}  # node -> whether it is computed from positions alone
    out = []
    for n in captured.graph.graph.nodes:
        sources = n.all_input_nodes
        counted[n] = "iota" in str(n.target) or (bool(sources) and all(counted[s] for s in sources))
        if "aten.embedding.default" in str(n.target) and counted[n.args[1]]:
            out.append(int(n.args[0].meta["val"].shape[0]))
    return out
