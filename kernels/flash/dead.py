"""Rows that a finite fill leaves without a live key average over every key: their backward pass.

They are few, and the kernels leave them out: they are computed in blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnfx.kernels import chunked
from attnfx.kernels.call import Call
from attnfx.kernels.flash.blocks import Run


def add_gradients(
    call: Call, grad_out: Tensor, logsumexp: Tensor, below: float, grads: list[Tensor], captures: dict[int, Tensor]
) -> None:
    """Adds what the rows whose logsumexp is at most `below` give to the gradients of query, key and value in `grads`,
    and to those of the captures by slot. Asks the device whether there are any."""
    dead = logsumexp <= below
    if not bool(dead.any()):
        return
    run = Run(call)
    run.plan.widen(logsumexp)
    query = torch.zeros_like(call.query, dtype=run.compute)
    found = chunked.Gradients(run, query)
    through = chunked.ThroughValues(run, torch.where(dead[..., None], grad_out, 0.0))
    for blocks in run.plan.blocks(run.plan.doubtful):
        found.add_blocks(blocks, through)
    for total, part in zip(grads, (query, found.key, through.value)):
        total += part.to(total.dtype)
    for slot, part in found.captures.items():
        captures[slot] += part
