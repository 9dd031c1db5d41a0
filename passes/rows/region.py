"""Define a region of a graph that is computed row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.nodes import dims, is_tensor, number, op_name, value
from attnfx.passes.lift.contraction import contraction
from attnfx.passes.lift.row_rules import Made
from attnfx.passes.lift.tables import VIEWS
from attnfx.passes.rows.live_keys import Columns


@dataclass
class Region:
    """A region of a graph whose rows are independent.

    final     the node that the attention ends with; its rows lie along `rows[final]`
    extent    the number of rows
    columns   the number of keys
    rows      node inside -> the dimension that its rows lie along
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
    def keys(self) -> Any:
        """Return the number of keys; maybe symbolic."""
        n = self.scores[0]
        return next(x for d, x in enumerate(value(n).shape) if dims(n)[d] is self.columns and d != self.rows[n])

    @property
    def work(self) -> Counter[str]:
        """Count the operators on values with an element for each row and key, by name. A product counts as "mix" if it
        maps such a value to another, and as "product" if queries, keys or values take part."""
        found: Counter[str] = Counter()

        def large(n: Node) -> bool:
            at = self.rows.get(n)
            return at is not None and is_tensor(n) and any(x is self.columns for d, x in enumerate(dims(n)) if d != at)

        for n in self.calls:
            made, read = large(n), any(large(a) for a in n.all_input_nodes)
            if contraction(n, tuple(A.var(f"o{d}", x) for d, x in enumerate(dims(n)))) if is_tensor(n) else None:
                found["mix" if made and read else "product"] += 1
            elif (made or read) and op_name(n) not in (*VIEWS, "getitem"):
                found[op_name(n)] += 1
        return found

    @property
    def gives_scores(self) -> bool:
        """Return whether a value with an element for each row and key leaves the region."""
        others = [(dims(n), self.rows[n]) for n in self.results if n is not self.final]
        return any(x is self.columns for have, row in others for d, x in enumerate(have) if d != row)
