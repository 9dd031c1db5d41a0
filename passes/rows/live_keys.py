"""Find the keys that a chunk of whole rows needs: the columns of a region, and the keys that its masks leave alive.

Asked after a region was found. The walk goes back from the products and reductions that sum over keys. It finds the
dimension of the keys in each value, with the rules that find the dimension of the rows (`passes/lift/row_rules.py`). A
key that no row of a chunk may see is left out only if this is proved to change nothing. Scores that a softmax, a
maximum or a sort reads must be -inf there by a mask of indices. Values that a product or a sum reads must be zero
there. If anything else reads keys, or nothing masks, every chunk takes all keys.

A row without any live key is NaN as before; the gradients of keys that were left out are zero there, not NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.node import map_aggregate

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr, walk
from attnfx.mask import mask_of
from attnfx.passes.fx.nodes import dims, is_tensor, op_name, shape
from attnfx.passes.lift.contraction import contraction
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.row_rules import Along, Made, NotSeparable, Use, split
from attnfx.passes.lift.row_view_rules import ROWS
from attnfx.passes.lift.tables import VIEWS
from attnfx.spec import I, J
from attnfx.spec.rows import Ref

COLUMNS = Ref("columns", 0)
SOFTMAXES = ("softmax", "_softmax", "_safe_softmax")
SAME = (*VIEWS, "to", "_to_copy", "contiguous", "clone", "detach", "alias", "dropout", "neg", "abs", "sqrt", "relu")
LEAST = ("amax", "logsumexp", "topk")  # reductions that ignore -inf


@dataclass(frozen=True)
class Part:
    """The rows of a node along `dim`, restricted to a chunk's keys along `column`. None stands for all rows or keys."""

    node: Node
    dim: int | None
    column: int | None


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


def find_columns(lifter: Lifter, rows: Mapping[Node, int], calls: Mapping[Node, Made], extent: Expr, results: list[Node]
                 ) -> Columns | None:  # fmt: skip
    """Return the columns of a region, or None if each chunk takes all keys. `calls` maps the region's nodes, in order,
    to the calls that compute some of their rows. `extent` is the number of keys, `results` are the nodes that leave."""
    try:
        return _Walk(lifter, rows, calls, extent).columns(results)
    except NotSeparable:
        return None


class _Walk:
    def __init__(self, lifter: Lifter, rows: Mapping[Node, int], calls: Mapping[Node, Made], extent: Expr):
        self.rows, self.calls, self.extent = rows, calls, extent
        self.lifter = lifter
        self.at: dict[Node, int] = {}  # node -> the dimension of its keys
        self.zero: set[Node] = set()  # nodes that are zero at keys that no row of the chunk sees
        self.live: list[Expr] = []
        self.least = 1

    def columns(self, results: list[Node]) -> Columns:
        made = {n: self._narrowed(n) for n in reversed(list(self.calls))}
        if not self.at or any(n in self.at for n in results):
            raise NotSeparable("no product over keys ends it")
        for n in made:
            for x in operands(made[n]):
                if self._inside(x) and x.column != self.at.get(x.node):
                    raise NotSeparable(f"{op_name(n)} reads all keys of {op_name(x.node)}")
        for n in self.calls:
            self._prove(n)
        if not self.live:
            raise NotSeparable("nothing masks")
        score = A.where(A.or_(*self.live), A.const(0.0), A.const(-math.inf))
        return Columns({n: made[n] for n in self.calls}, score, self.least)

    def _inside(self, x: Part) -> bool:
        return x.node in self.calls and self.rows[x.node] == x.dim

    # -- where the keys lie -------------------------------------------------------------------------
    def _narrowed(self, n: Node) -> Made:
        """Return the call for some rows and keys. Users come first: they determine where the keys of `n` lie."""
        made = self.calls[n]
        found = self._reduced(n)
        if n in self.at and not found:
            if op_name(n) in ("tril", "triu") and self.at[n] == len(shape(n)) - 1:
                out = _of_triangle(made, self.at[n])
            else:
                narrowed = split(n, self.at[n], self.extent)
                if narrowed.op != made.op:
                    raise NotSeparable(f"{op_name(n)} has two forms")
                out = Made(made.op, _both(made.args, narrowed.args), _both(dict(made.kwargs), dict(narrowed.kwargs)))
        else:
            out = _with(made, found)
        for x in operands(out):
            if x.column is not None and self._inside(x) and self.at.setdefault(x.node, x.column) != x.column:
                raise NotSeparable(f"{op_name(x.node)} has keys along two dimensions")
        return out

    def _reduced(self, n: Node) -> dict[Node, int]:
        """Map the operands whose keys an operator sums over, sorts or normalizes to the dimension of the keys."""
        name, found = op_name(n), {}
        if name in SOFTMAXES or name in (*LEAST, "sum"):
            use = Use(n, 0, A.ONE)
            x, which = use[use.names("self", "input")], use["dim"]
            if not isinstance(which, list | tuple):
                which = [which]
            if len(which) == 1 and which[0] is not None:
                d = int(which[0]) % len(shape(x))
                if dims(x)[d] is self.extent and (self.at.get(n) == d if name in SOFTMAXES else n not in self.at):
                    found[x] = d
        elif n not in self.at and is_tensor(n):
            c = contraction(n, tuple(A.var(f"o{d}", size) for d, size in enumerate(dims(n))))
            if c is None or c.reduced.args[0] is not self.extent or c.left is c.right:
                return found
            # a dimension of one element lacks an index variable
            if c.reduced in c.left_index and c.reduced in c.right_index:
                found = {c.left: c.left_index.index(c.reduced), c.right: c.right_index.index(c.reduced)}
        return found

    # -- the contribution of keys that no row sees ----------------------------------------------------
    def _prove(self, n: Node) -> None:
        """Note whether `n` is zero at keys that no row sees. Raises NotSeparable if `n` changes without these keys."""
        name, reduced = op_name(n), self._reduced(n)
        held = [x for x in n.all_input_nodes if x in self.at]
        if name in SOFTMAXES and reduced:
            self._masked(next(iter(reduced)))
            self.zero.add(n)
        elif name in LEAST and reduced:
            self._masked(next(iter(reduced)))
            if name == "topk":
                use = Use(n, 0, A.ONE)
                k = use["k"]
                if not isinstance(k, int) or use["largest"] is not True:
                    raise NotSeparable("not the largest of a fixed number")
                if any(u.args[1] == 1 and u.users for u in n.users):
                    raise NotSeparable("the places of the best keys are read")
                self.least = max(self.least, k)
        elif reduced:
            if not any(x in self.zero for x in reduced):
                raise NotSeparable(f"{name} adds up keys that no row sees")
        elif n in self.at and held and self._stays_zero(n, name, held):
            self.zero.add(n)

    def _stays_zero(self, n: Node, name: str, held: list[Node]) -> bool:
        if name in SAME or name in ("stack", "cat"):
            return all(x in self.zero for x in held) and len(held) == len(n.all_input_nodes)
        if name in ("add", "sub", "where"):  # a constant operand is not zero
            return all(x in self.zero for x in n.args)
        if name == "div":  # a divisor of each key may be zero itself
            return n.args[0] in self.zero and n.args[1] not in self.at
        return (name == "mul" or (_product(n) and name != "baddbmm")) and any(x in self.zero for x in held)

    def _masked(self, x: Node) -> None:
        """Note the mask of indices that sets `x` to -inf. Raises NotSeparable without such a mask."""
        if x not in self.at:
            raise NotSeparable(f"{op_name(x)} is not the region's own")
        place: list[Expr] = [A.var(f"o{d}", size) for d, size in enumerate(dims(x))]
        place[self.rows[x]], place[self.at[x]] = I, J
        mask = mask_of(self.lifter.lift(x, tuple(place)))
        if mask is None or mask.fill != -math.inf:
            raise NotSeparable("nothing masks with -inf")
        parts = mask.keep.args if mask.keep.op == "and" else (mask.keep,)
        known = [
            e
            for e in parts
            if e.free <= {"i", "j"} and all(a.op not in ("load", "size", "aten", "dot") for a in _own(e))
        ]
        if not known:
            raise NotSeparable("no mask of indices alone")
        self.live.append(A.and_(*known))


