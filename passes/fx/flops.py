"""Count the forward FLOPs of a graph's matrix products and convolutions, from the example shapes."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from attnfx.passes.fx.einsum import einsum
from attnfx.passes.fx.nodes import Opaque, Product, number, op_name, value

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
    if name in CONVOLUTIONS:
        return 2 * math.prod(_numbers(n)) * math.prod(shapes[1][1:])
    try:
        product = einsum(Product(n))
    except Opaque:
        return 0
    sizes: dict[str, int] = {}
    for term, x in zip(product.terms, product.operands, strict=True):
        for letter, size in zip(term, _numbers(x), strict=True):
            sizes[letter] = max(size, sizes.get(letter, 0))
    return 2 * math.prod(sizes.values())


def total(gm: GraphModule) -> int:
    return sum(flops(n) for n in gm.graph.nodes)


def _numbers(n: Node) -> list[int]:
    return [number(x) for x in value(n).shape]
