"""Reduce an attention's weights: sum them over some axes, or find the largest of each row or of each key.

The weights are recomputed block by block, as in the chunked tier. At most one block of them exists at a time, unless
the result keeps all four axes. Blocks and dropout are the same as in the attention's own passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnfx.kernels.call import Call
from attnfx.kernels.chunked.attention import Gradients, widened
from attnfx.kernels.chunked.block_run import Run
from attnfx.kernels.chunked.blocks import Block

AXES = "bhij"


def shape_of(call: Call, keep: str) -> list[int]:
    """Return the shape of the result: one size per axis of `keep`, in the order of AXES."""
    sizes = dict(zip(AXES, (*call.query.shape[:3], call.key.shape[2])))
    return [sizes[a] for a in keep]


def _whole(x: Tensor, keep: str) -> Tensor:
    """Return a view with all four axes, of size 1 for the summed ones."""
    for n, a in enumerate(AXES):
        if a not in keep:
            x = x.unsqueeze(n)
    return x


def _part(x: Tensor, keep: str, region: tuple[slice, ...]) -> Tensor:
    """Cut a tensor from `_whole` to the block."""
    return x[tuple(r if a in keep else slice(None) for a, r in zip(AXES, region))]


def _blocks(run: Run) -> Iterator[tuple[Block, Tensor]]:
    """Yield each block that has keys, with its weights before dropout."""
    for blocks in run.plan.blocks():
        shared: dict = {}
        for at in blocks:
            if at.j0 == at.j1:
                continue
            values = run.evaluator(at, shared)
            prob, *_ = run.probabilities(at, values, run.queries(run.query, at))
            yield at, run.weights(values, prob)


def forward(call: Call, logsumexp: Tensor, keep: str) -> Tensor:
    """Sum the weights over the axes not in `keep`, in the compute type. logsumexp (B, H, T) is the attention's."""
    run = widened(Run(call), logsumexp)
    out = torch.zeros(shape_of(call, keep), dtype=call.compute, device=call.query.device)
    whole = _whole(out, keep)
    gone = [n for n, a in enumerate(AXES) if a not in keep]
    for at, weight in _blocks(run):
        if (kept := run.drop(at, weight)) is not None:
            weight = weight * kept
        part = _part(whole, keep, run.region(at))
        part += weight.sum(gone, keepdim=True) if gone else weight
    return out


def backward(call: Call, grad: Tensor, logsumexp: Tensor, keep: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of query, key and the captures whose `grad` is True."""
    run = widened(Run(call), logsumexp)
    whole = _whole(grad.to(call.compute), keep)

    def of_weights(at: Block, weight: Tensor) -> Tensor:
        return _part(whole, keep, run.region(at)).expand(weight.shape)

    return _gradients(run, of_weights)


def largest(call: Call, logsumexp: Tensor, over: str = "j") -> tuple[Tensor, Tensor]:
    """Find the largest weight over the axis `over`, and the first index that has it.

    With "j", return the largest of each row (B, H, T) and its key; with "i", of each key (B, H, S) and its row. Values
    are in the compute type. Weights must be probabilities without dropout: then a key outside a block's range cannot
    have a larger one."""
    run, shape = widened(Run(call), logsumexp), shape_of(call, AXES.replace(over, ""))
    most = torch.zeros(shape, dtype=call.compute, device=call.query.device)
    place = torch.zeros(shape, dtype=torch.int64, device=call.query.device)
    for at, weight in _blocks(run):
        where, start = _others(run, at, over)
        best, found = weight.max(AXES.index(over))
        before = most[where]  # for a key, the best of earlier blocks of rows, which wins a tie
        better = (best > before) | (best.isnan() & ~before.isnan())
        most[where] = torch.where(better, best, before)
        place[where] = torch.where(better, found + start, place[where])
    return most, place


def largest_backward(
    call: Call, grad: Tensor, index: Tensor, logsumexp: Tensor, over: str = "j"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the same gradients as `backward` from `grad`, the gradient of the weights at `index`."""
    run, dim = widened(Run(call), logsumexp), AXES.index(over)

    def of_weights(at: Block, weight: Tensor) -> Tensor:
        where, start = _others(run, at, over)
        place = index[where] - start
        inside = (place >= 0) & (place < weight.shape[dim])
        value = torch.where(inside, grad[where].to(weight.dtype), 0.0)
        place = place.clamp(0, weight.shape[dim] - 1)
        return torch.zeros_like(weight).scatter_(dim, place.unsqueeze(dim), value.unsqueeze(dim))

    return _gradients(run, of_weights)


def _others(run: Run, at: Block, over: str) -> tuple[tuple[slice, ...], int]:
    """Return the block's region without the axis `over`, and the block's start along it."""
    region = run.region(at)
    return tuple(r for r, a in zip(region, AXES) if a != over), region[AXES.index(over)].start


def _gradients(run: Run, of_weights: Callable[[Block, Tensor], Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    grads = Gradients(run)
    grads.add(of_weights)
    return grads.query, grads.key.to(run.call.key.dtype), grads.of_captures()
