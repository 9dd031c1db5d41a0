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
from typing import Any

from torch.fx import Node
from torch.fx.node import map_aggregate

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr, walk
from attnfx.mask import mask_of
from attnfx.passes.fx.nodes import dims, is_tensor, op_name
from attnfx.passes.lift.access import variables
from attnfx.passes.lift.contraction import contracted, contraction
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.row_rules import NONE, Along, Made, NotSeparable, Use, split
from attnfx.passes.lift.tables import VIEWS
from attnfx.passes.lift.views import SPLITTING
from attnfx.passes.rows.region import Columns, Region
from attnfx.spec import I, J

SOFTMAXES = ("softmax", "_softmax", "_safe_softmax")
SAME = (*VIEWS, *SPLITTING, "to", "_to_copy", "detach", "neg", "abs", "sqrt", "relu")
LEAST = ("amax", "logsumexp", "topk")  # reductions that ignore -inf


def find_columns(lifter: Lifter, region: Region) -> Columns | None:
    """Return the columns of a region, or None if each chunk takes all keys."""
    try:
        return _Walk(lifter, region).columns()
    except NotSeparable:
        return None


class _Walk:
    def __init__(self, lifter: Lifter, region: Region):
        self.lifter, self.region = lifter, region
        self.at: dict[Node, int] = {}  # node -> the dimension of its keys
        self.zero: set[Node] = set()  # nodes that are zero at keys that no row of the chunk sees
        self.live: list[Expr] = []
        self.least = 1

    def columns(self) -> Columns:
        calls = self.region.calls
        made = {n: self._narrowed(n) for n in reversed(list(calls))}
        if not self.at or any(n in self.at for n in self.region.results):
            raise NotSeparable("no product over keys ends it")
        for n in made:
            for x in operands(made[n]):
                if self.region.holds(x) and x.keys != self.at.get(x.node, NONE):
                    raise NotSeparable(f"{op_name(n)} reads all keys of {op_name(x.node)}")
        for n in calls:
            self._prove(n)
        if not self.live:
            raise NotSeparable("nothing masks")
        score = A.where(A.or_(*self.live), A.const(0.0), A.const(-math.inf))
        return Columns({n: made[n] for n in calls}, score, self.least)

    # -- where the keys lie -------------------------------------------------------------------------
    def _narrowed(self, n: Node) -> Made:
        """Return the call for some rows and keys. Users come first: they determine where the keys of `n` lie."""
        region, found = self.region, self._reduced(n)
        if n in self.at and not found:
            out = split(n, region.rows[n], region.extent, (self.at[n], region.columns))
        else:
            out = _with(region.calls[n], found)
        for x in operands(out):
            if x.keys != NONE and region.holds(x) and self.at.setdefault(x.node, x.keys) != x.keys:
                raise NotSeparable(f"{op_name(x.node)} has keys along two dimensions")
        return out

    def _reduced(self, n: Node) -> dict[Node, int]:
        """Map the operands whose keys an operator sums over, sorts or normalizes to the dimension of the keys."""
        name, extent = op_name(n), self.region.columns
        if name in (*SOFTMAXES, *LEAST, "sum"):
            use = Use(n, {})
            x, (d, *others) = use.source(), use.named()
            ends = self.at.get(n) == d if name in SOFTMAXES else n not in self.at
            return {x: d} if not others and dims(x)[d] is extent and ends else {}
        c = contracted(n) if n not in self.at else None
        if c is None or c.reduced.args[0] is not extent or c.left is c.right:
            return {}
        # a dimension of one element lacks an index variable
        if c.reduced not in c.left_index or c.reduced not in c.right_index:
            return {}
        return {c.left: c.left_index.index(c.reduced), c.right: c.right_index.index(c.reduced)}

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
                use = Use(n, {})
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
        multiplies = name == "mul" or (is_tensor(n) and contraction(n, variables(n)) is not None)
        return multiplies and any(x in self.zero for x in held)

    def _masked(self, x: Node) -> None:
        """Note the mask of indices that sets `x` to -inf. Raises NotSeparable without such a mask."""
        if x not in self.at:
            raise NotSeparable(f"{op_name(x)} is not the region's own")
        place = list(variables(x))
        place[self.region.rows[x]], place[self.at[x]] = I, J
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


def operands(made: Made) -> list[Along]:
    """Return all tensor operands of a call."""
    return [x for x in made.operands() if x.dim != NONE or is_tensor(x.node)]


def _with(made: Made, keys: Mapping[Node, int]) -> Made:
    """Return the call with the keys of some operands narrowed."""

    def change(x: Any) -> Any:
        node, dim = (x.node, x.dim) if isinstance(x, Along) else (x, NONE)
        return Along(node, dim, keys[node]) if isinstance(node, Node) and node in keys else x

    return Made(made.op, map_aggregate(made.args, change), map_aggregate(dict(made.kwargs), change))
