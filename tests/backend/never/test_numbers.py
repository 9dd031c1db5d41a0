"""Compare rewrites with eager: scales, casts, masks, permutations and gradients must have their exact meaning."""

import pytest
import torch
import torch.nn.functional as F

from attnfx.ir import algebra as A
from tests.support import check, compiled, error, new_reports, qkv, rand, run

SCALE = 0.3


LOW = torch.finfo(torch.float32).min


INF = float("-inf")


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def test_a_softmax_over_queries_is_not_taken_for_attention():
    """Its columns are independent, so it may run in chunks of keys, as written."""
    (site,) = check(lambda q, k, v: ((q @ k.mT) * SCALE).softmax(-2) @ v, *qkv())
    assert (site.decision.kernel, site.spec) == ("rows", None)


def test_a_softmax_over_heads_is_not_taken_for_one_over_keys():
    """Its rows are independent, so it may run in chunks of rows, as written."""
    (site,) = check(lambda q, k, v: ((q @ k.mT) * SCALE).softmax(1) @ v, *qkv())
    assert (site.decision.kernel, site.spec) == ("rows", None)


@pytest.mark.parametrize("alpha", [0.5, -2.0])
def test_alpha_of_an_added_bias_counts(alpha):
    def fn(q, k, v, bias):
        return torch.add((q @ k.mT) * SCALE, bias, alpha=alpha).softmax(-1) @ v

    check(fn, *qkv(), rand(40, 40))


def test_alpha_of_a_subtracted_bias_counts():
    check(lambda q, k, v, b: torch.sub((q @ k.mT) * SCALE, b, alpha=0.5).softmax(-1) @ v, *qkv(), rand(40, 40))


@pytest.mark.parametrize(("alpha", "beta"), [(SCALE, 1.0), (1.0, 0.25), (SCALE, -2.0), (SCALE, 0.0)])
def test_alpha_and_beta_of_baddbmm_count(alpha, beta):
    def fn(q, k, v, bias):
        return torch.baddbmm(bias, q, k.mT, alpha=alpha, beta=beta).softmax(-1) @ v

    check(fn, rand(6, 20, 8), rand(6, 20, 8), rand(6, 20, 8), rand(6, 20, 20))


@pytest.mark.parametrize("scale", [1.0, 0.125, -0.7, 8.0])
def test_the_scale_is_the_one_that_was_written(scale):
    check(lambda q, k, v: ((q @ k.mT) * scale).softmax(-1) @ v, *qkv())
    torch._dynamo.reset()
    check(lambda q, k, v: ((q @ k.mT) / scale).softmax(-1) @ v, *qkv())


def test_a_key_that_is_permuted_another_way_is_read_as_written():
    def fn(q, k, v):  # k is (b, t, h, d), read as (b, h, d, t)
        return ((q @ k.permute(0, 2, 3, 1)) * SCALE).softmax(-1) @ v

    def turned(q, k, v):  # with t = d, shapes would not reveal a missing transpose
        return ((q @ k) * SCALE).softmax(-1) @ v

    check(fn, rand(2, 4, 20, 8), rand(2, 20, 4, 8), rand(2, 4, 20, 8))
    check(turned, rand(2, 4, 8, 8), rand(2, 4, 8, 8), rand(2, 4, 8, 8))


def test_values_that_are_transposed_are_read_as_written():
    check(lambda q, k, v: ((q @ k.mT) * SCALE).softmax(-1) @ v.mT, rand(2, 4, 8, 8), rand(2, 4, 8, 8), rand(2, 4, 8, 8))


def test_scaled_values_and_shifted_values_keep_their_factor():
    check(lambda q, k, v: ((q @ k.mT) * SCALE).softmax(-1) @ (v * -3.0), *qkv())
    check(lambda q, k, v: ((q @ k.mT) * SCALE).softmax(-1) @ (v + 3.0), *qkv())


