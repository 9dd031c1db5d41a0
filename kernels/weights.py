"""The weights of an attention, added up over some of their axes: their mean over heads, what each key received.

They are computed again, block by block as `chunked` does, and never exist beyond one block of them, unless all four
axes are asked for. The blocks and the dropout are those of the attention's own passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnfx.kernels.call import Call
from attnfx.kernels.chunked import Block, Gradients, Run

AXES = "bhij"


def shape_of(call: Call, keep: str) -> list[int]:
    """The sizes of the result: one for each axis of `keep`, in the order of AXES."""
    sizes = dict(zip(AXES, (*call.query.shape[:3], call.key.shape[2])))
    return [sizes[a] for a in keep]


def _region(run: Run, at: Block) -> tuple[slice, ...]:
    h0, h1 = run.heads(at)
    return slice(at.b0, at.b1), slice(h0, h1), slice(at.i0, at.i1), slice(at.j0, at.j1)


def _whole(x: Tensor, keep: str) -> Tensor:
    """A view with all four axes, of size 1 where they were added up."""
    for n, a in enumerate(AXES):
        if a not in keep:
            x = x.unsqueeze(n)
    return x


def _part(x: Tensor, keep: str, region: tuple[slice, ...]) -> Tensor:
    """The block of a `_whole` tensor."""
    return x[tuple(r if a in keep else slice(None) for a, r in zip(AXES, region))]


def forward(call: Call, logsumexp: Tensor, keep: str) -> Tensor:
    """The sum over the axes that are not in `keep`, in the compute type; logsumexp (B, H, T) is the attention's."""
    run = Run(call)
    if call.spec.normaliser == "softmax":
        run.plan.widen(logsumexp)
    out = torch.zeros(shape_of(call, keep), dtype=call.compute, device=call.query.device)
    whole = _whole(out, keep)
    gone = [n for n, a in enumerate(AXES) if a not in keep]
    for blocks in run.plan.blocks():
        shared: dict = {}
        for at in blocks:
            if at.j0 == at.j1:
                continue
            values = run.evaluator(at, shared)
            prob = run.score(at, values, run.queries(run.query, at))
            if call.spec.normaliser == "softmax":
                prob, total, _ = run.normalise(prob, run.extra(values, (*prob.shape[:3], 1)))
                prob.div_(run.divisor(total))
            weight = run.weights(values, prob)
            if (kept := run.drop(at, weight)) is not None:
                weight = weight * kept
            part = _part(whole, keep, _region(run, at))
            part += weight.sum(gone, keepdim=True) if gone else weight
    return out


def backward(call: Call, grad: Tensor, logsumexp: Tensor, keep: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of query, key, and of the captures whose `grad` is True."""
    run = Run(call)
    if call.spec.normaliser == "softmax":
        run.plan.widen(logsumexp)
    whole = _whole(grad.to(call.compute), keep)

    def of_weights(at: Block, weight: Tensor) -> Tensor:
        return _part(whole, keep, _region(run, at)).expand(weight.shape)

    grads = Gradients(run)
    for blocks in run.plan.blocks():
        grads.add_blocks(blocks, of_weights)
    return grads.query, grads.key.to(call.key.dtype), grads.of_captures()


__all__ = ["AXES", "backward", "forward", "shape_of"]