def _own(e: Expr) -> list[Expr]:
    """Return the nodes of an expression without the sizes that bound its variables."""
    return [a for a in walk(e) if a.op != "size" or a not in (I.args[0], J.args[0])]


def _product(n: Node) -> bool:
    return is_tensor(n) and contraction(n, tuple(A.var(f"o{d}", x) for d, x in enumerate(dims(n)))) is not None


def part(x: Along | Part | Node) -> Part:
    if isinstance(x, Part):
        return x
    return Part(x.node, x.dim, None) if isinstance(x, Along) else Part(x, None, None)


def operands(made: Made) -> list[Part]:
    """Return all tensor operands of a call; a bare node is read as a whole."""
    out: list[Part] = []

    def visit(x: Any) -> Any:
        if isinstance(x, Along | Part) or is_tensor(x):
            out.append(part(x))
        return x

    map_aggregate((made.args, dict(made.kwargs)), visit)
    return out


def _with(made: Made, columns: Mapping[Node, int]) -> Made:
    """Return the call with the keys of some operands narrowed."""

    def change(x: Any) -> Any:
        if isinstance(x, Along) and x.node in columns:
            return Part(x.node, x.dim, columns[x.node])
        return Part(x, None, columns[x]) if isinstance(x, Node) and x in columns else x

    return Made(made.op, map_aggregate(made.args, change), map_aggregate(dict(made.kwargs), change))


def _both(row: Any, column: Any) -> Any:
    """Merge an argument of the call for some rows and of the call for some keys into one for both."""
    if column == ROWS and row != ROWS:
        return COLUMNS
    if isinstance(row, list | tuple):
        if len(row) != len(column):
            raise NotSeparable("the two forms differ")
        return type(row)(_both(a, b) for a, b in zip(row, column))
    if isinstance(row, dict):
        return {k: _both(v, column[k]) for k, v in row.items()}
    if isinstance(row, Along):
        return Part(row.node, row.dim, column.dim) if isinstance(column, Along) else row
    if isinstance(row, Node):
        return Part(row, None, column.dim) if isinstance(column, Along) else row
    if isinstance(column, Ref) and column != row:
        raise NotSeparable("the first key decides a number")
    return row


def _of_triangle(made: Made, column: int) -> Made:
    """Narrow a triangle to some keys: its diagonal depends on keys and rows together."""
    seen: list[Ref] = []

    def change(x: Any) -> Any:
        if isinstance(x, Ref) and x.kind == "start":
            seen.append(x)
            return Ref("corner", x.what)
        return Part(x.node, x.dim, column) if isinstance(x, Along) else x

    out = Made(made.op, map_aggregate(made.args, change), map_aggregate(dict(made.kwargs), change))
    if not seen:
        raise NotSeparable("the rows of a triangle lie elsewhere")
    return out
