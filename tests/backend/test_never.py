"""Hold every rewrite to the rules that none may break: each test fails when its guard is taken out."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

from attnfx.ir import algebra as A
from tests.support import assert_kept, assert_right, check, compiled, error, new_reports, qkv, raises_refusal, rand, run

SCALE = 0.3
LOW = torch.finfo(torch.float32).min
INF = float("-inf")


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


# -- 1. nothing but rounding changes ------------------------------------------------------------------
def test_a_softmax_over_queries_is_not_taken_for_attention():
    assert_kept(lambda q, k, v: ((q @ k.mT) * SCALE).softmax(-2) @ v, *qkv(), code="softmax_dim")


def test_a_softmax_over_heads_is_not_taken_for_one_over_keys():
    """Its rows are apart, so it may run in chunks of rows, as it was written."""
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

    def turned(q, k, v):  # square in t and d: a transpose that is missing would go unseen by shapes
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


def test_a_softmax_that_is_divided_by_another_sum_is_not_normalised():
    def fn(q, k, v):
        weights = torch.exp((q @ k.mT) * SCALE)
        return (weights / weights.sum(-2, keepdim=True)) @ v

    def shifted(q, k, v):
        weights = torch.exp((q @ k.mT) * SCALE)
        return (weights / (weights.sum(-1, keepdim=True) + 1.0)) @ v

    assert_kept(fn, *qkv(), code="normaliser")
    (site,) = check(shifted, *qkv())
    assert site.spec.extra == (A.const(0.0),)  # the one is the exponential of another logit


def test_a_cast_of_the_scores_down_and_up_costs_no_accuracy_beyond_eagers():
    def fn(q, k, v):
        return ((q @ k.mT) * 20).to(torch.bfloat16).float().softmax(-1) @ v

    args = qkv()
    want = [((args[0].double() @ args[1].double().mT) * 20).softmax(-1) @ args[2].double()]
    assert error([compiled(fn)(*args).double()], want) <= 1.05 * error([fn(*args).double()], want)


def test_a_cast_to_an_eight_bit_float_is_not_dropped():
    """Three bits of mantissa: such a model was made to see them."""

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


# -- 2. rows without a live key -------------------------------------------------------------------------
def test_a_row_masked_with_minus_infinity_is_nan_as_in_eager():
    def fn(q, k, v, keep):
        return ((q @ k.mT) * SCALE).masked_fill(~keep, INF).softmax(-1) @ v

    keep = torch.ones(40, 40, dtype=torch.bool)
    keep[3] = False
    q, k, v = qkv()
    assert fn(q, k, v, keep).isnan().any()
    check(fn, q, k, v, keep, train=False)


def test_a_row_masked_with_minus_infinity_is_zero_in_the_library_operator_as_in_eager():
    keep = torch.ones(40, 40, dtype=torch.bool)
    keep[3] = False
    args = (*qkv(), keep)
    assert not F.scaled_dot_product_attention(*args[:3], attn_mask=keep).isnan().any()
    check(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *args, train=False)


def test_zeroed_nans_of_empty_rows_stay_zero():
    def fn(q, k, v, keep):
        weights = ((q @ k.mT) * SCALE).masked_fill(~keep, INF).softmax(-1)
        return torch.where(weights.isnan(), 0.0, weights) @ v

    keep = torch.ones(40, 40, dtype=torch.bool)
    keep[3] = False
    check(fn, *qkv(), keep, train=False)


def causal_and_padding(fill):
    def fn(q, k, v, keep):
        i = torch.arange(q.shape[2])
        allowed = (i[None, :] <= i[:, None])[None, None] & keep[:, None, None, :]
        return torch.where(allowed, (q @ k.mT) * SCALE, fill).softmax(-1) @ v

    return fn


@pytest.mark.parametrize("fill", [LOW, INF])
@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("side", ["left", "right", "all"])
def test_empty_rows_between_skipped_tiles_are_as_in_eager(fill, length, side):
    """Left padding under a causal mask: the first rows have no live key, and averaging needs the keys of tiles that
    a causal mask alone would leave out."""
    keep = torch.ones(3, length, dtype=torch.bool)
    if side == "left":
        keep[1, : length // 2] = False
    elif side == "right":
        keep[1, length // 2 :] = False
    else:
        keep[1] = False
    fn = causal_and_padding(fill)
    check(fn, *qkv(b=3, h=2, t=length), keep, train=False)
    torch._dynamo.reset()
    check(fn, *qkv(b=3, h=2, t=length), keep, train=fill != INF)


def test_the_gradients_of_uniform_rows_are_as_in_eager():
    keep = torch.ones(2, 300, dtype=torch.bool)
    keep[0, :270] = False

    def fn(q, k, v, keep):
        i = torch.arange(300)
        allowed = (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] < 20)
        allowed = allowed[None, None] & keep[:, None, None, :]
        return ((q @ k.mT) * SCALE).masked_fill(~allowed, LOW).softmax(-1) @ v

    check(fn, *qkv(h=2, t=300), keep)


def test_an_added_finite_minimum_averages_uniformly_where_all_keys_are_masked():
    def fn(q, k, v, keep):
        bias = (1.0 - keep[:, None, None, :].float()) * LOW
        return ((q @ k.mT) * SCALE + bias).softmax(-1) @ v

    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1] = False
    check(fn, *qkv(), keep, train=False)


def test_two_added_finite_minima_overflow_to_minus_infinity_as_in_eager():
    """Left padding as old models write it: where both masks are added the sum is -inf, where one is it is finite."""

    def fn(q, k, v, keep):
        i = torch.arange(40)
        scores = torch.where(i[None, :] <= i[:, None], (q @ k.mT) * SCALE, LOW)
        return (scores + (1.0 - keep[:, None, None, :].float()) * LOW).softmax(-1) @ v

    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1, :15] = False
    check(fn, *qkv(), keep, train=False)


@pytest.mark.parametrize("padding_first", [False, True])
def test_a_finite_minimum_added_to_minus_infinity_leaves_it(padding_first):
    """A row whose every causal key is padding averages over these, and never over the keys after it."""

    def fn(q, k, v, keep):
        i = torch.arange(40)
        bias = (1.0 - keep[:, None, None, :].float()) * LOW
        scores = (q @ k.mT) * SCALE
        if padding_first:
            scores = scores + bias + torch.where(i[None, :] <= i[:, None], 0.0, INF)
        else:
            scores = scores.masked_fill(i[None, :] > i[:, None], INF) + bias
        return scores.softmax(-1) @ v

    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1, :15] = False
    check(fn, *qkv(), keep)


def test_a_softmax_by_hand_without_the_maximum_is_nan_where_all_keys_are_masked():
    """exp(finfo.min) is zero: 0 / 0, where the operator would average."""

    def fn(q, k, v, keep):
        weights = torch.exp(((q @ k.mT) * SCALE).masked_fill(~keep[:, None, None, :], LOW))
        return (weights / weights.sum(-1, keepdim=True)) @ v

    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1] = False
    check(fn, *qkv(), keep, train=False)


def test_a_softmax_by_logsumexp_is_eagers_where_all_keys_are_masked():
    """finfo.min - logsumexp is zero in float32: every weight is one."""

    def fn(q, k, v, keep):
        scores = ((q @ k.mT) * SCALE).masked_fill(~keep[:, None, None, :], LOW)
        return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v

    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1] = False
    (site,) = check(fn, *qkv(), keep, train=False, exact=False)
    assert site.spec is None and site.decision.kernel == "rows"
    with new_reports() as filed:
        compiled(fn, tiers=("library",))(*qkv(), keep)
    refusal = filed[0].sites[0].refusal
    assert refusal is not None and refusal.code == "masked_rows" and "-inf" in refusal.hint

    def causal(q, k, v):  # each row has a live key: itself
        t = q.shape[2]
        scores = ((q @ k.mT) * SCALE).masked_fill(torch.ones(t, t).triu(1).bool(), LOW)
        return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v

    check(causal, *qkv())


def test_a_softmax_by_hand_with_the_maximum_averages_where_all_keys_are_masked():
    def fn(q, k, v, keep):
        scores = ((q @ k.mT) * SCALE).masked_fill(~keep[:, None, None, :], LOW)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return (weights / weights.sum(-1, keepdim=True)) @ v

    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1] = False
    check(fn, *qkv(), keep, train=False)


def test_a_constant_in_the_denominator_counts():
    def fn(q, k, v):
        scores = (q @ k.mT) * SCALE
        m = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - m)
        return (weights / (weights.sum(-1, keepdim=True) + torch.exp(-m))) @ v

    check(fn, *qkv())


def test_weights_masked_after_the_softmax_are_not_renormalised():
    def fn(q, k, v):
        i = torch.arange(40)
        return ((q @ k.mT) * SCALE).softmax(-1).masked_fill(i[None, :] > i[:, None], 0.0) @ v

    check(fn, *qkv())


def test_a_mask_that_depends_on_the_scores_is_evaluated_on_the_scores():
    check(lambda q, k, v: (s := (q @ k.mT) * SCALE).masked_fill(s < 0, INF).softmax(-1) @ v, *qkv(t=64))
    check(lambda q, k, v: torch.where((s := (q @ k.mT) * SCALE) < 0, LOW, s).softmax(-1) @ v, *qkv(t=64))


def test_a_fill_of_minus_1e9_masks_only_under_an_assumption_that_the_report_states():
    def fn(q, k, v):
        i = torch.arange(40)
        return ((q @ k.mT) * SCALE).masked_fill(i[None, :] > i[:, None], -1e9).softmax(-1) @ v

    (site,) = check(fn, *qkv())
    assert any("1e+09" in note or "1e9" in note or "assum" in note for note in site.notes), site.notes


def test_a_fill_of_the_smallest_float_needs_no_assumption():
    def fn(q, k, v):
        i = torch.arange(40)
        return ((q @ k.mT) * SCALE).masked_fill(i[None, :] > i[:, None], LOW).softmax(-1) @ v

    (site,) = check(fn, *qkv())
    assert not any("assum" in note for note in site.notes)


@pytest.mark.parametrize("fill", [-10000.0, -30.0, -1.0])
def test_a_moderate_fill_is_a_bias_like_any_other(fill):
    """Scores of size -fill are drowned by no mask."""

    def fn(q, k, v):
        i = torch.arange(40)
        return ((q @ k.mT) * SCALE).masked_fill(i[None, :] > i[:, None], fill).softmax(-1) @ v

    q, k, v = qkv()
    q[:, :, 5] *= 4 * -fill  # a row whose live scores may lie below the fill
    (site,) = check(fn, q, k, v, train=False)
    assert not any("assum" in note for note in site.notes)


def test_an_added_fill_that_is_moderate_keeps_what_it_is_added_to():
    def fn(q, k, v, keep):
        return ((q @ k.mT) * SCALE + (1.0 - keep[:, None, None, :].float()) * -10000.0).softmax(-1) @ v

    keep = torch.zeros(2, 40, dtype=torch.bool)  # all masked: the softmax of the scores themselves
    check(fn, *qkv(), keep)


# -- 3. what is not understood is refused -----------------------------------------------------------------
def over_queries(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-2) @ v


def summed_up(q, k, v):
    return ((q @ k.mT) * SCALE).cumsum(-2).softmax(-1) @ v


refused = pytest.mark.parametrize(
    ("fn", "code"), [(over_queries, "softmax_dim"), (summed_up, "rows_mixed")], ids=["over queries", "summed up"]
)


def kept_by(fn, *args, **options):
    with new_reports() as filed:
        out = compiled(fn, **options)(*args)
    return out, filed


@refused
def test_a_refusal_says_why_and_where(fn, code):
    _, filed = kept_by(fn, *qkv())
    (site,) = [s for r in filed for s in r.sites]
    assert not site.rewritten
    assert site.refusal is not None and site.refusal.code == code
    assert len(site.refusal.message) > 10
    assert site.refusal.nodes
    assert "test_never.py:" in site.where


@refused
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_refused_attention_is_right(fn, code, inner):
    assert_kept(fn, *qkv(t=24), code=code, inner=inner)


def test_a_router_is_no_attention():
    fn = lambda x, gate, w: (x @ gate).softmax(-1) @ w  # noqa: E731
    assert_kept(fn, rand(2, 30, 16), rand(16, 8), rand(8, 16), code="shared_keys")


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, gate, w: torch.sigmoid(x @ gate) @ w,
        lambda x, gate, w: (x @ gate * torch.sigmoid(x @ gate)) @ w,
    ],
    ids=["gate", "gated layer"],
)
def test_a_layer_without_keys_is_no_attention(fn):
    check(fn, rand(2, 30, 16), rand(16, 8), rand(8, 16), sites=0)


def test_linear_attention_is_left_alone():
    def fn(q, k, v):
        return q.softmax(-1) @ (k.softmax(1).mT @ v)

    assert_kept(fn, *(rand(2, 30, 16) for _ in range(3)), code=["not_attention"] * 2)


def test_weights_that_the_caller_asked_for_exist():
    def fn(q, k, v):
        weights = ((q @ k.mT) * SCALE).softmax(-1)
        return weights @ v, weights

    check(fn, *qkv())


@refused
def test_strict_raises_where_a_site_is_refused(fn, code):
    with raises_refusal(code):
        compiled(fn, strict=True)(*qkv())


def test_strict_is_quiet_where_all_is_rewritten():
    check(attend, *qkv(), strict=True)


def break_inside(monkeypatch, place):
    def fail(*_, **__):
        raise ZeroDivisionError("broken for a test")

    monkeypatch.setattr(f"attnfx.{place}", fail)


@pytest.mark.parametrize(
    "place",
    ["compiler.pipeline.run", "passes.prepare.trace.run", "compiler.choose._Choosing.choice", "compiler.apply.rewrite"],
)
def test_a_failure_inside_attnfx_is_one_warning_and_the_model_runs(monkeypatch, place):
    break_inside(monkeypatch, place)
    args = qkv()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = compiled(attend)(*args)
    torch.testing.assert_close(out, attend(*args))
    ours = [w for w in seen if "attnfx" in str(w.message)]
    assert len(ours) == 1
    assert "ZeroDivisionError: broken for a test" in str(ours[0].message)
    assert "report" in str(ours[0].message)


def test_a_failure_inside_attnfx_gives_the_original_graph_to_the_compiler(monkeypatch):
    break_inside(monkeypatch, "compiler.pipeline.check")
    with pytest.warns(UserWarning, match="attnfx failed"):
        got = run(compiled(attend, inner="inductor"), args := qkv(), True)
    assert error(got, run(attend, args, True)) < 1e-5


@pytest.mark.parametrize("place", ["compiler.pipeline.run", "compiler.apply.rewrite"])
def test_strict_raises_a_failure_inside_attnfx(monkeypatch, place):
    break_inside(monkeypatch, place)
    with pytest.raises(BackendCompilerFailed, match="ZeroDivisionError: broken for a test"):
        compiled(attend, strict=True)(*qkv())


def mask_changed(q, k, v, mask):
    out = ((q @ k.mT) * SCALE).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    mask.logical_or_(torch.ones_like(mask).tril())
    return out


def bias_changed(q, k, v, bias):
    out = ((q @ k.mT) * SCALE + bias).softmax(-1) @ v
    bias.add_(torch.arange(bias.shape[-1]))
    return ((out @ k.mT) * SCALE + bias).softmax(-1) @ v


def query_changed(q, k, v, x):
    out = ((x * SCALE) @ k.mT).softmax(-1) @ v
    x.mul_(3.0)
    return out + x.mean()


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("fn", [mask_changed, bias_changed, query_changed], ids=lambda fn: fn.__name__)
def test_inputs_that_are_written_in_place_give_the_gradients_that_the_compiler_gives_without_attnfx(fn, inner):
    """Not eager's: PyTorch's own compilers read the mask of `mask_changed` after it has changed."""
    q, k, v = qkv()
    last = {
        mask_changed: torch.rand(q.shape[0], 1, q.shape[2], k.shape[2]) > 0.3,
        bias_changed: torch.randn(q.shape[0], 1, q.shape[2], k.shape[2]),
        query_changed: torch.randn_like(q),
    }[fn]
    if fn is mask_changed:
        last[..., 0] = True
    results = []
    for run_ in (torch.compile(fn, backend=inner), compiled(fn, inner=inner)):
        torch._dynamo.reset()
        operands, held = [x.detach().clone().requires_grad_() for x in (k, v)], last.clone()
        out = run_(q, *operands, held)
        results.append([out, *torch.autograd.grad(out.square().sum(), operands), held])
    for a, b in zip(*results):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


# -- 4. randomness ------------------------------------------------------------------------------------------
def dropped(q, k, v):
    return F.dropout(((q @ k.mT) * SCALE).softmax(-1), 0.4, True) @ v


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_manual_seed_repeats_a_run_with_dropout(inner):
    fast, args = compiled(dropped, inner=inner), qkv()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append((fast(*args), fast(*args)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1])
    assert not torch.equal(results[0][0], results[2][0])


def draws_agree(fn, q, k, v):
    """<out, g> = <v, dv> holds for a function that is linear in v, if forward and backward drew the same."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = fn(q, k, v)
    g = torch.randn_like(out)
    out.backward(g)
    return torch.allclose((out.detach().double() * g).sum(), (v.detach().double() * v.grad.double()).sum(), rtol=1e-4)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_forward_and_backward_draw_the_same_dropout(inner):
    with new_reports() as filed:
        assert draws_agree(compiled(dropped, inner=inner), *qkv(t=150))
    assert [s.spec.dropout for r in filed for s in r.rewritten] == [0.4]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_checkpoint_region_recomputes_with_the_same_draw(inner):
    def fn(q, k, v):
        return checkpoint(dropped, q, k, v, use_reentrant=False)

    assert draws_agree(compiled(fn, inner=inner), *qkv(t=150))