def test_weights_that_are_changed_after_the_softmax_stay_changed():
    check(lambda q, k, v: (((q @ k.mT) * SCALE).softmax(-1) * 0.5) @ v, *qkv())
    check(lambda q, k, v: (((q @ k.mT) * SCALE).softmax(-1) + 0.01) @ v, *qkv())
    check(lambda q, k, v: ((q @ k.mT) * SCALE).softmax(-1).square() @ v, *qkv())
    check(lambda q, k, v: ((q @ k.mT) * SCALE).log_softmax(-1) @ v, *qkv())


def test_a_softmax_that_is_divided_by_another_sum_is_not_normalized():
    def fn(q, k, v):
        weights = torch.exp((q @ k.mT) * SCALE)
        return (weights / weights.sum(-2, keepdim=True)) @ v

    def shifted(q, k, v):
        weights = torch.exp((q @ k.mT) * SCALE)
        return (weights / (weights.sum(-1, keepdim=True) + 1.0)) @ v

    (site,) = check(fn, *qkv())
    assert (site.decision.kernel, site.spec) == ("rows", None)  # as written, in chunks of keys
    (site,) = check(shifted, *qkv())
    assert site.spec.extra == (A.const(0.0),)  # the added 1 is the exponential of an extra logit


def test_a_cast_of_the_scores_down_and_up_costs_no_accuracy_beyond_eagers():
    def fn(q, k, v):
        return ((q @ k.mT) * 20).to(torch.bfloat16).float().softmax(-1) @ v

    args = qkv()
    want = [((args[0].double() @ args[1].double().mT) * 20).softmax(-1) @ args[2].double()]
    assert error([compiled(fn)(*args).double()], want) <= 1.05 * error([fn(*args).double()], want)


def test_a_cast_to_an_eight_bit_float_is_not_dropped():
    """It has three bits of mantissa, and the model relies on their rounding."""

    def fn(q, k, v):
        return ((q @ k.mT) * 3).to(torch.float8_e4m3fn).float().softmax(-1) @ v

    check(fn, *qkv(), exact=False, train=False)


def test_a_cast_to_float16_overflows_as_in_eager():
    def fn(q, k, v):
        return ((q @ k.mT) * 20000).to(torch.float16).float().clamp(max=9e4).softmax(-1) @ v

    check(fn, *qkv(), exact=False, train=False)


def test_a_cast_to_integers_counts():
    check(lambda q, k, v: ((q @ k.mT) * 5).int().float().softmax(-1) @ v, *qkv(), train=False, exact=False)
    check(lambda q, k, v: ((q @ k.mT) * 5).round().softmax(-1) @ v, *qkv(), train=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype):
    check(attend, *qkv(t=64, d=16), tolerance=0)
    q, k, v = (x.to(dtype) for x in qkv(t=64, d=16))
    want = run(attend, [x.double() for x in (q, k, v)], True)
    assert error(run(compiled(attend), [q, k, v], True), want) <= 1.05 * error(run(attend, [q, k, v], True), want)


def test_the_dtype_of_an_upcast_softmax_is_kept():
    def fn(q, k, v):
        return F.softmax(q @ k.mT, dim=-1, dtype=torch.float32) @ v.float()

    def back(q, k, v):
        return F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    args = [x.bfloat16() for x in qkv()]
    for one in (fn, back):
        assert compiled(one)(*args).dtype == one(*args).dtype
        check(one, *args, exact=False)


def test_a_window_of_one_more_key_is_another_window():
    i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
    for keep in ((i - j <= 7) & (j <= i), (i - j < 7) & (j <= i), (i - j <= 7) & (j < i + 1)):
        check(lambda q, k, v: ((q @ k.mT) * SCALE).masked_fill(~keep, INF).softmax(-1) @ v, *qkv(), train=False)  # noqa: B023
        torch._dynamo.reset()

    def inside(q, k, v):
        i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
        return ((q @ k.mT) * SCALE).masked_fill((j > i) | (i - j > 7), INF).softmax(-1) @ v

    def outside(q, k, v):
        i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
        return ((q @ k.mT) * SCALE).masked_fill((j > i) | (i - j >= 7), INF).softmax(-1) @ v

    wide, narrow = check(inside, *qkv())[0], check(outside, *qkv())[0]
    assert wide.spec != narrow.spec


