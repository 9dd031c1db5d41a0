"""Define the operators `attnfx::attention_rows` and `attnfx::attention_rows_backward`.

A rewritten graph calls them for a region, whose whole rows are computed together.
"""

from __future__ import annotations

import torch

from attnfx.kernels.operators.attention import register, require, twice
from attnfx.kernels.rows import call as rowcall
from attnfx.kernels.rows import run as rows
from attnfx.spec.rows import from_json

_SHARED = "Tensor[] inputs, SymInt[] sizes, Tensor? seed, str program"
_FORWARD = f"attention_rows({_SHARED}) -> Tensor[]"
_BACKWARD = f"attention_rows_backward(Tensor?[] grads, {_SHARED}) -> Tensor[]"


def _rows(inputs, sizes, seed, program):
    return rows.forward(rowcall.prepare(program, inputs, sizes, seed))


def _rows_backward(grads, inputs, sizes, seed, program):
    call = rowcall.prepare(program, inputs, sizes, seed)
    results = call.program.results
    require(
        len(grads) == len(results), f"grads has {len(grads)} tensors, expected one for each of {len(results)} results"
    )
    return rows.backward(call, grads)


def _fake_rows(inputs, sizes, seed, program):
    return rowcall.prepare(program, inputs, sizes, seed).outputs()


def _fake_rows_backward(grads, inputs, sizes, seed, program):
    return [x.new_empty(x.shape) for x, g in zip(inputs, from_json(program).grads) if g]


def _setup(ctx, inputs, output):
    tensors, sizes, seed, program = inputs
    ctx.save_for_backward(seed, *tensors)
    ctx.sizes, ctx.program = sizes, program
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(o for o in output if not o.is_floating_point()))


def _differentiate(ctx, grads):
    seed, *inputs = ctx.saved_tensors
    found = iter(torch.ops.attnfx.attention_rows_backward(list(grads), inputs, ctx.sizes, seed, ctx.program))
    of_inputs = [next(found) if g else None for g in from_json(ctx.program).grads]
    # register_autograd treats an empty list as a list of tensors, and any other list of integers as one leaf
    return of_inputs, [] if not ctx.sizes else None, None, None


register(_FORWARD, _rows, _fake_rows, _differentiate, _setup, capturable=False)
register(_BACKWARD, _rows_backward, _fake_rows_backward, twice, capturable=False)