def test_two_sites_draw_apart():
    def fn(q, k, v):
        return dropped(q, k, v), dropped(q, k, v)

    with new_reports() as filed:
        first, second = compiled(fn)(*qkv())
    assert sum(len(r.rewritten) for r in filed) == 2
    assert not torch.equal(first, second)


def test_the_share_of_dropped_weights_is_the_one_that_was_asked_for():
    fast = compiled(lambda q, k, v: F.dropout(((q @ k.mT) * SCALE).softmax(-1), 0.25, True) @ v)
    t = 64
    q, k, v = rand(8, 8, t, 8) * 0, rand(8, 8, t, 8), torch.eye(t).expand(8, 8, t, t)
    weights = fast(q, k, v)  # with unit values the weights themselves
    assert abs((weights == 0).float().mean().item() - 0.25) < 0.01
    torch.testing.assert_close(weights[weights != 0], torch.full(((weights != 0).sum(),), 1 / t / 0.75))
    columns = (weights == 0).float().mean((0, 1, 2))
    assert columns.min() > 0.2
    assert columns.max() < 0.3


# -- 5. mutation ----------------------------------------------------------------------------------------------
def test_a_mask_that_is_written_after_it_was_read_counts_as_it_was_read():
    def fn(q, k, v, bias):
        scores = (q @ k.mT) * SCALE + bias
        bias.fill_(0)
        return scores.softmax(-1) @ v

    q, k, v = qkv()
    bias = rand(40, 40)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k, v, bias.clone()), fn(q, k, v, bias.clone()))


