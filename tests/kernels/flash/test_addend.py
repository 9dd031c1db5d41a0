"""Skip tiles by additive float masks, with eager's results."""

import math
from dataclasses import replace

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import mask_summary as summarise
from attnfx.kernels.flash.host.backward import backward
from attnfx.mask import runtime_summary as summary
from attnfx.mask.additive import addend
from attnfx.spec import AttentionSpec, B, Capture, H, I, J
from tests.kernels.cases import CAUSAL, DOT, FINITE, INF, masked
from tests.kernels.flash.cases import TILE, tensors, whole
from tests.kernels.flash.host.test_mask_summary import (
    S,
    T,
    by_head,
    compare,
    compiled,
    graph_inputs,
    holes,
    padding,
    passes,
    small,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
assert small and passes  # fixtures
ZERO = A.const(0)
WHOLE = {
    "padding": ([B, J], padding), "padding, of four dims": ([B, ZERO, ZERO, J], padding[:, None, None]),
    "any": ([B, I, J], holes), "any, for all": ([I, J], holes[0]), "by head": ([H, I, J], by_head),
}  # fmt: skip


def added_call(index, kept, fill, grad=False, score=DOT, keep=None, inputs=None, **fields):
    """Create a call with the summary of its additive mask, which is zero where `kept` is True, else the fill."""
    capture = torch.zeros(kept.shape).masked_fill(~kept, fill)
    score = A.add(score, A.load(0, index, "f"))
    if keep is not None:
        score = masked(keep, -INF, score)
    spec = AttentionSpec(score=score, captures=(Capture("f", capture.ndim, grad),), **fields)
    call = Call(spec, *(inputs or tensors(T, S, heads=2, groups=1)), (capture,))
    return replace(call, summary=states_of(call))


def states_of(call):
    found = summary.of(call.spec)
    sizes = [call.sizes[n] for n in "BHTS"]
    return summarise.summarise([call.captures[s] for s in found.slots], sizes, found.spec)


@pytest.mark.parametrize("fill", [-INF, FINITE, -2e30])
@pytest.mark.parametrize("name", WHOLE)
def test_outputs_and_gradients_are_those_of_the_whole_matrix(name, fill):
    index, kept = WHOLE[name]
    call = added_call(index, kept, fill)
    logsumexp = compare(call)
    assert bool((~kept.any(-1)).any()) == bool((logsumexp <= fill / 2).any())
    assert not (call.summary & summary.LIVE).all() and not (call.summary & summary.DEAD).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [FINITE, -1e9, -3e6])
