"""Compare the chunked tier with the whole matrix of scores in float64, forward and backward."""

import math
from functools import partial

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.ir.expr import node
from attnfx.kernels.call import Call
from attnfx.kernels.chunked import attention as chunked
from attnfx.kernels.chunked import blocks as chunked_plan
from attnfx.kernels.chunked import program as chunked_program
from attnfx.kernels.chunked.block_run import Run
from attnfx.spec import AttentionSpec, Capture, H, I, J, additive
from tests.kernels.cases import (
    CASES,
    CAUSAL,
    DOT,
    DOUBLE,
    FINITE,
    G1,
    G2,
    INF,
    PAD,
    WINDOW,
    masked,
    padding,
    tensors,
    whole,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Configure blocks so small that rows, batches and heads are divided at any size."""
    monkeypatch.setitem(chunked_plan.ROWS, "cpu", 16)
    monkeypatch.setitem(chunked_plan.TILE_ELEMENTS, "cpu", 1500)


def compare(spec, captures=(), sizes=(), tier=chunked, tolerance=1e-9, **shape):
    inputs = tensors(**shape)
    leaves = [x.clone().requires_grad_() for x in inputs]
    floats = [c.clone().requires_grad_() if spec.captures[n].grad else c for n, c in enumerate(captures)]
    want = whole(spec, *leaves, floats, sizes)
    grad = torch.randn_like(want)
    out, logsumexp = tier.forward(Call(spec, *inputs, captures, sizes))
    close = dict(rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(out, want.detach(), **close)
    assert out.transpose(1, 2).is_contiguous() and logsumexp.shape == inputs[0].shape[:3]
    wanted = [*leaves, *(f for f, c in zip(floats, spec.captures) if c.grad)]
    want_grads = torch.autograd.grad(want, wanted, grad)
    *grads, of_captures = tier.backward(Call(spec, *inputs, captures, sizes), grad, out, logsumexp)
    for got, expected in zip([*grads, *of_captures], want_grads):
        torch.testing.assert_close(got, expected, **close)
    return out, logsumexp


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_whole_matrix(name):
    fields, captures = CASES[name]
    compare(AttentionSpec(**fields, **DOUBLE), captures, sizes=(3,) if name == "named size" else ())


@pytest.mark.parametrize(
    "shape", [dict(groups=1), dict(groups=4), dict(Dv=8), dict(T=1), dict(S=1), dict(size_b=1)], ids=str
)
def test_grouped_heads_value_widths_and_single_rows(shape):
    compare(AttentionSpec(score=masked(CAUSAL), **DOUBLE), **shape)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("fill", [-INF, FINITE, -1e9])
@pytest.mark.parametrize(
    "keep", [PAD, A.and_(CAUSAL, PAD), A.and_(WINDOW, PAD), A.and_(WINDOW, A.ge(J, A.const(12)))], ids=str
)
def test_rows_without_a_live_key_give_what_eager_gives(keep, fill, safe):
    """Eager returns NaN for -inf, zeros if the spec is safe, and the mean of the values for a finite fill."""
    captures = (padding,) if keep.op == "load" or "b" in keep.free else ()
    spec = AttentionSpec(score=masked(keep, fill), safe=safe, captures=(Capture("b", 2),) * len(captures), **DOUBLE)
    out, logsumexp = compare(spec, captures)
    dead = logsumexp[0, 0] <= fill / 2
    if keep is not PAD:
        assert dead.any() and not dead.all()
    if fill != -INF:
        mean = tensors()[2][0, 0].mean(0)
        assert all(torch.allclose(row, mean) for row in out[0, 0, dead])
    else:
        assert out[0, 0, dead].isnan().all() if not safe else not out[0, 0, dead].any()


@pytest.mark.parametrize("shape", [dict(S=0), dict(T=0), dict(size_b=0)], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "off by one", "sigmoid"])
def test_empty_sizes_work(shape, name):
    out, _ = compare(AttentionSpec(**CASES[name][0], **DOUBLE), **shape)
    assert not out.any()


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_spreads_as_in_eager(bad, which):
    inputs = tensors()
    inputs[which][0, 1, 3, 2] = bad
    spec = AttentionSpec(score=DOT, **DOUBLE)
    out, _ = chunked.forward(Call(spec, *inputs))
    torch.testing.assert_close(out, whole(spec, *inputs), equal_nan=True)


@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_a_pass_that_a_cuda_graph_captures_is_right_and_asks_the_device_for_nothing(fill, monkeypatch):
    spec = AttentionSpec(score=masked(A.and_(WINDOW, PAD), fill), captures=(Capture("b", 2),), **DOUBLE)
    monkeypatch.setattr(chunked_plan, "capturing", lambda: True)
    monkeypatch.setattr(chunked_plan.Plan, "holding", lambda *_: pytest.fail("what the device holds is read"))
    empty = padding.clone()
    empty[1] = False
    compare(spec, (empty,))


def test_huge_scores_keep_their_precision_in_the_backward_pass():
    """exp(score - logsumexp) would lose it: at 1e6, float32 values are 0.06 apart."""
    query, key, value = tensors(dtype=torch.float32)
    spec = AttentionSpec(score=A.add(DOT, A.const(1e6), A.mul(A.const(0.0), A.to_float(J))))
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    dot = (inputs[0] * 0.3) @ inputs[1].repeat_interleave(2, 1).mT
    want = (dot + 1e6).softmax(-1) @ inputs[2].repeat_interleave(2, 1)
    out, logsumexp = chunked.forward(Call(spec, query, key, value))
    grad = torch.randn_like(want)
    grads = chunked.backward(Call(spec, query, key, value), grad, out, logsumexp)
    torch.testing.assert_close(out, want)
    for got, expected in zip(grads, torch.autograd.grad(want, inputs, grad)):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_scores_rounded_to_half_precision_overflow_as_eagers_do():
    score = A.half(A.mul(A.const(4000.0), A.half(A.DOT)))
    query, key, value = (x.to(torch.float16) for x in tensors(dtype=torch.float32, D=64))
    out, _ = chunked.forward(Call(AttentionSpec(score=score, out_dtype="float16"), query, key, value))
    dot = (query.float() @ key.float().repeat_interleave(2, 1).mT).half() * 4000.0
    want = dot.float().softmax(-1) @ value.float().repeat_interleave(2, 1)
    assert want.isnan().any() and not want.isnan().all()
    assert torch.equal(out.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_no_less_exact_than_eager(dtype):
    query, key, value = (x.to(dtype) for x in tensors(T=64, S=64, D=32, Dv=32, dtype=torch.float32))
    spec = AttentionSpec(score=masked(CAUSAL), out_dtype=str(dtype)[6:])

    def grads(run, to):
        inputs = [x.to(to, copy=True).requires_grad_() for x in (query, key, value)]
        out = run(*inputs)
        torch.manual_seed(1)
        grad = torch.randn(out.shape).to(dtype).to(to)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)], grad

    def eager(query, key, value):
        keep = torch.ones(64, 64, dtype=torch.bool).tril()
        dot = query @ key.repeat_interleave(2, 1).mT * 0.3
        return dot.masked_fill(~keep, -INF).softmax(-1) @ value.repeat_interleave(2, 1)

    exact, _ = grads(eager, torch.float64)
    rough, grad = grads(eager, dtype)
    out, logsumexp = chunked.forward(Call(spec, query, key, value))
    ours = [out, *chunked.backward(Call(spec, query, key, value), grad, out, logsumexp)[:3]]
    for x, y, z in zip(ours, rough, exact):
        assert x.dtype == dtype
        assert (x.double() - z).norm() <= (y.double() - z).norm()


@pytest.mark.parametrize("elements", [1 << 16, 1 << 13, 1])
def test_smaller_chunks_give_the_same_with_the_same_dropout(elements):
    inputs = tensors(T=200, S=300)
    spec = AttentionSpec(score=masked(CAUSAL), dropout=0.2, **DOUBLE)
    call = Call(spec, *inputs, seed=torch.tensor([7]))
    expected = chunked.forward(call)
    grad = torch.randn_like(expected[0])
    for one, other in zip(chunked.forward(call, partial(Run, elements=elements)), expected):
        torch.testing.assert_close(one, other)
    *some, _ = chunked.backward(call, grad, *expected, make=partial(Run, elements=elements))
    *wanted, _ = chunked.backward(call, grad, *expected)
    for one, other in zip(some, wanted):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_dropout_is_one_draw_in_both_passes_and_keeps_the_stated_rate():
    inputs = tensors(T=200, S=300)
    spec = AttentionSpec(score=masked(CAUSAL), dropout=0.2, **DOUBLE)
    seed = torch.tensor([7])
    out, logsumexp = chunked.forward(Call(spec, *inputs, seed=seed))
    grad = torch.randn_like(out)
    grads = chunked.backward(Call(spec, *inputs, seed=seed), grad, out, logsumexp)
    # the output is linear in the values for the same dropout
    torch.testing.assert_close((out * grad).sum(), (inputs[2] * grads[2]).sum())
    # and its derivative along the queries belongs to the same dropout
    step = torch.randn_like(inputs[0])
    ahead, behind = (
        chunked.forward(Call(spec, inputs[0] + d * step, *inputs[1:], seed=seed))[0] for d in (1e-5, -1e-5)
    )
    torch.testing.assert_close(((ahead - behind) * grad).sum() / 2e-5, (grads[0] * step).sum(), rtol=1e-5, atol=1e-5)
    flat = AttentionSpec(score=A.mul(A.const(0.0), A.DOT), dropout=0.2, **DOUBLE)
    weights = (
        chunked.forward(Call(flat, *inputs[:2], torch.eye(300).double().expand(2, 2, 300, 300), seed=seed))[0] * 300
    )
    assert set(weights.mul(0.8).round(decimals=6).unique().tolist()) == {0.0, 1.0}
    assert (weights != 0).double().mean().item() == pytest.approx(0.8, abs=0.003)
    assert not torch.equal(weights[0], weights[1])
    other = chunked.forward(Call(spec, *inputs, seed=torch.tensor([8])))[0]
    assert not torch.equal(out, other)


def test_any_layout_of_the_inputs_gives_the_same():
    query, key, value = tensors()
    spec = AttentionSpec(score=masked(CAUSAL), **DOUBLE)
    want = chunked.forward(Call(spec, query, key, value))[0]
    turned = (query.mT.contiguous().mT, key.transpose(1, 2).contiguous().transpose(1, 2), value.mT.contiguous().mT)
    torch.testing.assert_close(chunked.forward(Call(spec, *turned))[0], want)
    zero_strides = [x[:1, :1].expand(2, *x.shape[1:]) for x in (query, key, value)]
    same = [x.contiguous() for x in zero_strides]
    assert torch.equal(chunked.forward(Call(spec, *zero_strides))[0], chunked.forward(Call(spec, *same))[0])


def test_a_scale_is_only_moved_into_the_queries_where_it_multiplies_every_dot():
    def scale(score):
        return chunked_program.program_of(AttentionSpec(score=score)).scale

    assert scale(masked(CAUSAL)) == 0.3
    assert scale(A.add(DOT, A.mul(A.const(0.2), A.unary("tanh", A.DOT)))) == 1.0
    assert scale(A.half(A.mul(A.const(0.3), A.half(A.DOT)))) == 1.0
    assert additive(DOT)[0] == 0.3


@pytest.mark.parametrize("power", [2, 3])
def test_a_number_before_a_power_of_the_dot_stays_where_it_is(power):
    score = A.add(A.mul(A.const(0.5), *[DOT] * power), A.const(0.25))
    compare(AttentionSpec(score=score, **DOUBLE))


def test_a_reduction_over_a_capture_that_needs_a_gradient_is_refused():
    m = A.var("m", A.const(4))
    spec = AttentionSpec(score=A.add(A.DOT, A.reduction("rsum", "m", A.const(4), A.load(0, [m], "f"))), captures=(G1,))
    with pytest.raises(ValueError, match="cannot differentiate a reduction of a captured tensor"):
        chunked_program.program_of(spec)


def test_only_the_live_keys_are_read():
    """A NaN outside a row's window does not reach the row, the one documented difference from eager."""
    query, key, value = tensors(T=64, S=64)
    value[:, :, 0] = math.nan
    out, _ = chunked.forward(Call(AttentionSpec(score=masked(WINDOW), **DOUBLE), query, key, value))
    assert out[:, :, :7].isnan().all() and not out[:, :, 32:].isnan().any()


@pytest.mark.slow
def test_nothing_of_the_size_of_the_score_matrix_is_made(monkeypatch):
    monkeypatch.setitem(chunked_plan.ROWS, "cpu", 64)
    monkeypatch.setitem(chunked_plan.TILE_ELEMENTS, "cpu", 1 << 16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    inputs = tensors(T=1024, S=1024, D=8, Dv=8, size_b=1, heads=2, groups=2, dtype=torch.float32)
    bias = torch.randn(2, 32)
    bucket = A.minimum(A.unary("abs", A.sub(I, J)), A.const(31))
    score = masked(CAUSAL, score=A.add(DOT, A.load(0, [H, bucket], "f")))
    spec = AttentionSpec(score=score, captures=(G2,))
    with Watch():
        out, logsumexp = chunked.forward(Call(spec, *inputs, [bias]))
        chunked.backward(Call(spec, *inputs, [bias]), out, out, logsumexp)
    assert largest <= 8 * (1 << 16)


def test_an_unknown_operator_is_an_error():
    with pytest.raises(KeyError):
        chunked.forward(Call(AttentionSpec(score=node("prob", "f")), *tensors(dtype=torch.float32)))


@pytest.mark.parametrize(
    "inner", [A.add(A.const(0.5), A.mul(A.const(0.25), DOT)), A.unary("sigmoid", A.mul(A.const(0.25), DOT))]
)
def test_a_scale_inside_another_factor_is_split_off_too(inner):
    """As in x * sigmoid(x) of scaled scores."""
    score = A.mul(A.const(0.25), DOT, inner)
    compare(AttentionSpec(score, **DOUBLE))
    compare(AttentionSpec(A.where(A.le(J, I), score, A.mul(A.const(0.25), DOT)), **DOUBLE))