def test_a_view_of_a_key_that_is_written_before_the_product_is_read_after_the_write():
    def fn(q, k, v):
        kt = k.mT
        k[:, :, 3] = 0
        return ((q @ kt) * SCALE).softmax(-1) @ v

    q, k, v = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k.clone(), v), fn(q, k.clone(), v))


def test_values_computed_in_the_graph_and_written_between_are_read_as_in_eager():
    def fn(q, k, v):
        value = v * 2
        weights = ((q @ k.mT) * SCALE).softmax(-1)
        early = weights @ value
        value.add_(1)
        return early, weights @ value

    with torch.no_grad():
        args = qkv()
        torch.testing.assert_close(compiled(fn)(*args), fn(*args))


def test_a_scaled_key_whose_source_is_written_before_the_product_keeps_the_old_numbers():
    """The walk through `k * 2` must not read a k that changed since."""

    def fn(q, k, v):
        doubled = k * 2
        k.zero_()
        return ((q @ doubled.mT) * SCALE).softmax(-1) @ v

    q, k, v = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k.clone(), v), fn(q, k.clone(), v))


def test_expanded_heads_whose_source_is_written_before_the_product_keep_the_old_numbers():
    def fn(q, k, v):
        wide = k.repeat_interleave(2, dim=1)
        k.neg_()
        return ((q @ wide.mT) * SCALE).softmax(-1) @ v.repeat_interleave(2, dim=1)

    q, k, v = qkv(g=2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k.clone(), v), fn(q, k.clone(), v))


