"""Define a region of a graph that is computed row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from attnfx.ir.expr import Expr
from attnfx.passes.fx.nodes import dims, is_tensor, number, op_name, value
from attnfx.passes.lift.contraction import contracted
from attnfx.passes.lift.row_rules import NONE, Along, Made
from attnfx.passes.lift.tables import VIEWS


@dataclass(frozen=True)
class Columns:
    """The calls of a region for live keys only.

    calls  node -> the call that computes it for some rows and keys
    score  where(a key may be live, 0, -inf), over i and j
    least  the fewest keys of a chunk
    """

    calls: dict[Node, Made]
    score: Expr
    least: int


@dataclass
class Region:
    """A region of a graph whose rows are independent.

    final     the node that the attention ends with; its rows lie along `rows[final]`
    extent    the number of rows
    columns   the number of keys
    rows      node inside -> the dimension that its rows lie along, or NONE if it sums over the rows
    calls     node inside -> the call that computes some of its rows
    inputs    values read from outside: (node, the dimension of the rows, or None for the whole)
    results   nodes that are read outside: `final`, and others
    scores    the products of queries with keys
    narrowed  the calls for a chunk's live keys; None if a chunk takes all keys
    """

    final: Node
    extent: Expr
    columns: Expr
    rows: dict[Node, int] = field(default_factory=dict)
    calls: dict[Node, Made] = field(default_factory=dict)
    inputs: dict[tuple[Node, int | None], None] = field(default_factory=dict)
    results: list[Node] = field(default_factory=list)
    scores: list[Node] = field(default_factory=list)
    narrowed: Columns | None = None

    def holds(self, x: Along) -> bool:
        """Return whether an operand is computed inside."""
        return x.node in self.calls and self.rows[x.node] == x.dim

    def large(self, n: Node, row: int) -> bool:
        """Return whether a node has an element for each row and each key."""
        return is_tensor(n) and any(x is self.columns for d, x in enumerate(dims(n)) if d != row)

    @property
    def numbers(self) -> list[Node]:
        """Return the symbolic floats that the calls read."""
        read = (x.node for call in self.calls.values() for x in call.operands())
        return list(dict.fromkeys(n for n in read if isinstance(value(n), torch.SymFloat)))

    @property
    def random(self) -> bool:
        return any(c.op == "dropout" for c in self.calls.values())

    @property
    def weight(self) -> Any:
        """Return the elements of the largest value, for one row; maybe symbolic."""
        most, weight = -1, 1
        for n, row in self.rows.items():
            if n in self.calls and is_tensor(n):
                elements: Any = 1
                for d, x in enumerate(value(n).shape):
                    elements = elements * (x if d != row else 1)
                if number(elements) > most:
                    most, weight = number(elements), elements
        return weight

    @property
    def length(self) -> Any:
        """Return the number of rows; maybe symbolic."""
        return value(self.scores[0]).shape[self.rows[self.scores[0]]]

    @property
    def keys(self) -> Any:
        """Return the number of keys; maybe symbolic."""
        n = self.scores[0]
        return next(x for d, x in enumerate(value(n).shape) if dims(n)[d] is self.columns and d != self.rows[n])

    @property
    def work(self) -> Counter[str]:
        """Count the operators on values with an element for each row and key, by name. A product counts as "mix" if it
        maps such a value to another, and as "product" if queries, keys or values take part."""
        found: Counter[str] = Counter()
        large = {n for n, row in self.rows.items() if self.large(n, row)}
        for n in self.calls:
            read = not large.isdisjoint(n.all_input_nodes)
            if contracted(n):
                found["mix" if n in large and read else "product"] += 1
            elif (n in large or read) and op_name(n) not in (*VIEWS, "getitem"):
                found[op_name(n)] += 1
        return found

    @property
    def gives_scores(self) -> bool:
        """Return whether a value with an element for each row and key leaves the region."""
        others = [(dims(n), self.rows[n]) for n in self.results if n is not self.final and self.rows[n] != NONE]
        return any(x is self.columns for have, row in others for d, x in enumerate(have) if d != row)