def test_rows_without_a_live_key_average_whatever_the_fill(fill, dtype):
    """-1e9 in a tensor is a bias, which never skips tiles. In float32, it absorbs the scores of its row."""
    inputs = tensors(T, S, heads=2, groups=1, dtype=dtype)
    call = added_call(*WHOLE["any"], fill, inputs=inputs)
    assert bool((call.summary & summary.LIVE).all()) == (fill > -1e30)
    leaves = [x.float().requires_grad_() for x in inputs]
    want = whole(call.spec, *leaves, call.captures)
    grad = torch.randn(want.shape).to(dtype)
    expected = torch.autograd.grad(want, leaves, grad.float())
    out, logsumexp = launch.forward(call, TILE)
    assert (logsumexp <= fill / 2).any()
    close = dict(rtol=2e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for got, x in zip((out, *backward(call, grad, out, logsumexp, (TILE, TILE))), (want, *expected)):
        torch.testing.assert_close(got.float(), x, **close)


@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_an_addend_with_a_gradient_gets_it_also_where_tiles_are_empty(fill):
    compare(added_call(*WHOLE["any"], fill, grad=True))


@pytest.mark.parametrize("fill", [-INF, FINITE])
@pytest.mark.parametrize("name", ["padding", "any"])
def test_indices_mask_as_well(name, fill):
    call = added_call(*WHOLE[name], fill, keep=CAUSAL, grad=True)
    compare(call)


@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_without_a_summary_rows_without_a_live_key_are_eagers_too(fill):
    compare(replace(added_call(*WHOLE["any"], fill), summary=None))


def test_grouped_heads():
    compare(added_call(*WHOLE["any"], -INF, inputs=tensors(T, S, heads=4, groups=2, D=24, Dv=7)))


def test_a_row_of_both_fills_averages_over_the_finite_ones():
    call = added_call(*WHOLE["any"], FINITE)
    mixed = call.captures[0].clone()
    mixed[..., ::3] = -INF
    call = replace(call, captures=(mixed,))
    compare(replace(call, summary=states_of(call)))


def test_rows_of_minus_infinity_are_zeros_where_the_softmax_is_safe():
    call = added_call(*WHOLE["any"], -INF, score=A.mul(A.const(0.25), A.DOT), safe=True)
    leaves = [x.double().requires_grad_() for x in (call.query, call.key, call.value)]
    mask = call.captures[0].double()[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    grad = torch.randn(want.shape)
    expected = torch.autograd.grad(want, leaves, grad.double())
    out, logsumexp = launch.forward(call, TILE)
    assert (logsumexp == -INF).any()
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
    for got, x in zip(backward(call, grad, out, logsumexp, (TILE, TILE)), expected):
        torch.testing.assert_close(got.double(), x, rtol=2e-5, atol=2e-5)


def test_flags_times_a_fill():
    """This is the extended mask of older models: (1 - flag) * the lowest value."""
    flags = A.to_float(A.load(0, [B, J], "i"))
    score = A.add(DOT, A.mul(A.const(FINITE), A.sub(A.const(1.0), flags)))
    some = padding.clone()
    some[1] = False
    spec = AttentionSpec(score=score, captures=(Capture("i", 2),))
    call = Call(spec, *tensors(T, S, heads=2, groups=1), (some.long(),))
    call = replace(call, summary=states_of(call))
    compare(call)
    assert call.summary.flatten(1).tolist() == [[5, 5, 5, 0], [0, 0, 0, 0]]


def test_a_clamp_to_the_lowest_number_masks_as_well():
    score = A.maximum(A.add(DOT, A.load(0, [B, J], "f")), A.load(1, [], "f"))
    spec = AttentionSpec(score=score, captures=(Capture("f", 2), Capture("f", 0)))
    mask = torch.zeros(padding.shape).masked_fill(~padding, -INF)
    for lowest, live in ((FINITE, False), (-50.0, True)):
        call = Call(spec, *tensors(T, S, heads=2, groups=1), (mask, torch.tensor(lowest)))
        call = replace(call, summary=states_of(call))
        compare(call)
        assert bool((call.summary & summary.LIVE).all()) == live


def test_what_is_empty_is_not_visited():
    """A NaN in an empty tile does not spread. Without a summary, it does."""
    index, kept = WHOLE["padding"]
    call = added_call(index, kept, -INF)
    key, value = call.key.clone(), call.value.clone()
    for b, columns in enumerate(call.summary[:, 0, 0]):
        for n in (columns == 0).nonzero().flatten().tolist():
            key[b, :, 16 * n : 16 * n + 16] = value[b, :, 16 * n : 16 * n + 16] = math.nan
    assert key.isnan().any()
    call = replace(call, key=key, value=value)
    out, logsumexp = launch.forward(call, TILE)
    dq, dk, dv, _ = backward(call, torch.ones_like(out), out, logsumexp, (TILE, TILE))
    assert not any(x.isnan().any() for x in (out, dq, dk, dv))
    assert launch.forward(replace(call, summary=None), TILE)[0].isnan().all()


def test_a_nan_in_the_mask_is_not_skipped():
    call = added_call(*WHOLE["padding"], -INF)
    mask = call.captures[0].clone()
    mask[0, 50] = math.nan
    call = replace(call, captures=(mask,))
    call = replace(call, summary=states_of(call))
    out, _ = launch.forward(call, TILE)
    assert out[0].isnan().all() and not out[1].isnan().any()


FLAG, BIAS = A.load(0, [B, J], "i"), A.load(0, [B, J], "f")


@pytest.mark.parametrize(
    "score, found",
    [
        (A.add(DOT, BIAS), BIAS),
        (A.mul(A.const(0.5), A.add(DOT, BIAS)), A.mul(A.const(0.5), BIAS)),
        (A.add(DOT, BIAS, A.load(1, [H], "f")), BIAS),
        (A.half(A.add(A.half(DOT), BIAS)), BIAS),
        (A.where(CAUSAL, A.add(DOT, BIAS), A.const(FINITE)), BIAS),
        (A.where(CAUSAL, A.add(DOT, BIAS), A.const(-5.0)), None),  # the -5 is not a mask
        (A.maximum(A.add(DOT, BIAS), A.const(-50.0)), None),  # as high as -50
        (A.unary("tanh", A.add(DOT, BIAS)), None),
        (A.add(DOT, A.mul(A.const(-1e9), A.sub(A.const(1.0), A.to_float(FLAG)))), None),  # no lower than -2e9
        (A.add(DOT, A.load(1, [H], "f")), None),  # the same for all keys
        (A.add(DOT, A.mul(A.load(1, [H], "f"), A.to_float(A.sub(J, I)))), None),  # linear biases
        (A.add(DOT, A.load(1, [A.sub(J, I)], "f")), None),  # by distance
        (DOT, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_added_to_a_score_is_found(score, found):
    assert addend(score) is found


def two_layers(q, k, v, mask):
    x = ((q @ k.mT) * 0.25 + mask).softmax(-1) @ v
    return ((x @ k.mT) * 0.25 + mask).softmax(-1) @ v


def test_layers_and_both_passes_share_one_summary(passes):
    fast, (*some, mask) = compiled(two_layers), graph_inputs()
    mask = torch.zeros(mask.shape).masked_fill(~mask, FINITE)[:, None]
    mask[0, 0, 7] = FINITE  # a row without a live key
    out, want = fast(*some, mask), two_layers(*some, mask)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    grads = zip(*(torch.autograd.grad(x.square().sum(), some) for x in (out, want)))
    for got, expected in grads:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(passes) == 1