# -- 6. nothing of PyTorch is changed ----------------------------------------------------------------------------
SNAPSHOT = """
import torch, torch._inductor.config, torch._dynamo.config, torch._functorch.config
import torch._inductor.compile_fx, torch._inductor.fx_passes.fuse_attention, torch.nn.functional as F
from torch._inductor.fx_passes import joint_graph, post_grad, pre_grad
def state():
    out = {}
    for m in (torch._inductor.config, torch._dynamo.config, torch._functorch.config):
        out[m.__name__] = m.save_config_portable()
    patterns = torch._inductor.fx_passes.fuse_attention
    for m in (torch, F, torch.Tensor, torch._inductor.compile_fx, patterns, joint_graph, torch.fx.Graph):
        out[repr(m)] = {k: id(v) for k, v in vars(m).items() if callable(v) and not k.startswith("__")}
    out["default dtype"] = torch.get_default_dtype()
    out["deterministic"] = torch.are_deterministic_algorithms_enabled()
    out["grad"] = torch.is_grad_enabled()
    out["threads"] = torch.get_num_threads()
    return out
def fn(q, k, v):
    return ((q @ k.mT) * 0.3).softmax(-1) @ v
args = [torch.randn(1, 2, 8, 4) for _ in range(3)]
torch.compile(fn, backend="aot_eager")(*args)
before = state()
import attnfx, attnfx.backend, attnfx.kernels.operators.attention
torch._dynamo.reset()
torch.compile(fn, backend="attnfx", options={"rewrite": "always", "inner": "aot_eager"})(*args)
after = state()
import attnfx.report.report
assert attnfx.report.report.reports()[-1].rewritten
for name in before:
    assert before[name] == after[name], (name, [k for k in before[name] if before[name][k] != after[name].get(k)])
"""


