"""Sizes as functions of the batch and the length: read off the same graphs at two pairs of sizes.

A dim d of a value is k * batch**i * length**j + c. The graphs are captured once with the sizes that are asked about,
and once with other ones; the two numbers of each dim give k and c, and the simplest form that gives both is taken. The
second sizes are primes, so that no other form gives the same numbers by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map_only

from attnfx.capture import Captured

FORMS = ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2))


@dataclass(frozen=True)
class Sizes:
    """The batch and the length of a call; a length of 0 where the inputs have none."""

    batch: int
    length: int


@dataclass(frozen=True)
class Dim:
    """factor * batch**batches * length**lengths + rest."""

    batches: int
    lengths: int
    factor: Fraction
    rest: Fraction

    def at(self, s: Sizes) -> Fraction:
        return self.factor * s.batch**self.batches * s.length**self.lengths + self.rest


class Unknown(Exception):
    """A size is no such function, or the graphs differ; the message says what."""


def sizes_of(tensors: Any) -> Sizes:
    """The batch is the first dim of the first input that has two or more; the length is the second dim of the first
    input of whole numbers."""
    leaves = [x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor) and x.ndim >= 1]
    batch = next((x.shape[0] for x in leaves if x.ndim >= 2), leaves[0].shape[0] if leaves else 0)
    length = next((x.shape[1] for x in leaves if x.ndim >= 2 and not x.dtype.is_floating_point), 0)
    return Sizes(int(batch), int(length))


def resized(tensors: Any, old: Sizes, new: Sizes) -> Any:
    """Empty inputs on "meta" of the new batch in the first dim and the new length in the others, where they had the
    old ones."""

    def change(x: torch.Tensor) -> torch.Tensor:
        shape = [
            new.batch if n == 0 and s == old.batch else new.length if n > 0 and s == old.length else s
            for n, s in enumerate(x.shape)
        ]
        return torch.empty(shape, dtype=x.dtype, device="meta").requires_grad_(x.requires_grad)

    return tree_map_only(torch.Tensor, change, tensors)


def other(s: Sizes) -> Sizes:
    """Primes near the sizes, the length below its old one: positions may be a table."""
    return Sizes(_prime(s.batch + 3, 1), _prime(s.length - 1, -1) if s.length > 8 else s.length)


def _prime(n: int, by: int) -> int:
    while n < 2 or any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n += by
    return n


def fit(first: int, second: int, at: Sizes, then: Sizes) -> Dim:
    """The simplest function that is `first` at the one sizes and `second` at the others. Raises Unknown."""
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
        raise Unknown(f"a size of {first} becomes {second} where the batch and length {at} become {then}")
    return found


class Table:
    """Name of a value -> its dims, for a list of graphs. Names are "graph.name"."""

    def __init__(self, first: Sequence[Captured], second: Sequence[Captured], at: Sizes, then: Sizes):
        self.at_first, self.dims = at, {}
        if len(first) != len(second):
            raise Unknown("other sizes make another number of graphs")
        cache: dict[tuple[int, int], Dim] = {}
        for n, (a, b) in enumerate(zip(first, second)):
            one, two = _values(a), _values(b)
            if len(one) != len(two):
                raise Unknown("other sizes make another graph")
            for (name, op, x), (_, again, y) in zip(one, two):
                if op != again or x.ndim != y.ndim:
                    raise Unknown(f"other sizes make another graph, from {name} on")
                pairs = [(int(p), int(q)) for p, q in zip(x.shape, y.shape)]
                for pair in pairs:
                    if pair not in cache:
                        cache[pair] = fit(*pair, at, then)
                self.dims[f"{n}.{name}"] = tuple(cache[p] for p in pairs)

    def share_of_inputs(self, s: Sizes) -> Fraction:
        """The same of the inputs that are not parameters, all of which have the batch in their first dim."""
        here = self.at_first
        return Fraction(s.batch * max(s.length, 1), here.batch * max(here.length, 1))

    def share(self, name: str, s: Sizes) -> Fraction:
        """How many times a value's elements there are at other sizes."""
        out = Fraction(1)
        for d in self.dims.get(name, ()):
            before = d.at(self.at_first)
            if before:
                out *= d.at(s) / before
        return out


def _values(captured: Captured) -> list[tuple[str, str, torch.Tensor]]:
    gm: GraphModule | None = captured.joint if captured.joint is not None else captured.forward
    assert gm is not None
    out = []
    for node in gm.graph.nodes:
        held = node.meta.get("val")
        for x in held if isinstance(held, (list, tuple)) else [held]:
            if isinstance(x, torch.Tensor):
                out.append((node.name, str(node.target) if node.op == "call_function" else node.op, x))
    return out
