"""Match eager in rows without a live key, and treat a fill as a mask only if it is one."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import assert_right, check, compiled, error, new_reports, qkv, run

SCALE = 0.3


LOW = torch.finfo(torch.float32).min


INF = float("-inf")


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


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
    """With left padding under a causal mask, the first rows lack a live key. Their average needs the keys of tiles that
    a causal mask alone would skip."""
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
    """Old models write left padding so: the sum of both masks is -inf, but a single one is finite."""

    def fn(q, k, v, keep):
        i = torch.arange(40)
        scores = torch.where(i[None, :] <= i[:, None], (q @ k.mT) * SCALE, LOW)
        return (scores + (1.0 - keep[:, None, None, :].float()) * LOW).softmax(-1) @ v

    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1, :15] = False
    check(fn, *qkv(), keep, train=False)


@pytest.mark.parametrize("padding_first", [False, True])
def test_a_finite_minimum_added_to_minus_infinity_leaves_it(padding_first):
    """A row whose causal keys are all padding averages over these keys, and never over later ones."""

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
    """exp(finfo.min) is zero, so the row is 0 / 0, but the operator would average."""

    def fn(q, k, v, keep):
        weights = torch.exp(((q @ k.mT) * SCALE).masked_fill(~keep[:, None, None, :], LOW))
        return (weights / weights.sum(-1, keepdim=True)) @ v

    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1] = False
    check(fn, *qkv(), keep, train=False)


def test_a_softmax_by_logsumexp_is_eagers_where_all_keys_are_masked():
    """finfo.min - logsumexp is zero in float32, so every weight is one."""

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
    assert refusal is not None and refusal.code == "masked_rows" and "-math.inf" in refusal.hint

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
    """Such a fill does not mask scores of magnitude -fill."""

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


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_added_fill_leaves_the_scores_their_gradient_where_all_keys_are_masked(dynamic):
    """Such a row has uniform weights. A fill that replaces the scores blocks their gradient, an added one passes it."""
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
    assert error(*[[g] for g in eager]) > 0.1  # the two must differ in eager, too
