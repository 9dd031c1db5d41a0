"""Recognize products of two batches of matrices, and list the operators that normalize or act as layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice

import torch
from torch.fx import Node

from attnfx.ir.reach import reach
from attnfx.passes.fx.einsum import einsum
from attnfx.passes.fx.nodes import PRODUCTS, SDPA, Opaque, Product, is_tensor, op_name, shape, spanned, value
from attnfx.passes.lift.tables import POINTWISE, VIEWS


def chain(x: Node, through: Callable[[Node], bool] = lambda n: True) -> Iterator[Node]:
    """Yield a node, and the first operand of each yielded node that `through` accepts."""
    return reach([x], lambda n: [a for a in n.args[:1] if isinstance(a, Node) and through(n)])


def skip(x: Node, names: Collection[str]) -> Node:
    """Return the first node that is not an operator of these names, from `x` on by first operands."""
    *_, x = chain(x, lambda n: op_name(n) in names)
    return x


def of_batch(x: Node) -> bool:
    """Return whether a matrix is one of a batch, or is a batch of matrices itself."""
    matrices = chain(x, lambda n: op_name(n) in (*VIEWS, "mul", "div") and is_tensor(n.args[0]))
    return any(len(shape(n)) > 2 for n in matrices)


def parameter(x: Node) -> bool:
    """Return whether a node is a parameter of the model, or a view or cast of one."""
    x = skip(x, (*VIEWS, "to", "_to_copy"))
    return isinstance(x.meta.get("example_value", value(x)), torch.nn.Parameter)


DISTANCES = ("cdist", "_cdist_forward")


def batched(n: Node) -> bool:
    """Return whether a node multiplies two batches of matrices, or two plain matrices that are not parameters.

    Scores and weighted values are such products. A batch times one matrix (a linear layer, a router's gate) is not,
    unless a softmax shows that it is (`of_one_matrix`).
    """
    operands = _multiplied(n)
    if all(len(shape(x)) == 2 for x in operands):
        return bool(operands) and not any(map(parameter, operands))
    return all(len(shape(x)) > 2 for x in operands)


def of_one_matrix(n: Node) -> bool:
    """Return whether a node multiplies a batch of matrices with one matrix. Most such products are layers, but the
    matrix may also hold the queries or the values of the whole batch."""
    ranks = sorted(len(shape(x)) for x in _multiplied(n))
    return len(ranks) == 2 and ranks[0] == 2 < ranks[1]


def _multiplied(n: Node) -> tuple[Node, ...]:
    """Return the operands of a product; none for another operator, such as a layer with a bias."""
    if n.op != "call_function" or op_name(n) not in (*PRODUCTS, "linear") or not is_tensor(n):
        return ()
    try:
        operands = einsum(n if op_name(n) == "linear" else Product(n)).operands
    except Opaque:
        return ()
    return operands if len(operands) > 1 else ()


def meeting(n: Node) -> bool:
    """Return whether a node combines rows of two batches pair by pair without a product: by broadcasting, with a
    dimension of its own for each operand (additive attention), or as distances."""
    if n.op != "call_function" or not is_tensor(n) or not value(n).is_floating_point():
        return False
    if op_name(n) in DISTANCES:
        return True
    operands = (*n.all_input_nodes, None, None)[:2]
    if op_name(n) not in POINTWISE or not all(is_tensor(a) and value(a).is_floating_point() for a in operands):
        return False
    left, right = (spanned(a, len(shape(n))) for a in operands)  # type: ignore[arg-type]
    return bool(left - right and right - left) and all(of_batch(a) or _of_layer(a) for a in operands if a is not None)


def _of_layer(x: Node) -> bool:
    """Return whether a matrix comes from a product of activations, such as a layer on the nodes of one graph."""

    def layer(n: Node) -> bool:
        return op_name(n) in (*PRODUCTS, "linear") and not parameter(n.args[0])  # type: ignore[arg-type]

    return comes_from(x, layer)


NEAR = 16  # most nodes between a part and its product, or between a part or a product and a softmax


def reaches_softmax(n: Node, anyhow: bool = False) -> bool:
    """Return whether a softmax follows closely, through elementwise operators and views (`anyhow`: any operators)."""
    at, seen = [n], {n}
    for _ in range(NEAR):
        at = [u for x in at for u in x.users if u not in seen]
        seen.update(at)
        if any("softmax" in op_name(u) for u in at):
            return True
        at = [u for u in at if anyhow or op_name(u) in POINTWISE or op_name(u) in VIEWS]
    return False


GATES = ("sigmoid", "relu", "softplus", "gelu", "silu", "erf")
ANCHORS = ("softmax", "_softmax", "_safe_softmax", "log_softmax", "exp", "exp2", *GATES)
NORMS = ("linear", "layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "mm", "addmm", "attention")


def near_normalizer(nodes: Iterable[Node]) -> set[Node]:
    """Return nodes that lead to a normalizer or come from one, without a product or a layer in between."""
    layers = (*PRODUCTS, *NORMS)
    anchors = [n for n in nodes if op_name(n).removesuffix("_") in ANCHORS]
    before = reach(anchors, lambda n: [] if op_name(n) in layers else n.all_input_nodes)
    after = reach(anchors, lambda n: [u for u in n.users if op_name(u) not in layers])
    return {*before, *after}


def comes_from(at: Node, wanted: Callable[[Node], bool]) -> bool:
    """Return whether a node or one of the first operands closely before it is wanted."""
    return any(map(wanted, islice(chain(at), NEAR)))


def of_softmax(x: Node) -> bool:
    return any("softmax" in op_name(n) for n in _edited(x))


def of_scores(x: Node) -> bool:
    return any(batched(n) or "softmax" in op_name(n) for n in _edited(x))


def _edited(x: Node) -> Iterator[Node]:
    """Yield the values that a value comes closely from, through elementwise operators and views."""
    return islice(chain(x, lambda n: op_name(n) in POINTWISE or op_name(n) in VIEWS), NEAR)


def of_products(found: list[Node]) -> bool:
    """Return whether each part comes from a product or an attention, so that joining them may be worth it."""
    return all(comes_from(x, lambda n: batched(n) or op_name(n) in SDPA) for x in found)
