"""Compare the library tier with the chunked tier and with eager, including the operator's known pitfalls."""

import math

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.chunked import attention as chunked
from attnfx.kernels.chunked import blocks as chunked_plan
from attnfx.kernels.library import cpu as library
from attnfx.spec import AttentionSpec, B, Capture, H, I, J
from tests.kernels.cases import CAUSAL, DOT, DOUBLE, FINITE, INF, PAD, WINDOW, masked, slope, tensors

pad_capture = (Capture("b", 2),)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(library, "ROWS", 16)
    monkeypatch.setitem(chunked_plan.ROWS, "cpu", 8)


@pytest.fixture
def calls(monkeypatch):
    """Record each call of the operator as (queries, keys, is_causal, mask's shape or None)."""
    seen = []
    real = library._forward

    def spy(query, key, value, dropout, causal, *, attn_mask=None, scale=None):
        seen.append((query.shape[2], key.shape[2], causal, None if attn_mask is None else tuple(attn_mask.shape)))
        return real(query, key, value, dropout, causal, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(library, "_forward", spy)
    return seen


def compare(spec, inputs, captures=(), sizes=(), tolerance=1e-9):
    """Compare outputs, logsumexp and gradients with the chunked tier's."""
    assert library.supports(Call(spec, *inputs)) is None
    close = dict(rtol=tolerance, atol=tolerance, equal_nan=True)
    out, logsumexp = library.forward(Call(spec, *inputs, captures, sizes))
    want = chunked.forward(Call(spec, *inputs, captures, sizes))
    torch.testing.assert_close(out, want[0], **close)
    torch.testing.assert_close(logsumexp, want[1], **close)
    assert out.transpose(1, 2).is_contiguous()
    grad = torch.randn_like(out)
    *grads, of_captures = library.backward(Call(spec, *inputs, captures, sizes), grad, out, logsumexp)
    *wanted, of_wanted = chunked.backward(Call(spec, *inputs, captures, sizes), grad, *want)
    for got, expected in zip([*grads, *of_captures], [*wanted, *of_wanted]):
        torch.testing.assert_close(got, expected, **close)
        assert got.is_contiguous()
    return out


def pad_rows(S=41):
    padding = torch.ones(2, S, dtype=torch.bool)
    padding[0, :5] = False
    padding[1, 20:] = False
    return padding


bucket = A.minimum(A.unary("abs", A.sub(I, J)), A.const(9))
CASES = {
    "plain": (dict(score=DOT), ()),
    "causal": (dict(score=masked(CAUSAL)), ()),
    "window": (dict(score=masked(WINDOW)), ()),
    "prefix": (dict(score=masked(A.or_(CAUSAL, A.lt(J, A.const(9))))), ()),
    "padding": (dict(score=masked(PAD), captures=pad_capture), (pad_rows(),)),
    "bias_of_heads": (
        dict(score=masked(CAUSAL, score=A.add(DOT, A.mul(slope, A.to_float(J)))), captures=(Capture("f", 1),)),
        (torch.randn(4).double(),),
    ),
    "bucketed_bias": (
        dict(score=A.add(DOT, A.load(0, [bucket, H], "f")), captures=(Capture("f", 2, True),)),
        (torch.randn(10, 4).double(),),
    ),
    "dense_bias": (
        dict(score=A.add(DOT, A.load(0, [B, I, J], "f")), captures=(Capture("f", 3),)),
        (torch.randn(2, 37, 41).double(),),
    ),
    "sinks": (dict(score=masked(WINDOW), extra=(slope,), captures=(Capture("f", 1),)), (torch.randn(4).double(),)),
    "sinks_that_learn": (
        dict(score=masked(CAUSAL), extra=(slope,), captures=(Capture("f", 1, True),)),
        (torch.randn(4).double(),),
    ),
    "learned_scale": (
        dict(score=A.mul(A.DOT, A.load(0, [], "f")), captures=(Capture("f", 0),)),
        (torch.tensor(0.7).double(),),
    ),
    "named_size": (dict(score=masked(A.lt(A.sub(J, I), A.size("n0"))), sizes=("n0",)), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_chunked_tier(name):
    fields, captures = CASES[name]
    compare(AttentionSpec(**fields, **DOUBLE), tensors(), captures, (3,) if name == "named_size" else ())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("fill", [-INF, FINITE, -1e9])
@pytest.mark.parametrize(
    "keep", [PAD, A.and_(CAUSAL, PAD), A.and_(WINDOW, PAD), A.and_(WINDOW, A.ge(J, A.const(12)))], ids=str
)
def test_rows_without_a_live_key_are_right_too(keep, fill, safe):
    captures = (pad_rows(),) if "b" in keep.free else ()
    spec = AttentionSpec(score=masked(keep, fill), safe=safe, captures=pad_capture * len(captures), **DOUBLE)
    compare(spec, tensors(), captures)


def test_a_dead_row_from_an_additive_mask_is_not_a_number():
    bias = torch.zeros(2, 37, 41, dtype=torch.float64)
    bias[1, 20] = -INF
    spec = AttentionSpec(**CASES["dense_bias"][0], **DOUBLE)
    out = compare(spec, tensors(), (bias,))
    assert out[1, :, 20].isnan().all() and out.isnan().sum() == out[1, :, 20].numel()


def test_an_additive_mask_of_the_least_float_averages_a_dead_row():
    bias = torch.zeros(2, 37, 41, dtype=torch.float32)
    bias[1, 20] = FINITE
    inputs = tensors(dtype=torch.float32)
    spec = AttentionSpec(**CASES["dense_bias"][0])
    out = compare(spec, inputs, (bias,), tolerance=1e-5)
    torch.testing.assert_close(out[1, :, 20], inputs[2][1].mean(1).repeat_interleave(2, 0))


@pytest.mark.parametrize(
    "shape", [dict(Dv=3), dict(Dv=11), dict(T=1), dict(S=1), dict(groups=1), dict(groups=4), dict(T=60)], ids=str
)
@pytest.mark.parametrize("keep", [None, CAUSAL, WINDOW], ids=str)
def test_widths_lengths_and_grouped_heads(shape, keep):
    compare(AttentionSpec(score=DOT if keep is None else masked(keep), **DOUBLE), tensors(**shape))


def test_plain_and_causal_attention_are_one_call_without_a_mask(calls):
    library.forward(Call(AttentionSpec(score=DOT, **DOUBLE), *tensors()))
    library.forward(Call(AttentionSpec(score=masked(CAUSAL), **DOUBLE), *tensors(S=37)))
    assert calls == [(37, 41, False, None), (37, 37, True, None)]


def test_causal_attention_with_padding_is_one_call_with_a_row(calls):
    spec = AttentionSpec(score=masked(A.and_(CAUSAL, PAD)), captures=pad_capture, **DOUBLE)
    library.forward(Call(spec, *tensors(), (torch.ones(2, 41, dtype=torch.bool),)))
    assert calls == [(37, 41, True, (2, 1, 1, 41))]


def test_causality_is_a_question_of_the_sizes(calls):
    """j <= i + (S - T) is plain causality if S = T, always true if T = 1, and neither otherwise."""
    keep = A.ge(A.add(I, A.sub(A.size("S"), A.size("T"))), J)
    spec = AttentionSpec(score=masked(keep), **DOUBLE)
    compare(spec, tensors(T=20, S=20))
    compare(spec, tensors(T=1, S=20))
    compare(spec, tensors(T=10, S=20))
    # the single queries of a group's two heads are rows of one call
    assert calls == [(20, 20, True, None), (2, 20, False, None), (10, 20, False, (1, 1, 10, 20))]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_few_queries_of_grouped_heads_are_right(name, queries):
    fields, captures = CASES[name]
    captures = tuple(x[:, :queries] if name == "dense_bias" else x for x in captures)
    compare(
        AttentionSpec(**fields, **DOUBLE), tensors(T=queries, groups=2), captures, (3,) if name == "named_size" else ()
    )


@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_dead_rows_of_grouped_heads_are_right(fill):
    dead = torch.zeros(2, 41, dtype=torch.bool)
    dead[1, 3:] = True
    compare(AttentionSpec(score=masked(PAD, fill), captures=pad_capture, **DOUBLE), tensors(T=1, groups=1), (dead,))


def test_only_scores_that_are_alike_for_all_heads_share_a_call(calls):
    padded = AttentionSpec(score=masked(PAD), captures=pad_capture, **DOUBLE)
    library.forward(Call(padded, *tensors(T=3, groups=2), (pad_rows(),)))
    sloped = AttentionSpec(score=A.add(DOT, slope), captures=(Capture("f", 1),), **DOUBLE)
    library.forward(Call(sloped, *tensors(T=1, groups=2), (torch.randn(4).double(),)))
    library.forward(Call(AttentionSpec(score=masked(CAUSAL), **DOUBLE), *tensors(T=3, groups=2, S=3)))
    assert [rows for rows, *_ in calls] == [6, 1, 3]


def test_a_window_reads_only_its_keys_and_full_blocks_have_no_mask(calls):
    library.forward(Call(AttentionSpec(score=masked(WINDOW), **DOUBLE), *tensors(T=48, S=48)))
    assert calls == [(16, 16, False, (1, 1, 16, 16)), (16, 22, False, (1, 1, 16, 22)), (16, 22, False, (1, 1, 16, 22))]
    calls.clear()
    blocks = masked(A.eq(A.floordiv(I, A.const(16)), A.floordiv(J, A.const(16))))
    library.forward(Call(AttentionSpec(score=blocks, **DOUBLE), *tensors(T=48, S=48)))
    assert calls == [(16, 16, False, None)] * 3


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", ["transposed", "zero strides", "last dim of stride 2"])
def test_any_layout_of_the_inputs_gives_the_same(which, layout):
    inputs = tensors()
    x = inputs[which]
    if layout == "zero strides":
        inputs[which] = x[:1, :1].expand_as(x)
    elif layout == "transposed":
        inputs[which] = x.mT.contiguous().mT
    else:
        inputs[which] = torch.stack([x, -x], -1)[..., 0]
    assert not inputs[which].is_contiguous()
    spec = AttentionSpec(score=masked(CAUSAL), **DOUBLE)
    want = chunked.forward(Call(spec, *(x.contiguous() for x in inputs)))
    torch.testing.assert_close(library.forward(Call(spec, *inputs)), want)
    compare(spec, inputs)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_spreads_as_in_eager(bad, which):
    """The operator alone returns zeros for a query of NaN."""
    inputs = tensors()
    inputs[which][0, 1, 3, 2] = bad
    compare(AttentionSpec(score=DOT, **DOUBLE), inputs)


def test_products_that_overflow_are_not_trusted_to_the_operator(calls):
    inputs = [x.to(torch.float32) * 1e19 for x in tensors()]
    compare(AttentionSpec(score=DOT), inputs)
    assert calls == []


def test_large_scores_keep_their_precision_in_the_backward_pass():
    bias = torch.full((2, 37, 41), 1e6)
    compare(AttentionSpec(**CASES["dense_bias"][0]), tensors(dtype=torch.float32), (bias,), tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", [None, CAUSAL, WINDOW], ids=str)
def test_halves_are_no_less_exact_than_eager(dtype, keep):
    query, key, value = (x.to(dtype) for x in tensors(T=64, S=64, D=32, Dv=32, dtype=torch.float32))
    spec = AttentionSpec(score=DOT if keep is None else masked(keep), out_dtype=str(dtype)[6:])
    allowed = torch.ones(64, 64, dtype=torch.bool)
    if keep is not None:
        allowed = allowed.tril()
    if keep is WINDOW:
        allowed = allowed.triu(-6)

    def grads(to):
        inputs = [x.to(to, copy=True).requires_grad_() for x in (query, key, value)]
        dot = inputs[0] @ inputs[1].repeat_interleave(2, 1).mT * 0.3
        out = dot.masked_fill(~allowed, -INF).softmax(-1) @ inputs[2].repeat_interleave(2, 1)
        torch.manual_seed(1)
        grad = torch.randn(out.shape).to(dtype).to(to)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)], grad

    exact, _ = grads(torch.float64)
    rough, grad = grads(dtype)
    out, logsumexp = library.forward(Call(spec, query, key, value))
    ours = [out, *library.backward(Call(spec, query, key, value), grad, out, logsumexp)[:3]]
    for x, y, z in zip(ours, rough, exact):
        assert x.dtype == dtype
        assert (x.double() - z).norm() <= (y.double() - z).norm()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (dict(normaliser="none"), "the weights are not a softmax"),
        (dict(weight=A.mul(A.const(2.0), A.PROB)), "changed after the softmax"),
        (dict(dropout=0.1), "dropout"),
        (dict(score=A.unary("tanh", A.DOT)), "not a multiple of the dot product"),
        (dict(score=A.half(DOT)), "not a multiple of the dot product"),
        (
            dict(score=A.mul(A.DOT, A.load(0, [H], "f")), captures=(Capture("f", 1),)),
            "not a multiple of the dot product",
        ),
        (dict(compute="float32"), "the attention needs float32"),
    ],
)
def test_what_it_cannot_run_is_said(fields, why):
    assert why in library.supports(Call(AttentionSpec(**{**DOUBLE, **fields}), *tensors()))


def test_empty_tensors_which_crash_the_operator_are_refused():
    for shape in (dict(S=0), dict(T=0), dict(size_b=0), dict(D=0, Dv=0)):
        assert "empty" in library.supports(Call(AttentionSpec(score=DOT, **DOUBLE), *tensors(**shape)))
