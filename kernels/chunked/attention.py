"""Run any spec in blocks of queries, on any device: the reference tier, which accepts every spec.

A block is a range of queries and its live key range, for as many heads as keep the tile of scores in the cache. A
matrix of size T x S never exists. The forward pass saves out and logsumexp, and the backward pass recomputes each
block's weights.

Keys outside a block's live range are skipped, which is exact if every row has a live key. The logsumexp of a row
without a live key is at most half the fill. Both passes compute blocks with such a row over all keys (`Plan.widen`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.kernels.call import Call
from attnfx.kernels.chunked.block_run import Run
from attnfx.kernels.chunked.blocks import Block
from attnfx.kernels.evaluate import Evaluator

Make = Callable[[Call], Run]
_ZERO = A.const(0.0)


def forward(call: Call, make: Make = Run) -> tuple[Tensor, Tensor]:
    """Compute out (B, H, T, Dv) in the spec's dtype, logsumexp (B, H, T) in its compute type (zeros without a softmax).
    `make` creates the run of the call. Callers override it to change the dropout or to hold fewer scores at once."""
    out, logsumexp = call.outputs()
    forward_rows(make(call), None, out, logsumexp.zero_())
    return out, logsumexp


def forward_rows(run: Run, which: set[int] | None, out: Tensor, logsumexp: Tensor) -> None:
    """Compute the ranges of rows numbered in `which` (None: all) into `out` and `logsumexp`."""
    for blocks in run.plan.blocks(which):
        _forward_blocks(run, blocks, out, logsumexp)
    if run.spec.normaliser == "softmax" and (wide := run.plan.widen(logsumexp)):
        for blocks in run.plan.blocks(wide if which is None else wide & which):
            _forward_blocks(run, blocks, out, logsumexp)


def _forward_blocks(run: Run, blocks: list[Block], out: Tensor, logsumexp: Tensor) -> None:
    spec = run.spec
    shared: dict = {}
    for at in blocks:
        where = run.region(at)[:3]
        values = run.evaluator(at, shared)
        if at.j0 == at.j1:
            out[where] = 0
            if spec.normaliser == "softmax":
                extra = run.extra(values, (*logsumexp[where].shape, 1))
                logsumexp[where] = torch.cat(extra, -1).logsumexp(-1) if extra else -math.inf
            continue
        score = run.score(at, values, run.queries(run.query, at))
        total = None
        if spec.normaliser == "softmax":
            weight, total, m = run.normalise(score, run.extra(values, (*score.shape[:3], 1)))
            logsumexp[where] = torch.where(m == -math.inf, m, total.log() + m).squeeze(-1)
            total = run.divisor(total)
        else:
            weight = score
        if spec.weight is not A.PROB:
            if total is not None:
                weight, total = weight / total, None
            weight = run.weights(values, weight)
        if (kept := run.drop(at, score)) is not None:
            weight = weight * kept
        part = run.tile(run.product(run.merged(weight, at), run.keys(run.value, at)), at)
        out[where] = part if total is None else part.div_(total)


def backward(
    call: Call, grad_out: Tensor, out: Tensor, logsumexp: Tensor, grad_logsumexp: Tensor | None = None, make: Make = Run
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of query, key, value and the captures with `grad`, in each tensor's dtype, contiguous."""
    run = widened(make(call), logsumexp)
    grads = Gradients(run, grad_logsumexp=grad_logsumexp)
    through = ThroughValues(run, grad_out)
    grads.add(through)
    return grads.query, grads.key.to(call.key.dtype), through.value.to(call.value.dtype), grads.of_captures()


def widened(run: Run, logsumexp: Tensor) -> Run:
    """Visit all keys in blocks with a row without a live key, as the forward pass that gave `logsumexp` did."""
    if run.spec.normaliser == "softmax":
        run.plan.widen(logsumexp)
    return run


class ThroughValues:
    """The backward pass of weights @ values: the gradient of a block's weights, and the sum of the values' gradient."""

    def __init__(self, run: Run, grad_out: Tensor):
        self.run, self.grad_out = run, grad_out
        self.value = torch.zeros_like(run.value, dtype=run.compute)

    def __call__(self, at: Block, weight: Tensor) -> Tensor:
        run = self.run
        grad = run.queries(self.grad_out, at)
        run.add_keys(self.value, at, run.product(run.merged(weight, at).mT, grad))
        return run.tile(run.product(grad, run.keys(run.value, at).mT), at)


