"""Define the operators `attnfx::attention_weights` and `attnfx::attention_weights_max`, and their backward operators.

A rewritten graph calls them if a model reads a sum, a mean, some rows or the maximum of the weights in addition to the
attention's output.
"""

from __future__ import annotations

import torch

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.chunked import weights
from attnfx.kernels.operators.attention import checked, register, require, twice
from attnfx.spec import from_json

_SHARED = "Tensor query, Tensor key, Tensor logsumexp, Tensor[] captures, SymInt[] sizes, Tensor? seed, str spec"
_FORWARD = f"attention_weights({_SHARED}, str keep) -> Tensor"
_BACKWARD = f"attention_weights_backward(Tensor grad_out, {_SHARED}, str keep) -> (Tensor, Tensor, Tensor[])"
_MAX = f"attention_weights_max({_SHARED}, str over) -> (Tensor, Tensor)"
_MAX_BACKWARD = (
    f"attention_weights_max_backward(Tensor grad_out, Tensor index, {_SHARED}, str over) -> (Tensor, Tensor, Tensor[])"
)


def _call(query, key, logsumexp, captures, sizes, seed, spec, keep="") -> Call:
    call = checked(query, key, key, captures, sizes, seed, spec)
    in_order = "".join(a for a in weights.AXES if a in keep)
    require(keep == in_order, f"keep is {keep!r}, expected letters of {weights.AXES!r} in that order")
    require(
        logsumexp.shape == query.shape[:3],
        f"logsumexp has shape {tuple(logsumexp.shape)}, expected the query's {tuple(query.shape[:3])}",
    )
    return call


def _weights(query, key, logsumexp, *rest):
    return weights.forward(_call(query, key, logsumexp, *rest), logsumexp, rest[-1])


def _weights_backward(grad_out, query, key, logsumexp, *rest):
    call = _call(query, key, logsumexp, *rest)
    require(
        list(grad_out.shape) == weights.shape_of(call, rest[-1]),
        f"grad_out has shape {tuple(grad_out.shape)}, expected {tuple(weights.shape_of(call, rest[-1]))}",
    )
    return weights.backward(call, grad_out, logsumexp, rest[-1])


def _fake_weights(query, key, logsumexp, *rest):
    call = _call(query, key, logsumexp, *rest)
    return query.new_empty(weights.shape_of(call, rest[-1]), dtype=call.compute)


def _fake_weights_backward(grad_out, query, key, logsumexp, *rest):
    call = _call(query, key, logsumexp, *rest)
    wanted = [x for x, c in zip(call.captures, call.spec.captures) if c.grad]
    empty = [x.new_empty(x.shape) for x in (query, key, *wanted)]
    return empty[0], empty[1], empty[2:]


def _setup(ctx, inputs, output):
    query, key, logsumexp, captures, sizes, seed, spec, axes = inputs
    index = output[1] if isinstance(output, tuple) else None  # of the largest weights
    ctx.save_for_backward(query, key, logsumexp, seed, index, *captures)
    ctx.sizes, ctx.spec, ctx.axes = sizes, spec, axes
    if index is not None:
        ctx.mark_non_differentiable(index)


def _differentiate(ctx, grad_out, *_):
    query, key, logsumexp, seed, index, *captures = ctx.saved_tensors
    operands = query, key, logsumexp, captures, ctx.sizes, seed, ctx.spec, ctx.axes
    if index is None:
        of_query, of_key, found = torch.ops.attnfx.attention_weights_backward(grad_out, *operands)
    else:
        of_query, of_key, found = torch.ops.attnfx.attention_weights_max_backward(grad_out, index, *operands)
    given = iter(found)
    of_captures = [next(given) if c.grad else None for c in from_json(ctx.spec).captures]
    # the gradient does not flow through logsumexp: the weights are differentiated from the scores
    return of_query, of_key, None, of_captures, [] if not ctx.sizes else None, None, None, None


# -- the largest weight of each row, or of each key -------------------------------------------------
def _max_call(*given) -> Call:
    call, over = _call(*given[:-1]), given[-1]
    require(over in ("i", "j"), f"over is {over!r}, expected 'i' or 'j'")
    plain = not call.spec.random and call.spec.weight is A.PROB and call.spec.normaliser == "softmax"
    require(plain, "the largest weight needs probabilities that are neither changed nor dropped out")
    size, what = (call.query.shape[2], "row") if over == "i" else (call.key.shape[2], "key")
    require(size > 0, f"the largest weight needs at least one {what}")
    return call


def _shape_of_max(call: Call, over: str) -> list[int]:
    return weights.shape_of(call, weights.AXES.replace(over, ""))


def _max(query, key, logsumexp, *rest):
    return weights.largest(_max_call(query, key, logsumexp, *rest), logsumexp, rest[-1])


def _max_backward(grad_out, index, query, key, logsumexp, *rest):
    call = _max_call(query, key, logsumexp, *rest)
    wanted = _shape_of_max(call, rest[-1])
    for name, x in (("grad_out", grad_out), ("index", index)):
        require(list(x.shape) == wanted, f"{name} has shape {tuple(x.shape)}, expected {tuple(wanted)}")
    return weights.largest_backward(call, grad_out, index, logsumexp, rest[-1])


def _fake_max(query, key, logsumexp, *rest):
    call = _max_call(query, key, logsumexp, *rest)
    shape = _shape_of_max(call, rest[-1])
    return query.new_empty(shape, dtype=call.compute), query.new_empty(shape, dtype=torch.int64)


def _fake_max_backward(grad_out, index, *operands):
    return _fake_weights_backward(grad_out, *operands[:-1])


register(_FORWARD, _weights, _fake_weights, _differentiate, _setup, autocast=2, capturable=False, flops=(0, 1, 0))
register(_BACKWARD, _weights_backward, _fake_weights_backward, twice, capturable=False, flops=(1, 3, 0))
register(_MAX, _max, _fake_max, _differentiate, _setup, autocast=2, capturable=False, flops=(0, 1, 0))
register(_MAX_BACKWARD, _max_backward, _fake_max_backward, twice, capturable=False, flops=(2, 3, 0))
