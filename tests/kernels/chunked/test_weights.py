"""Compare sums of the weights with the whole matrix in float64, forward and backward."""

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.chunked import attention as chunked
from attnfx.kernels.chunked import blocks as chunked_plan
from attnfx.kernels.chunked import weights
from attnfx.kernels.operators import weights as operator_weights  # noqa: F401  (registers the operators)
from attnfx.spec import AttentionSpec, Capture
from tests.kernels.cases import (
    CASES,
    CAUSAL,
    DOT,
    DOUBLE,
    FINITE,
    INF,
    PAD,
    WINDOW,
    masked,
    padding,
    slope,
    tensors,
    whole_weights,
)  # fmt: skip

KEPT = ["", "b", "bh", "bhi", "bi", "bij", "bj", "bhj", "hij", "j", "bhij"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Configure blocks so small that rows, batches and heads are divided at any size."""
    monkeypatch.setitem(chunked_plan.ROWS, "cpu", 16)
    monkeypatch.setitem(chunked_plan.TILE_ELEMENTS, "cpu", 1500)


def attention_of(spec, query, key, captures=(), sizes=(), seed=None):
    """Return (call, logsumexp) as in a rewritten graph."""
    call = Call(spec, query, key, key, captures, sizes, seed)
    return call, chunked.forward(call)[1]


def compare(spec, keep, captures=(), sizes=(), **shape):
    query, key, _ = tensors(**shape)
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    floats = [c.clone().requires_grad_() if spec.captures[n].grad else c for n, c in enumerate(captures)]
    gone = [n for n, a in enumerate("bhij") if a not in keep]
    whole = whole_weights(spec, *leaves, floats, sizes)
    want = whole.sum(gone) if gone else whole
    call, logsumexp = attention_of(spec, query, key, captures, sizes)
    close = dict(rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(weights.forward(call, logsumexp, keep), want.detach(), **close)
    grad = torch.randn_like(want)
    wanted = [*leaves, *(f for f, c in zip(floats, spec.captures) if c.grad)]
    of_query, of_key, of_captures = weights.backward(call, grad, logsumexp, keep)
    for got, expected in zip([of_query, of_key, *of_captures], torch.autograd.grad(want, wanted, grad)):
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("name", CASES)
def test_sums_and_their_gradients_are_those_of_the_whole_matrix(name):
    fields, captures = CASES[name]
    compare(AttentionSpec(**fields, **DOUBLE), "bj", captures, sizes=(3,) if name == "named size" else ())


@pytest.mark.parametrize("keep", KEPT)
def test_any_axes_can_be_kept(keep):
    weight = A.mul(A.PROB, A.PROB)  # otherwise the sum over keys is 1 with a zero gradient
    compare(AttentionSpec(score=masked(WINDOW), weight=weight, **DOUBLE), keep)
    compare(AttentionSpec(score=masked(WINDOW), weight=weight, **DOUBLE), keep, groups=4, T=1)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_rows_without_a_live_key_count_as_in_eager(fill, safe):
    spec = AttentionSpec(score=masked(A.and_(CAUSAL, PAD), fill), safe=safe, captures=(Capture("b", 2),), **DOUBLE)
    compare(spec, "bj", (padding,))
    compare(spec, "bhi", (padding,))


def test_the_weights_are_dropped_as_the_attention_drops_them():
    """With the same dropout, the received weights times values are the sum of the attention's outputs over queries."""
    query, key, value = tensors(T=200, S=300)
    spec = AttentionSpec(score=masked(CAUSAL), dropout=0.3, **DOUBLE)
    seed = torch.tensor([11])
    out, logsumexp = chunked.forward(Call(spec, query, key, value, seed=seed))
    call = Call(spec, query, key, key, seed=seed)
    received = weights.forward(call, logsumexp, "bhj")
    per_head = value.repeat_interleave(2, 1)
    torch.testing.assert_close(torch.einsum("bhj,bhje->bhe", received, per_head), out.sum(2))
    grad, step = torch.randn_like(received), torch.randn_like(query)
    ahead, behind = (
        weights.forward(Call(spec, query + d * step, key, key, seed=seed), logsumexp, "bhj") for d in (1e-5, -1e-5)
    )
    slope = (weights.backward(call, grad, logsumexp, "bhj")[0] * step).sum()
    torch.testing.assert_close(((ahead - behind) * grad).sum() / 2e-5, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [dict(T=0), dict(S=0), dict(size_b=0)], ids=str)
def test_empty_sizes_work(shape):
    query, key, _ = tensors(**shape)
    call, logsumexp = attention_of(AttentionSpec(score=DOT, **DOUBLE), query, key)
    for keep in KEPT:
        out = weights.forward(call, logsumexp, keep)
        assert out.shape == torch.Size(weights.shape_of(call, keep)) and not out.any()
        found = weights.backward(call, torch.ones_like(out), logsumexp, keep)
        assert [x.shape for x in found[:2]] == [query.shape, key.shape]


@pytest.mark.parametrize("over", ["i", "j"])
@pytest.mark.parametrize("name", ["plain", "causal", "window", "learned bias", "sinks"])
def test_the_largest_weight_of_each_row_or_key_and_its_place_are_those_of_the_whole_matrix(name, over, monkeypatch):
    monkeypatch.setitem(chunked_plan.ROWS, "cpu", 16)  # several blocks of rows
    fields, captures = CASES[name]
    spec = AttentionSpec(**fields, **DOUBLE)
    query, key, _ = tensors()
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    floats = [c.clone().requires_grad_() if c.is_floating_point() else c for c in captures]
    want, index = whole_weights(spec, *leaves, floats).max("bhij".index(over))
    call, logsumexp = attention_of(spec, query, key, captures)
    most, keys = weights.largest(call, logsumexp, over)
    torch.testing.assert_close(most, want.detach())
    assert torch.equal(keys, index)
    grad = torch.randn_like(want)
    wanted = [*leaves, *(f for f, c in zip(floats, spec.captures) if c.grad)]
    of_query, of_key, of_captures = weights.largest_backward(call, grad, keys, logsumexp, over)
    for got, expected in zip([of_query, of_key, *of_captures], torch.autograd.grad(want, wanted, grad)):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_rows_without_a_live_key_have_the_key_of_eager(fill, safe):
    spec = AttentionSpec(score=masked(A.and_(CAUSAL, PAD), fill), safe=safe, captures=(Capture("b", 2),), **DOUBLE)
    query, key, _ = tensors()
    for over in "ij":
        want, index = whole_weights(spec, query, key, (padding,)).max("bhij".index(over))
        most, keys = weights.largest(*attention_of(spec, query, key, (padding,)), over)
        torch.testing.assert_close(most, want, equal_nan=True)
        assert torch.equal(keys, index)


def test_of_equal_weights_the_first_key_counts():
    query, key, _ = tensors()
    most, keys = weights.largest(*attention_of(AttentionSpec(score=masked(CAUSAL), **DOUBLE), query * 0, key))
    assert not keys.any() and torch.equal(most[0, 0], 1 / torch.arange(1, most.shape[2] + 1).double().clamp(max=41))


def test_the_largest_weight_is_asked_of_probabilities_only():
    query, key, _ = tensors()
    call, logsumexp = attention_of(AttentionSpec(score=DOT, weight=A.mul(A.PROB, A.PROB), **DOUBLE), query, key)
    with pytest.raises(ValueError, match="the largest weight needs probabilities"):
        torch.ops.attnfx.attention_weights_max(query, key, logsumexp, [], [], None, call.spec.to_json(), "j")


BIASED = AttentionSpec(score=masked(CAUSAL, score=A.add(DOT, slope)), captures=CASES["sinks"][0]["captures"])


@pytest.mark.parametrize(
    "spec, count, seed",
    [(AttentionSpec(score=DOT), 0, None), (BIASED, 1, None), (AttentionSpec(score=DOT, dropout=0.3), 0, 5)],
    ids=["plain", "captured", "random"],
)
def test_pytorchs_own_checks_of_an_operator_pass(spec, count, seed):
    query, key, value = (x.requires_grad_() for x in tensors(T=9, S=11, dtype=torch.float32))
    captures = [torch.randn(4, requires_grad=True)] * count
    rest = captures, [], None if seed is None else torch.tensor([seed]), spec.to_json()
    _, logsumexp = torch.ops.attnfx.attention(query, key, value, *rest, "auto")
    args = query, key, logsumexp.detach(), *rest, "bj"
    torch.library.opcheck(torch.ops.attnfx.attention_weights.default, args)
    grad = torch.randn_like(torch.ops.attnfx.attention_weights(*args))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in (grad, *args)]
    plain[4] = [c.detach() for c in captures]
    torch.library.opcheck(
        torch.ops.attnfx.attention_weights_backward.default,
        tuple(plain),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("over", ["i", "j"])
def test_pytorchs_own_checks_of_the_largest_pass(over):
    query, key, value = (x.requires_grad_() for x in tensors(T=9, S=11, dtype=torch.float32))
    rest = [torch.randn(4, requires_grad=True)], [], None, BIASED.to_json()
    _, logsumexp = torch.ops.attnfx.attention(query, key, value, *rest, "auto")
    torch.library.opcheck(
        torch.ops.attnfx.attention_weights_max.default,
        (query, key, logsumexp.detach(), *rest, over),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static"),
    )


def test_what_does_not_fit_is_an_error_that_names_it():
    query, key, _ = tensors()
    call, logsumexp = attention_of(AttentionSpec(score=DOT, **DOUBLE), query, key)
    run = torch.ops.attnfx.attention_weights
    with pytest.raises(ValueError, match="keep is 'jb', expected letters of 'bhij' in that order"):
        run(query, key, logsumexp, [], [], None, call.spec.to_json(), "jb")
    with pytest.raises(ValueError, match="logsumexp has shape"):
        run(query, key, logsumexp[:1], [], [], None, call.spec.to_json(), "bj")
    with pytest.raises(ValueError, match="over is 'h', expected 'i' or 'j'"):
        torch.ops.attnfx.attention_weights_max(query, key, logsumexp, [], [], None, call.spec.to_json(), "h")


def test_under_autocast_the_operands_are_cast_as_those_of_a_product():
    query, key, _ = tensors(dtype=torch.float32)
    spec = AttentionSpec(score=DOT)
    call, logsumexp = attention_of(spec, query.bfloat16(), key.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.ops.attnfx.attention_weights(query, key, logsumexp, [], [], None, spec.to_json(), "bj")
    assert torch.equal(got, weights.forward(call, logsumexp, "bj"))
