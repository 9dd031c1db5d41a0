"""Find the nodes that descend from normalizers, and the normalizers that descend from products of queries with keys.

The matcher tries a product only if one of its operands descends from a normalizer that comes from a product. The paths
contain only operators that a score program may contain; `loose` accepts paths through any operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch.fx import GraphModule, Node

from attnfx.ir.expr import Expr
from attnfx.passes.fx.nodes import dims, is_tensor, op_name, size_expr, value
from attnfx.passes.lift.products import ANCHORS, NORMS, batched, meeting, of_batch, parameter
from attnfx.passes.lift.tables import INDEXING, POINTWISE, VIEWS

SORTING = ("sort", "topk", "argsort")
NEAR = 5  # most nodes from a value for each row back to the scores
KEEPING = ("add", "clamp", "clamp_min", "clip", "maximum", "detach", "to")  # operators that guard a total
REDUCING = ("sum", "amax", "max", "logsumexp", "mean")


class Descent:
    """The ancestry of weights and scores in one graph.

    weights   nodes that descend from a normalizer -> the nearest normalizers
    scores    nodes that descend from a product -> the nearest products
    met       softmaxes of values in which rows of two batches are combined without a product
    near      softmaxes and sorts that come from a product by any operators and have its shape (set by `loose`)
    """

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self.near: frozenset[Node] = frozenset()
        self.weights = self.descendants(n for n in gm.graph.nodes if op_name(n) in ANCHORS or shared(n))
        self.scores = self.descendants((n for n in gm.graph.nodes if batched(n)), unknown=True)
        self.met = self._met()

    def descendants(self, seeds: Iterable[Node], unknown: bool = False) -> dict[Node, list[Node]]:
        """Map each node that descends from a seed through pointwise, view and reducing operators to the nearest seeds.
        With `unknown`, operators that are not understood count too if they keep the shape, so that the refusal can name
        them, and a reduction of the rows or keys does not."""
        out: dict[Node, list[Node]] = {}
        seeds = set(seeds)
        for n in self.gm.graph.nodes:
            if n.op != "call_function":
                continue
            name = op_name(n)
            if n in seeds:
                out[n] = [n]
            elif name in POINTWISE or name in VIEWS or name in INDEXING or name in REDUCING:
                found = [s for a in n.all_input_nodes for s in out.get(a, ())]
                if unknown and name in REDUCING:
                    held = value(n) if is_tensor(n) else value(n)[0]
                    found = [s for s in found if not _plane(s) - Counter(map(size_expr, held.shape))]
                if found:
                    out[n] = list(dict.fromkeys(found))[:8]
            elif unknown and is_tensor(n) and name not in NORMS:
                found = [s for a in n.all_input_nodes if is_tensor(a) and dims(a) == dims(n) for s in out.get(a, ())]
                if found:
                    out[n] = list(dict.fromkeys(found))[:8]
        return out

    def _met(self) -> frozenset[Node]:
        """Return softmaxes of values computed from nodes that combine rows of two batches without a product."""
        met: set[Node] = set()
        for n in self.gm.graph.nodes:
            if meeting(n) or (not batched(n) and any(a in met for a in n.all_input_nodes)):
                met.add(n)
        return frozenset(n for n in met if "softmax" in op_name(n) and not self.from_scores(n))

    def _loosely(self, seeds: Iterable[Node]) -> dict[Node, dict[Node, int]]:
        """Map each node that descends from a seed through any operators but products to {seed: distance}. On the way,
        the seed's last two dimensions must be kept or soon come back, as after a threshold for each row. The distance
        counts the nodes since they were last kept."""
        out: dict[Node, dict[Node, int]] = {n: {n: 0} for n in seeds}
        for n in self.gm.graph.nodes:
            if n.op != "call_function" or n in out or batched(n) or op_name(n) == "sym_size":
                continue
            found: dict[Node, int] = {}
            for a in n.all_input_nodes:
                for s, far in out.get(a, {}).items():
                    kept = not is_tensor(n) or not _plane(s) - Counter(dims(n))
                    found[s] = min(found.get(s, NEAR), 0 if kept else far + 1)
            found = {s: far for s, far in found.items() if far < NEAR}
            if found:
                out[n] = dict(list(found.items())[:8])
        return out

    def loose(self) -> dict[Node, list[Node]]:
        """Map each product that weights reach by any path to the operators that may have normalized these weights."""
        if not any("softmax" in op_name(n) or op_name(n) in SORTING for n in self.gm.graph.nodes):
            return {}
        scores = self._loosely(n for n in self.gm.graph.nodes if batched(n))
        seeds = [
            n
            for n in self.gm.graph.nodes
            if ("softmax" in op_name(n) or op_name(n) in SORTING) and any(a in scores for a in n.all_input_nodes)
        ]
        self.near = frozenset(n for n in seeds if any(0 in scores.get(a, {}).values() for a in n.all_input_nodes))
        weights = self._loosely(seeds)
        found = {
            n: [s for a in n.all_input_nodes for s in weights.get(a, ())] for n in self.gm.graph.nodes if batched(n)
        }
        return {n: list(dict.fromkeys(s)) for n, s in found.items() if s}

    def from_pairs(self, n: Node, anchors: Iterable[Node]) -> bool:
        """Return whether an operand of a product has a weight for each pair of two batches' rows, which their products
        score: neither side is a layer's weight."""
        products = {s for x in anchors for a in x.all_input_nodes for s in self.scores.get(a, ())}
        sides = [x for s in products for x in s.all_input_nodes if is_tensor(x)]
        weights = [w for w in n.all_input_nodes if w in self.weights]
        paired = all(any(not _plane(s) - Counter(dims(w)) for w in weights) for s in products)
        return bool(products) and paired and all(of_batch(x) and not parameter(x) for x in sides)

    def from_scores(self, anchor: Node) -> bool:
        return any(a in self.scores for a in anchor.all_input_nodes)


def shared(n: Node) -> bool:
    """Return whether a node is divided by a sum over a tensor of its own shape, computed by any function: by a total
    for each row, not by a length or a deviation."""
    if op_name(n) not in ("div", "true_divide") or not all(is_tensor(x) for x in n.args[:2]):
        return False
    at: object = n.args[1]
    for _ in range(NEAR):
        if not isinstance(at, Node) or at.op != "call_function" or not is_tensor(at):
            return False
        total = op_name(at) == "sum" or (op_name(at) in ("linalg_vector_norm", "norm") and 1 in at.args[1:2])
        if total:
            return is_tensor(at.args[0]) and dims(at.args[0]) == dims(n) != dims(at)  # type: ignore[arg-type]
        if op_name(at) not in VIEWS and op_name(at) not in KEEPING:
            return False
        at = at.args[0]
    return False


def _plane(n: Node) -> Counter[Expr]:
    """Return the last two dimensions of a node, or of the operand of a node that returns a tuple."""
    return Counter(dims(n if is_tensor(n) else n.all_input_nodes[0])[-2:])