class Gradients:
    """The gradients of query, key and the captures, accumulated over blocks; all but query in the compute type."""

    def __init__(self, run: Run, query: Tensor | None = None, grad_logsumexp: Tensor | None = None):
        """Allocate the sums. `query` is filled block by block and defaults to zeros. `grad_logsumexp` (B, H, T) is the
        gradient of the logsumexp, or None if that is unused."""
        self.run, self.grad_logsumexp = run, grad_logsumexp
        like = run.call.query
        self.query = torch.zeros(like.shape, dtype=like.dtype, device=like.device) if query is None else query
        self.key = torch.zeros_like(run.key, dtype=run.compute)
        self.captures = {
            n: torch.zeros(run.captures[n].shape, dtype=run.compute, device=run.device)
            for n, c in enumerate(run.spec.captures)
            if c.grad
        }

    def of_captures(self) -> list[Tensor]:
        return [x.to(self.run.captures[n].dtype) for n, x in self.captures.items()]

    def add(self, of_weights: Callable[[Block, Tensor], Tensor], which: set[int] | None = None) -> None:
        """Add the ranges of rows numbered in `which` (None: all). `of_weights(block, weights)` returns the gradient of
        the weights."""
        for blocks in self.run.plan.blocks(which):
            shared: dict = {}
            for at in blocks:
                if at.j0 < at.j1:  # a block without keys has a zero gradient
                    self._add(at, shared, of_weights)

    def _add(self, at: Block, shared: dict, of_weights: Callable[[Block, Tensor], Tensor]) -> None:
        run, spec, program = self.run, self.run.spec, self.run.program
        where = run.region(at)[:3]
        values = run.evaluator(at, shared)
        query = run.queries(run.query, at)
        # Not exp(score - logsumexp): logsumexp is too coarse for huge scores, and a fill absorbs the log of the sum
        prob, total, m, extra = run.probabilities(at, values, query)
        weight = run.weights(values, prob)
        kept = run.drop(at, prob)
        slope = of_weights(at, weight if kept is None else weight * kept)
        if kept is not None:
            slope = slope * kept
        if spec.weight is not A.PROB:
            slope = self._through(program.weights, slope, values)
        if spec.normaliser == "softmax":
            share = (prob * slope).sum(-1, keepdim=True)
            if self.grad_logsumexp is not None:  # its derivative by a score is the score's probability
                share = share - self.grad_logsumexp[where].unsqueeze(-1)
            slope = (slope - share).mul_(prob)
            rows = values.without("j")
            for logit, loads in zip(extra, program.extras):
                for load, local in loads:
                    part = -share * (logit - m).exp() / total * rows(local)
                    rows.add_gradient(load, part, self.captures[load.value])  # type: ignore[index]
        bare = at.full or (program.tame and at.live)
        slope = self._through(program.kept_slopes if bare else program.slopes, slope, values)
        flat = run.merged(slope, at)
        self.query[where] = run.tile(run.scaled(run.product(flat, run.keys(run.key, at))), at)
        run.add_keys(self.key, at, run.scaled(run.product(flat.mT, query)))

    def _through(self, slopes: tuple[tuple[Expr, Expr], ...], slope: Tensor, values: Evaluator) -> Tensor:
        """Apply the chain rule through one program, and return the gradient of its first leaf, dot or prob."""
        for leaf, local in slopes[1:]:
            values.add_gradient(leaf, self._times(slope, local, values), self.captures[leaf.value])  # type: ignore[index]
        return self._times(slope, slopes[0][1], values)

    def _times(self, slope: Tensor, local: Expr, values: Evaluator) -> Tensor:
        if local is A.const(1.0):
            return slope
        if local.op == "where" and _ZERO in local.args[1:]:  # zero even if the slope is NaN
            x, y = (0.0 if a is _ZERO else self._times(slope, a, values) for a in local.args[1:])
            return torch.where(values.tensor(local.args[0]), x, y)
        return slope * values(local)
