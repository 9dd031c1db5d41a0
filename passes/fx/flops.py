"""Count the forward FLOPs of a graph's matrix products and convolutions, from the example shapes."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from attnfx.passes.fx.nodes import number, op_name, value

ADDING = ("addmm", "baddbmm", "addmv")  # the last two operands are multiplied
PRODUCTS = ("matmul", "mm", "bmm", "mv", "dot", "linear", *ADDING)
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
FUSED = ("scaled_dot_product_attention",)


def flops(n: Node) -> int:
    """Return the floating-point operations of a node: two for each multiply-add, 0 for any operator but a product. A
    symbolic size counts as the example's size."""
    if n.op != "call_function" or not isinstance(value(n), torch.Tensor):
        return 0
    name = op_name(n)
    operands = [x for x in tree_leaves(n.args) if isinstance(x, Node) and isinstance(value(x), torch.Tensor)]
    shapes = [_numbers(x) for x in operands]
    if not shapes:
        return 0
    if name in FUSED:
        query, key, val = shapes[:3]
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + val[-1])
    out = math.prod(_numbers(n))
    if name in PRODUCTS:
        return 2 * out * shapes[-2][-1] if len(shapes) > 1 and name in ADDING else 2 * out * shapes[0][-1]
    if name in CONVOLUTIONS:
        return 2 * out * math.prod(shapes[1][1:])
    if name == "einsum":
        return 2 * _einsum(str(n.args[0]), shapes)
    return 0


def total(gm: GraphModule) -> int:
    return sum(flops(n) for n in gm.graph.nodes)


def _numbers(n: Node) -> list[int]:
    return [number(x) for x in value(n).shape]


def _einsum(equation: str, shapes: list[list[int]]) -> int:
    """Return the product of the sizes of all letters: the multiply-adds of a contraction of two operands."""
    sizes: dict[str, int] = {}
    rest = 1
    for letters, extents in zip(equation.replace(" ", "").split("->")[0].split(","), shapes):
        head, dots, tail = letters.partition("...")
        sizes.update(zip(head, extents))
        sizes.update(zip(tail, extents[len(extents) - len(tail) :]))
        if dots:
            rest = max(rest, math.prod(extents[len(head) : len(extents) - len(tail)]))
    return math.prod(sizes.values()) * rest
