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


def contraction(slot: object, index: Index) -> Contraction | None:
    """Return the contraction that a node computes at `index`, or None. A node that adds a tensor to its product is not
    one; its slot `Product` is."""
    try:
        operands, reduced = factors(slot, index)
    except Opaque:
        return None
    if len(operands) != 2 or len(reduced) != 1 or any(reduced[0] not in at for _, at in operands):
        return None
    (left, left_index), (right, right_index) = operands
    return Contraction(slot_node(slot), left, left_index, right, right_index, reduced[0])


def factors(slot: object, index: Index) -> tuple[list[tuple[Node, Index]], list[Expr]]:
    """Return the operands of a product at `index`, each with the index at which it is read, and the variables over
    which their products are summed. Raises Opaque as `einsum` does."""
    at, product = slot_node(slot), einsum(slot)
    extents: dict[str, Expr] = {}
    for term, x in zip(product.terms, product.operands, strict=True):
        for letter, n in zip(term, dims(x), strict=True):
            if extents.get(letter, A.ONE) is A.ONE:
                extents[letter] = n
    at_letter = dict(zip(product.out, index, strict=True))
    reduced = {c: A.var(f"k{ord(c)}_{at.name}", n) for c, n in extents.items() if c not in at_letter}
    at_letter |= reduced
    kept = (*product.matrix, *reduced)

    def place(c: str, n: Expr) -> Expr:
        broadcast = n is A.ONE and not (c in kept and extents[c] is A.ONE)
        return A.ZERO if broadcast else at_letter[c]

    given = zip(product.operands, product.terms, strict=True)
    operands = [(x, tuple(place(c, n) for c, n in zip(term, dims(x), strict=True))) for x, term in given]
    return operands, list(reduced.values())


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
