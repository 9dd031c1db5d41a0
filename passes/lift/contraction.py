"""Recognize contractions: every way to write sum_r left[..., r] * right[..., r], as two operands with index maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.nodes import Opaque, Product, argument, dims, is_tensor, op_name, shape
from attnfx.passes.lift.access import variables
from attnfx.passes.lift.lifter import Lifter, broadcast
from attnfx.passes.lift.tables import INDEXING, Index, rule


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


def contraction(at: Node, index: Index) -> Contraction | None:
    """Return the contraction that a node computes at `index`, or None. For baddbmm, its product alone."""
    name = op_name(at)
    try:
        if name in ("matmul", "bmm", "mm", "__matmul__"):
            return _matmul(at, *at.args[:2], index)  # type: ignore[arg-type]
        if name == "baddbmm":
            return _matmul(at, *at.args[1:3], index)  # type: ignore[arg-type]
        if name == "einsum":
            return _einsum(at, index)
    except Opaque:
        return None
    return None


def contracted(at: Node) -> Contraction | None:
    """Return the contraction that a node computes, read at variables, or None."""
    return contraction(at, variables(at)) if is_tensor(at) else None


def _matmul(at: Node, left: Node, right: Node, index: Index) -> Contraction:
    a, b = dims(left), dims(right)
    r = variable(at, a[-1])
    if len(a) < 2 or len(b) < 2:
        raise Opaque
    batch, (row, column) = index[:-2], index[-2:]

    def pick(x: Node, extents: Index) -> Index:
        return broadcast(x, (*batch, A.ZERO, A.ZERO))[: len(extents) - 2]

    return Contraction(at, left, (*pick(left, a), row, r), right, (*pick(right, b), r, column), r)


def _einsum(at: Node, index: Index) -> Contraction:
    equation, operands = at.args[:2]
    if not isinstance(equation, str) or len(operands) != 2 or argument(at, 2, "path") not in (None, [0, 1]):  # type: ignore[arg-type]
        raise Opaque
    (left_term, right_term), out_term = terms(equation, [len(shape(x)) for x in operands])  # type: ignore[union-attr,arg-type]
    if any(len(set(t)) != len(t) for t in (left_term, right_term, out_term)):
        raise Opaque
    extents: dict[str, Expr] = {}
    for term, x in zip((left_term, right_term), operands, strict=True):  # type: ignore[arg-type]
        for letter, n in zip(term, dims(x), strict=True):
            if extents.get(letter, A.ONE) is A.ONE:
                extents[letter] = n
    at_letter = dict(zip(out_term, index, strict=True))
    summed = [c for c in extents if c not in at_letter]
    if len(summed) != 1 or summed[0] not in left_term or summed[0] not in right_term:
        raise Opaque
    r = variable(at, extents[summed[0]])
    at_letter[summed[0]] = r
    maps = []
    for term, x in zip((left_term, right_term), operands, strict=True):  # type: ignore[arg-type]
        maps.append(tuple(A.ZERO if n is A.ONE else at_letter[c] for c, n in zip(term, dims(x), strict=True)))
    return Contraction(at, operands[0], maps[0], operands[1], maps[1], r)  # type: ignore[index]


def terms(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the index strings of an einsum's operands and of its result, with "..." replaced by Greek capitals."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(ranks):
        raise Opaque
    hidden = max(r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True))
    names = "".join(chr(0x391 + n) for n in range(max(hidden, 0)))  # letters that einsum itself does not allow
    if "->" not in equation:
        letters = "".join(terms).replace(".", "")
        output = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    full = []
    for term, rank in zip(terms, ranks, strict=True):
        count = rank - len(term.replace("...", ""))
        full.append(term.replace("...", names[len(names) - count :]) if "..." in term else term)
    return full, output.replace("...", names)


@rule(INDEXING, "baddbmm")
def _baddbmm(lifter: Lifter, at: Node, index: Index) -> Expr:
    """Lift beta * input + alpha * product; the product is a separate load."""
    beta, alpha = argument(at, 3, "beta", 1), argument(at, 4, "alpha", 1)
    product = A.mul(A.to_float(lifter.operand(alpha, ())), A.load(Product(at), index, "f"))
    if beta == 0:
        return product
    added = lifter.operand(at.args[0], index)
    return A.add(product, A.mul(A.to_float(lifter.operand(beta, ())), added))
