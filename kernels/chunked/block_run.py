"""Compute the scores, weights and dropout of one block, for both passes of a call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.chunked.blocks import Block, Plan
from attnfx.kernels.chunked.program import program_of
from attnfx.kernels.evaluate import Evaluator, block_axes


class Run:
    """One call: its tensors in the dtype of the matrix products, and its plan of blocks."""

    def __init__(self, call: Call, elements: int = 0):
        self.call = call
        self.spec, self.program = call.spec, program_of(call.spec)
        self.compute = call.compute
        self.captures, self.sizes = call.captures, call.sizes
        query, key = call.query, call.key
        self.groups = key.shape[1]
        self.repeat = query.shape[1] // max(self.groups, 1)
        self.device = query.device
        self.query = query
        # tensor cores multiply half precision exactly and accumulate in float32; a CPU would round the sums
        halves = query.device.type == "cuda" and query.dtype.itemsize == 2
        self.factor = query.dtype if halves else self.compute
        self.key = key.to(self.factor).contiguous()
        self.value = self.key if call.value is key else call.value.to(self.factor).contiguous()
        self.plan = Plan(self.spec, self.sizes, self.groups, query.device, elements)
        self._first_seed: int | None = None
        self._drawn: tuple[int, Tensor] | None = None  # number and kept weights of the block now computed in parts

    def keys(self, x: Tensor, at: Block) -> Tensor:
        """Cut (B, G, S, E) to the block's (b * g, s, E)."""
        part = x[at.b0 : at.b1, at.g0 : at.g1, at.j0 : at.j1]
        return part.reshape((at.b1 - at.b0) * (at.g1 - at.g0), *part.shape[2:])

    def add_keys(self, total: Tensor, at: Block, part: Tensor) -> None:
        """Add the block's (b * g, s, E) to (B, G, S, E)."""
        b, g = at.b1 - at.b0, at.g1 - at.g0
        total[at.b0 : at.b1, at.g0 : at.g1, at.j0 : at.j1] += part.view(b, g, *part.shape[1:])

    def heads(self, at: Block) -> tuple[int, int]:
        return at.g0 * self.repeat, at.g1 * self.repeat

    def region(self, at: Block) -> tuple[slice, slice, slice, slice]:
        """Return the block's batches, heads, queries and keys."""
        return slice(at.b0, at.b1), slice(*self.heads(at)), slice(at.i0, at.i1), slice(at.j0, at.j1)

    def queries(self, x: Tensor, at: Block) -> Tensor:
        """Cut (B, H, T, E) to the block's (b * g, r * t, E), in the dtype of the matrix products."""
        part = x[self.region(at)[:3]].to(self.factor)
        return part.reshape((at.b1 - at.b0) * (at.g1 - at.g0), self.repeat * (at.i1 - at.i0), x.shape[-1])

    def tile(self, x: Tensor, at: Block) -> Tensor:
        """View the block's (b * g, r * t, s) as (b, h, t, s)."""
        h0, h1 = self.heads(at)
        return x.view(at.b1 - at.b0, h1 - h0, at.i1 - at.i0, -1)

    def merged(self, x: Tensor, at: Block) -> Tensor:
        """Invert `tile`."""
        return x.reshape((at.b1 - at.b0) * (at.g1 - at.g0), -1, x.shape[-1])

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute a batched matrix product in the compute type."""
        if self.factor == self.compute:
            return torch.bmm(x, y)
        return torch.bmm(x.to(self.factor), y, out_dtype=self.compute)

    def evaluator(self, at: Block, shared: dict) -> Evaluator:
        axes = block_axes((at.b0, at.b1), self.heads(at), (at.i0, at.i1), (at.j0, at.j1))
        return Evaluator(self.captures, self.sizes, axes, self.compute, self.device, shared=shared)

    def score(self, at: Block, values: Evaluator, query: Tensor) -> Tensor:
        """Compute the scores of the block, (b, h, t, s)."""
        program = self.program
        exact = self.factor == self.compute  # otherwise scaling the query would round it
        dot = self.product(self.scaled(query) if exact else query, self.keys(self.key, at).mT)
        dot = self.tile(dot if exact else self.scaled(dot), at)
        values.bind(A.DOT, dot)
        score = values.tensor(program.kept if at.full else program.score)
        return score if score.shape == dot.shape else score.expand(dot.shape)

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.program.scale == 1.0 else x * self.program.scale

    def extra(self, values: Evaluator, shape: tuple[int, ...]) -> list[Tensor]:
        return [values.tensor(e).expand(shape) for e in self.spec.extra]

    def normalise(self, score: Tensor, extra: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return exp(score - m), its sum including the extra logits, and the maximum m; the last two (b, h, t, 1)."""
        m = score.amax(-1, keepdim=True)
        for e in extra:
            m = torch.maximum(m, e)
        if self.spec.safe:
            m = torch.where(m == -math.inf, 0.0, m)
        e = (score - m).exp_()
        total = e.sum(-1, keepdim=True)
        for x in extra:
            total = total + (x - m).exp()
        return e, total, m

    def divisor(self, total: Tensor) -> Tensor:
        """Return the softmax's denominator, 1 for a dead row of a safe softmax."""
        return torch.where(total == 0, 1.0, total) if self.spec.safe else total

    def probabilities(self, at: Block, values: Evaluator, query: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return the normalized scores of the block, then their divisor, the maximum and the extra logits. Without a
        softmax, return the scores."""
        score = self.score(at, values, query)
        if self.spec.normaliser != "softmax":
            return score, score, score, []
        extra = self.extra(values, (*score.shape[:3], 1))
        prob, total, m = self.normalise(score, extra)
        total = self.divisor(total)
        return prob.div_(total), total, m, extra

    def weights(self, values: Evaluator, prob: Tensor) -> Tensor:
        """Compute the weights before dropout from the probabilities."""
        if self.spec.weight is A.PROB:
            return prob
        values.bind(A.PROB, prob)
        return values.tensor(self.spec.weight).expand(prob.shape)

    def drop(self, at: Block, like: Tensor) -> Tensor | None:
        """Return the dropout factor of each weight, 0 or 1 / (1 - p), or None without dropout."""
        p = self.spec.dropout
        if p <= 0.0:
            return None
        if p >= 1.0:
            return torch.zeros_like(like)
        if at.whole is None:
            kept = self._draw(at, p)
        else:
            if self._drawn is None or self._drawn[0] != at.number:
                self._drawn = (at.number, self._draw(at.whole, p))
            (h0, h1), first, _ = self.heads(at), *self.heads(at.whole)
            kept = self._drawn[1][
                at.b0 - at.whole.b0 : at.b1 - at.whole.b0, h0 - first : h1 - first,
                at.i0 - at.whole.i0 : at.i1 - at.whole.i0,
            ]  # fmt: skip
        return kept.to(like.dtype).div_(1.0 - p)

    def _draw(self, at: Block, p: float) -> Tensor:
        """Sample the weights of a block that dropout keeps, as bool."""
        if self._first_seed is None:
            assert self.call.seed is not None
            self._first_seed = int(self.call.seed.item())
        generator = torch.Generator(device=self.device)
        generator.manual_seed(mix(self._first_seed, at.number))
        h0, h1 = self.heads(at)
        shape = (at.b1 - at.b0, h1 - h0, at.i1 - at.i0, at.j1 - at.j0)
        return torch.empty(shape, dtype=torch.bool, device=self.device).bernoulli_(1.0 - p, generator=generator)


def mix(seed: int, number: int) -> int:
    """Mix two integers into one 63-bit seed (the finalizer of splitmix64)."""
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1
