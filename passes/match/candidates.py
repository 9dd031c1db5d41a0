"""Find the nodes that descend from normalizers, and the normalizers that descend from products of queries with keys.

The matcher tries a product only if one of its operands descends from a normalizer that comes from a product. The paths
contain only operators that a score program may contain; in `loose`, paths contain any operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice

from torch.fx import GraphModule, Node

from attnfx.ir.expr import Expr, walk
from attnfx.ir.reach import reach
from attnfx.passes.fx.analysis import descendants, seeds_of
from attnfx.passes.fx.nodes import axis, dims, is_tensor, op_name, size_expr, slot_node, value
from attnfx.passes.lift.access import free, variables
from attnfx.passes.lift.contraction import contraction
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.products import ANCHORS, NORMS, batched, chain, meeting, of_batch, of_one_matrix, parameter
from attnfx.passes.lift.tables import INDEXING, POINTWISE, VIEWS

SORTING = ("sort", "topk", "argsort")
NEAR = 5  # most nodes from a value for each row back to the scores
KEEPING = ("add", "clamp", "clamp_min", "clip", "maximum", "detach", "to")  # operators that guard a total
REDUCING = ("sum", "amax", "max", "logsumexp", "mean")


class Descent:
    """The ancestry of weights and scores in one graph.

    known     operators that are pointwise, views, lookups or reductions, which weights and scores pass through
    products  products that may be scores
    weights   nodes that descend from a normalizer -> the nearest normalizers
    scores    nodes that descend from a product -> the nearest products
    met       softmaxes, and divisions by a sum, of values in which rows of two batches are combined without a product
    anyhow    nodes that descend from a product by any operators -> the nearest products
    near      softmaxes and sorts in `anyhow` that have the product's shape
    loose     products that weights reach by any operators -> those that may have normalized these weights
    """

    def __init__(self, gm: GraphModule, lifter: Lifter):
        nodes = list(gm.graph.nodes)
        self.known = list(filter(_known, nodes))
        self.products = {n for n in nodes if batched(n)} | self._of_shared_queries(nodes, lifter)
        products = [n for n in nodes if n in self.products]
        self.weights = descendants((n for n in nodes if op_name(n) in ANCHORS or shared(n)), self.known)
        shaped = [n for n in nodes if _known(n) or (is_tensor(n) and op_name(n) not in NORMS)]
        self.scores = descendants(products, shaped, _shape_kept)
        pairs = reach(filter(meeting, nodes), lambda n: [u for u in n.users if not batched(u)])
        self.met = frozenset(n for n in pairs if ("softmax" in op_name(n) or shared(n)) and not self.from_scores(n))
        others = [n for n in nodes if not batched(n) and op_name(n) != "sym_size"]
        self.anyhow = descendants(products, others, _plane_kept, NEAR)
        normalizers = (n for n in nodes if "softmax" in op_name(n) or op_name(n) in SORTING)
        seeds = [n for n in normalizers if seeds_of(self.anyhow, n)]
        self.near = frozenset(n for n in seeds if any(0 in self.anyhow.get(a, {}).values() for a in n.all_input_nodes))
        weights = descendants(seeds, others, _plane_kept, NEAR)
        self.loose = {n: found for n in products if (found := seeds_of(weights, n))}

    def _of_shared_queries(self, nodes: list[Node], lifter: Lifter) -> set[Node]:
        """Return the products of a batch of keys with one matrix of queries, which the whole batch shares: a softmax
        normalizes over the rows of the batch. Over the rows of the matrix, it would be a router."""
        below = descendants(filter(of_one_matrix, nodes), self.known)
        found = set()
        for n in nodes:
            if "softmax" not in op_name(n) or not (products := seeds_of(below, n)):
                continue
            x: Node = n.args[0]  # type: ignore[assignment]
            at = variables(x)
            j = at[axis(n)]
            for e in walk(lifter.lift(x, at)):
                c = contraction(e.value, e.args) if e.op == "load" and slot_node(e.value) in products else None
                if c is not None:
                    found.update(
                        c.node
                        for keys, own, other in (
                            (c.left, c.left_index, c.right_index),
                            (c.right, c.right_index, c.left_index),
                        )
                        if len(dims(keys)) > 2 and j.value in free(own) - free(other)
                    )
        return found

    def from_pairs(self, n: Node, anchors: Iterable[Node]) -> bool:
        """Return whether an operand of a product has a weight for each pair of two batches' rows, which their products
        score: neither side is a layer's weight."""
        products = seeds_of(self.scores, *anchors)
        sides = [x for s in products for x in s.all_input_nodes if is_tensor(x)]
        weights = [w for w in n.all_input_nodes if w in self.weights]
        paired = all(any(_has_plane(dims(w), s) for w in weights) for s in products)
        return bool(products) and paired and all(of_batch(x) and not parameter(x) for x in sides)

    def from_scores(self, anchor: Node) -> bool:
        return any(a in self.scores for a in anchor.all_input_nodes)


def _known(n: Node) -> bool:
    return any(op_name(n) in names for names in (POINTWISE, VIEWS, INDEXING, REDUCING))


def _shape_kept(n: Node, operand: Node, seed: Node) -> bool:
    """Return whether a reduction keeps the rows and keys. Operators that are not understood must keep the shape: they
    are followed only so that the refusal can name them."""
    if op_name(n) in REDUCING:
        held = value(n) if is_tensor(n) else value(n)[0]
        return _has_plane(map(size_expr, held.shape), seed)
    return _known(n) or (is_tensor(operand) and dims(operand) == dims(n))


def _plane_kept(n: Node, operand: Node, seed: Node) -> bool:
    return not is_tensor(n) or _has_plane(dims(n), seed)


def _has_plane(sizes: Iterable[Expr], seed: Node) -> bool:
    """Return whether the sizes include the last two dimensions of a seed, or of its operand if it returns a tuple."""
    plane = dims(seed if is_tensor(seed) else seed.all_input_nodes[0])[-2:]
    return not Counter(plane) - Counter(sizes)


def shared(n: Node) -> bool:
    """Return whether a node is divided by a sum over a tensor of its own shape, computed by any function: by a total
    for each row, not by a length or a deviation."""
    if op_name(n) not in ("div", "true_divide") or not all(is_tensor(x) for x in n.args[:2]):
        return False
    guards = chain(n.args[1], lambda at: op_name(at) in (*VIEWS, *KEEPING) and is_tensor(at.args[0]))  # type: ignore[arg-type]
    for at in islice(guards, NEAR):
        if op_name(at) == "sum" or (op_name(at) in ("linalg_vector_norm", "norm") and 1 in at.args[1:2]):
            return is_tensor(at.args[0]) and dims(at.args[0]) == dims(n) != dims(at)  # type: ignore[arg-type]
    return False
