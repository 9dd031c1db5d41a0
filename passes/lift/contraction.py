"""Recognize contractions: every way to write sum_r left[..., r] * right[..., r], as two operands with index maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.einsum import einsum
from attnfx.passes.fx.nodes import Opaque, Product, argument, dims, is_tensor, slot_node
from attnfx.passes.lift.access import variables
from attnfx.passes.lift.lifter import Lifter
from attnfx.passes.lift.products import batched
from attnfx.passes.lift.tables import ADDING, Index, rule


@dataclass(frozen=True)
class Contraction:
    """A sum over `reduced` of left[left_index] * right[right_index]: the value of `node` at an index."""

    node: Node
    left: Node
    left_index: Index
    right: Node
    right_index: Index
    reduced: Expr

    @property
    def turned(self) -> Contraction:
        """Return the contraction with left and right exchanged."""
        return Contraction(self.node, self.right, self.right_index, self.left, self.left_index, self.reduced)


def variable(at: Node, extent: Expr) -> Expr:
    return A.var(f"k_{at.name}", extent)


def contraction(slot: object, index: Index) -> Contraction | None:
    """Return the contraction that a node computes at `index`, or None. A node that adds a tensor to its product is not
    one; its slot `Product` is."""
    try:
        product = einsum(slot)
    except Opaque:
        return None
    extents: dict[str, Expr] = {}
    for term, x in zip(product.terms, product.operands, strict=True):
        for letter, n in zip(term, dims(x), strict=True):
            if extents.get(letter, A.ONE) is A.ONE:
                extents[letter] = n
    at = slot_node(slot)
    at_letter = dict(zip(product.out, index, strict=True))
    summed = [c for c in extents if c not in at_letter]
    if len(product.terms) != 2 or len(summed) != 1 or any(summed[0] not in term for term in product.terms):
        return None
    r = at_letter[summed[0]] = variable(at, extents[summed[0]])
    kept = (*product.matrix, summed[0])
    left, right = (
        tuple(
            at_letter[c] if n is not A.ONE or (c in kept and extents[c] is A.ONE) else A.ZERO
            for c, n in zip(term, dims(x), strict=True)
        )
        for term, x in zip(product.terms, product.operands, strict=True)
    )
    return Contraction(at, product.operands[0], left, product.operands[1], right, r)


def contracted(at: Node) -> Contraction | None:
    """Return the contraction of a node, read at variables, without a tensor that the node adds to it; or None."""
    return contraction(Product(at), variables(at)) if is_tensor(at) else None


@rule(ADDING, "baddbmm", "addmm")
def _product_and_sum(lifter: Lifter, at: Node, index: Index) -> Expr:
    """Lift beta * input + alpha * product; the product is a separate load."""
    if not batched(at):
        raise Opaque  # a linear layer
    beta, alpha = argument(at, 3, "beta", 1), argument(at, 4, "alpha", 1)
    product = A.mul(A.to_float(lifter.operand(alpha, ())), A.load(Product(at), index, "f"))
    if beta == 0:
        return product
    added = lifter.operand(at.args[0], index)
    return A.add(product, A.mul(A.to_float(lifter.operand(beta, ())), added))