def test_neither_import_nor_compilation_changes_pytorch_or_its_configuration():
    done = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


# -- 7. integers that were computed through floats -----------------------------------------------------------------
def t5_bucket(distance, buckets, longest, both):
    found = torch.zeros_like(distance)
    if both:
        buckets //= 2
        found = found + (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = -torch.minimum(distance, torch.zeros_like(distance))
    exact = buckets // 2
    large = exact + (torch.log(distance.float() / exact) / math.log(longest / exact) * (buckets - exact)).long()
    return found + torch.where(distance < exact, distance, torch.minimum(large, torch.full_like(large, buckets - 1)))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(
    ("buckets", "longest"), [(32, 128), (32, 81)]
)  # 81: at distance 36 a merged constant rounds over
def test_the_buckets_of_a_relative_bias_are_exact_for_all_lengths(both, buckets, longest):
    """With q = 0 and unit values the output is the softmax of the bias: one bucket off is a visible difference."""

    def fn(q, k, v, table):
        distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
        bias = table[t5_bucket(distance, buckets, longest, both)].permute(2, 0, 1)[None]
        return (q @ k.mT + bias).softmax(-1) @ v

    table = torch.arange(buckets).float()[:, None] * 0.9
    t = 600
    q, k, v = torch.zeros(1, 1, t, 4), torch.zeros(1, 1, t, 4), torch.eye(t)[None, None]
    with new_reports() as filed:
        got = compiled(fn)(q, k, v, table)
    want = fn(q, k, v, table)
    assert [len(r.rewritten) for r in filed] == [1]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


def test_a_bucket_table_takes_its_gradient():
    def fn(q, k, v, table):
        distance = torch.arange(40)[None, :] - torch.arange(40)[:, None]
        return (q @ k.mT + table[t5_bucket(distance, 32, 128, True)].permute(2, 0, 1)[None]).softmax(-1) @ v

    check(fn, *qkv(), rand(32, 4))


def test_a_comparison_of_computed_floats_decides_as_in_eager():
    def fn(q, k, v):
        i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
        keep = torch.sqrt((i - j).abs().float()) <= 3.0  # sqrt(9) = 3 exactly
        near = torch.log(1.0 + (i - j).abs().float()) * 2.5 < math.log(8.0) * 2.5
        return ((q @ k.mT) * SCALE).masked_fill(~(keep & near), INF).softmax(-1) @ v

    check(fn, *qkv())


def test_an_attention_that_reads_anothers_output_leaves_neither(shapes_left):
    def attend(q, k, v):
        return ((q @ k.mT) * SCALE).softmax(-1) @ v

    def fn(q, k, v):
        return attend(attend(q, k, v), k, attend(v, k, q))

    check(fn, *qkv(), sites=3)
    assert shapes_left and not any(shape[-2:] == (40, 40) for shape in shapes_left)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_added_fill_leaves_the_scores_their_gradient_where_all_keys_are_masked(dynamic):
    """The weights of such a row are one over the keys; a fill in the place of the scores has no gradient, an added one
    lets it through."""
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[0, :7] = False
    keep[1] = False

    def allowed(keep, t):
        return keep[:, None, None, :] & torch.ones(t, t, dtype=torch.bool).tril()

    def put(q, k, v, keep):
        scores = ((q @ k.mT) * 0.25).masked_fill(~allowed(keep, q.shape[2]), LOW)
        return scores.softmax(-1) @ v

    def added(q, k, v, keep):
        return ((q @ k.mT) * 0.25 + torch.where(allowed(keep, q.shape[2]), 0.0, LOW)).softmax(-1) @ v

    def multiplied(q, k, v, keep):
        return ((q @ k.mT) * 0.25 + (1.0 - keep[:, None, None, :].to(q.dtype)) * LOW).softmax(-1) @ v

    args = (*qkv(), keep)
    for fn in (put, added, multiplied):
        sites = assert_right(fn, *args, dynamic=dynamic)
        assert sites and all(site.rewritten for site in sites)
    eager = [run(fn, args, True)[1] for fn in (put, added)]
    assert error(*[[g] for g in eager]) > 0.1  # the two do differ there


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
    """An optimiser leaves a parameter without a gradient alone, and decays one whose gradient is zero."""
    leaves = [[x.detach().clone().requires_grad_() for x in qkv(h=2, t=12)] for _ in range(2)]
    with new_reports() as filed:
        compiled(fn)(*leaves[0]).sum().backward()
    fn(*leaves[1]).sum().backward()
    assert [len(r.rewritten) for r in filed] == [1]
    assert [x.grad is None for x in leaves[0]] == [x.grad is None for x in leaves[1]]