@pytest.mark.parametrize("diagonal", [-1, 0, 1, 40])
def test_the_diagonal_of_a_triangle_counts(diagonal):
    def fn(q, k, v):
        keep = torch.tril(torch.ones(40, 40, dtype=torch.bool), diagonal=diagonal)
        return ((q @ k.mT) * SCALE).masked_fill(~keep, LOW).softmax(-1) @ v

    check(fn, *qkv())


def test_a_rectangular_triangle_is_aligned_as_written():
    def top(q, k, v):
        return ((q @ k.mT) * SCALE).masked_fill(~torch.ones(20, 50, dtype=torch.bool).tril(), INF).softmax(-1) @ v

    def bottom(q, k, v):
        return ((q @ k.mT) * SCALE).masked_fill(~torch.ones(20, 50, dtype=torch.bool).tril(30), INF).softmax(-1) @ v

    assert check(top, *qkv(t=20, s=50))[0].spec != check(bottom, *qkv(t=20, s=50))[0].spec


def test_a_constant_in_the_denominator_counts():
    def fn(q, k, v):
        scores = (q @ k.mT) * SCALE
        m = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - m)
        return (weights / (weights.sum(-1, keepdim=True) + torch.exp(-m))) @ v

    check(fn, *qkv())


def test_weights_masked_after_the_softmax_are_not_renormalized():
    def fn(q, k, v):
        i = torch.arange(40)
        return ((q @ k.mT) * SCALE).softmax(-1).masked_fill(i[None, :] > i[:, None], 0.0) @ v

    check(fn, *qkv())


def test_a_mask_that_depends_on_the_scores_is_evaluated_on_the_scores():
    check(lambda q, k, v: (s := (q @ k.mT) * SCALE).masked_fill(s < 0, INF).softmax(-1) @ v, *qkv(t=64))
    check(lambda q, k, v: torch.where((s := (q @ k.mT) * SCALE) < 0, LOW, s).softmax(-1) @ v, *qkv(t=64))


def test_an_attention_that_reads_anothers_output_leaves_neither(shapes_left):
    def attend(q, k, v):
        return ((q @ k.mT) * SCALE).softmax(-1) @ v

    def fn(q, k, v):
        return attend(attend(q, k, v), k, attend(v, k, q))

    check(fn, *qkv(), sites=3)
    assert shapes_left and not any(shape[-2:] == (40, 40) for shape in shapes_left)


DETACHED = {
    "scores": lambda q, k, v: (q @ k.mT).detach().softmax(-1) @ v,
    "weights": lambda q, k, v: (q @ k.mT).softmax(-1).detach() @ v,
    "largest": lambda q, k, v: _largest((q @ k.mT).detach()) @ v,
    "queries": lambda q, k, v: (q.detach() @ k.mT).softmax(-1) @ v,
    "nothing": lambda q, k, v: _largest(q @ k.mT) @ v,
}


def _largest(scores):
    return scores.masked_fill(scores < scores.topk(4).values[..., -1:], INF).softmax(-1)


@pytest.mark.parametrize("fn", DETACHED.values(), ids=DETACHED)
def test_what_is_behind_a_detach_has_no_gradient_rather_than_zeros(fn):
    """An optimizer skips a parameter without a gradient, but decays one whose gradient is zero."""
    leaves = [[x.detach().clone().requires_grad_() for x in qkv(h=2, t=12)] for _ in range(2)]
    with new_reports() as filed:
        compiled(fn)(*leaves[0]).sum().backward()
    fn(*leaves[1]).sum().backward()
    assert [len(r.rewritten) for r in filed] == [1]
    assert [x.grad is None for x in leaves[0]] == [x.grad is None for x in leaves[1]]
