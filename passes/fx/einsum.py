"""Read products as einsums: one form for every spelling of a sum of products of the operands' elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from attnfx.passes.fx.nodes import Opaque, Product, argument, op_name, shape, slot_node

ADDING = ("addmm", "baddbmm", "addmv")  # the first operand is added to the product of the others
MULTIPLYING = ("matmul", "__matmul__", "bmm", "mm", "mv", "dot", "linear", "einsum", *ADDING)


@dataclass(frozen=True)
class Einsum:
    """The sum of products of the operands' elements over all letters that `out` lacks. `terms` has a letter for each
    dimension of each operand, and `out` one for each dimension of the result. `matrix` names the rows and columns of a
    product of matrices, which are not broadcast."""

    operands: tuple[Node, ...]
    terms: tuple[str, ...]
    out: str
    matrix: str = ""


def einsum(slot: object) -> Einsum:
    """Return the product that a node computes, or the product alone for the slot `Product` of a node that adds another
    tensor to it. Raises Opaque for other nodes, and for an einsum that reads or writes a diagonal."""
    n = slot_node(slot)
    name = op_name(n)
    if name not in MULTIPLYING or (_adds(n) and not isinstance(slot, Product)):
        raise Opaque
    if name == "einsum":
        operands = tuple(n.args[1])  # type: ignore[arg-type]
        return parsed(str(n.args[0]), operands)
    first = int(name in ADDING)
    return of_matrices(n.args[first : first + 2], turned=name == "linear")  # type: ignore[arg-type]


def _adds(n: Node) -> bool:
    return op_name(n) in ADDING or (op_name(n) == "linear" and argument(n, 2, "bias") is not None)


def of_matrices(operands: Sequence[Node], turned: bool = False) -> Einsum:
    """Return the product of two batches of matrices or vectors; the right ones are transposed if `turned`."""
    row, column = (len(shape(x)) > 1 for x in operands)
    left, right = "...ik" if row else "k", ("...jk" if turned else "...kj") if column else "k"
    return replace(parsed(f"{left},{right}->...{'i' * row}{'j' * column}", operands), matrix="ij")


def parsed(equation: str, operands: Sequence[Node]) -> Einsum:
    """Return an einsum with "..." replaced by Greek capitals, which einsum does not allow. Raises Opaque."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    given = inputs.split(",")
    if len(given) != len(operands):
        raise Opaque
    counts = [len(shape(x)) - len(term.replace("...", "")) for term, x in zip(given, operands, strict=True)]
    names = "".join(chr(0x391 + n) for n in range(max(0, *counts)))
    if not arrow:
        letters = inputs.replace(".", "").replace(",", "")
        out = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms = tuple(t.replace("...", names[len(names) - n :]) for t, n in zip(given, counts, strict=True))
    out = out.replace("...", names)
    if any(len(set(t)) != len(t) for t in (*terms, out)):
        raise Opaque
    return Einsum(tuple(operands), terms, out)
