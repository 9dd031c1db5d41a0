"""Build large ATen graphs node by node, which tracing would take minutes for: attentions in chains, loops and nests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.symbolic_shapes import ShapeEnv

aten = torch.ops.aten
B, H, T, D = 2, 4, 16, 8


class Builder:
    """A graph under construction: a call of it adds an operator with its example value."""

    def __init__(self) -> None:
        self.graph, self.mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = node.meta["example_value"] = torch.empty(*shape, dtype=dtype)
        return node

    def __call__(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        given: Any = map_arg(args, lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*given)
        return node

    def qkv(self, length: int = T) -> tuple[Node, Node, Node]:
        q, k, v = (self.input(name, B, H, length, D) for name in "qkv")
        return q, k, v

    def scores(self, q: Node, k: Node) -> Node:
        return self(aten.matmul.default, q, self(aten.transpose.int, k, -1, -2))

    def softmax(self, s: Node) -> Node:
        return self(aten.softmax.int, s, -1)

    def matmul(self, x: Node, y: Node) -> Node:
        return self(aten.matmul.default, x, y)

    def attention(self, q: Node, k: Node, v: Node) -> Node:
        return self.matmul(self.softmax(self.scores(q, k)), v)

    def deep(self, x: Node, n: int) -> Node:
        for step in range(n):
            x = self(aten.tanh.default, x) if step % 2 else self(aten.mul.Tensor, x, 1.01)
        return x

    def part(self, x: Node, n: int, dim: int = 2) -> Node:
        return self(aten.slice.Tensor, x, dim, 2 * n, 2 * n + 2)

    def module(self, out: Node) -> GraphModule:
        self.graph.output((out,))
        return GraphModule(torch.nn.Module(), self.graph)


def chain(n: int) -> GraphModule:
    """An attention after every 50 cheap operators."""
    b = Builder()
    x, k, v = b.qkv()
    for _ in range(n):
        x = b.attention(b.deep(x, 50), k, v)
    return b.module(x)


def steps(n: int) -> GraphModule:
    """A loop with one attention at each step."""
    b = Builder()
    x, k, v = b.qkv()
    for _ in range(n):
        x = b.attention(x, k, v)
    return b.module(x)


def row_steps(n: int) -> GraphModule:
    """A loop whose steps need whole rows of scores."""
    b = Builder()
    x, k, v = b.qkv()
    for _ in range(n):
        x = b.matmul(b.softmax(b(aten.cumsum.default, b.scores(x, k), -1)), v)
    return b.module(x)


def kept_steps(n: int) -> GraphModule:
    """A loop whose steps mix the queries, and are kept."""
    b = Builder()
    x, k, v = b.qkv()
    for _ in range(n):
        x = b.matmul(b.softmax(b(aten.cumsum.default, b.scores(x, k), -2)), v)
    return b.module(x)


def query_chunks(n: int) -> GraphModule:
    """A loop over chunks of two queries."""
    b = Builder()
    q, k, v = b.qkv(2 * n)
    return b.module(b(aten.cat.default, [b.attention(b.part(q, i), k, v) for i in range(n)], 2))


def head_steps(n: int) -> GraphModule:
    """A loop over heads."""
    b = Builder()
    given = [b.input(name, B, n, T, D) for name in "qkv"]
    parts = [b.attention(*(b(aten.select.int, x, 1, i) for x in given)) for i in range(n)]
    return b.module(b(aten.stack.default, parts, 1))


def key_sets(n: int) -> GraphModule:
    """Scores of sets of two keys that meet in one softmax, and a product for each set of values."""
    b = Builder()
    q, k, v = b.input("q", B, H, T, D), b.input("k", B, H, 2 * n, D), b.input("v", B, H, 2 * n, D)
    w = b.softmax(b(aten.cat.default, [b.scores(q, b.part(k, i)) for i in range(n)], -1))
    outs = [b.matmul(b.part(w, i, -1), b.part(v, i)) for i in range(n)]
    total = outs[0]
    for out in outs[1:]:
        total = b(aten.add.Tensor, total, out)
    return b.module(total)


def nested(n: int) -> GraphModule:
    """The result of each attention is the scores of the next."""
    b = Builder()
    q, k, v = b.qkv()
    square = b.input("square", B, H, T, T)
    s = b.scores(q, k)
    for _ in range(n):
        s = b.matmul(b.softmax(s), square)
    return b.module(b.matmul(b.softmax(s), v))


def nested_softmaxes(n: int) -> GraphModule:
    """A softmax of a softmax, n times."""
    b = Builder()
    q, k, v = b.qkv()
    s = b.scores(q, k)
    for _ in range(n):
        s = b.softmax(s)
    return b.module(b.matmul(s, v))


def deep_scores(n: int) -> GraphModule:
    """Scores that pass through n operators."""
    b = Builder()
    q, k, v = b.qkv()
    return b.module(b.matmul(b.softmax(b.deep(b.scores(q, k), n)), v))


def deep_weights(n: int) -> GraphModule:
    """Weights that pass through n operators."""
    b = Builder()
    q, k, v = b.qkv()
    return b.module(b.matmul(b.deep(b.softmax(b.scores(q, k)), n), v))


def deep_bias(n: int) -> GraphModule:
    """A bias that n operators compute."""
    b = Builder()
    q, k, v = b.qkv()
    bias = b.deep(b.input("bias", T, T), n)
    return b.module(b.matmul(b.softmax(b(aten.add.Tensor, b.scores(q, k), bias)), v))


def squares(n: int) -> GraphModule:
    """Scores that are squared n times: 2 ** n factors."""
    b = Builder()
    q, k, v = b.qkv()
    s = b.scores(q, k)
    for _ in range(n):
        s = b(aten.mul.Tensor, s, s)
    return b.module(b.matmul(b.softmax(s), v))


def integer_products(n: int) -> GraphModule:
    """A mask by a product of n sums of integers: 2 ** n terms."""
    b = Builder()
    q, k, v = b.qkv()
    whole: Any = 1
    for step in range(n):
        pair = [b.input(f"{name}{step}", T, T, dtype=torch.int64) for name in "ij"]
        whole = b(aten.mul.Tensor, b(aten.add.Tensor, *pair), whole)
    masked = b(aten.masked_fill.Scalar, b.scores(q, k), b(aten.gt.Scalar, whole, 0), -math.inf)
    return b.module(b.matmul(b.softmax(masked), v))


def many_dims(n: int) -> GraphModule:
    """Scores with eight dimensions, n times."""
    b = Builder()
    x, k, v = (b.input(name, 2, 1, 2, 3, 1, 2, T, D) for name in "qkv")
    for _ in range(n):
        x = b.attention(x, k, v)
    return b.module(x)
