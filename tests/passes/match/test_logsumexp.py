"""Take the logsumexp of the scores and its gradient from the operator, without materializing scores."""

import pytest
import torch

from tests.support import check, compiled, new_reports, qkv, rand

T, S = 40, 56
NOTE = "sums of its weights are computed without storing the weights (test_logsumexp.py:"


def scores_of(q, k):
    return (q @ k.mT) * 0.25


def returned(q, k, v):
    s = scores_of(q, k)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def held_down(q, k, v):
    s = scores_of(q, k)
    z = torch.logsumexp(s, dim=-1, keepdim=True)
    return s.softmax(-1) @ v, (z**2).mean()


def normalised_with_it(q, k, v):
    s = scores_of(q, k)
    lse = s.logsumexp(-1, keepdim=True)
    return (s - lse).exp() @ v, lse.squeeze(-1)


def by_hand(q, k, v):
    s = torch.einsum("bhid,bhjd->bhij", q, k) * 0.25
    m = s.amax(-1, keepdim=True)
    e = (s - m).exp()
    total = e.sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bihd", e / total, v), (m + total.log()).squeeze(-1).transpose(1, 2)


def without_a_maximum(q, k, v):
    e = scores_of(q, k).exp()
    return (e / e.sum(-1, keepdim=True)) @ v, e.sum(-1).log()


def causal(q, k, v):
    keep = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2]) >= torch.arange(k.shape[2])
    s = scores_of(q, k).masked_fill(~keep, float("-inf"))
    return s.softmax(-1) @ v, s.logsumexp(-1)


def finite_fill(q, k, v):
    keep = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2]) + 3
    s = scores_of(q, k).masked_fill(~keep, torch.finfo(q.dtype).min)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def biased(q, k, v):
    s = scores_of(q, k) + torch.linspace(0, 1, k.shape[2])
    return s.softmax(-1) @ v, s.logsumexp(-1)


def weights_beside(q, k, v):
    s = scores_of(q, k)
    w = s.softmax(-1)
    return w @ v, s.logsumexp(-1), w.sum((1, 2))


def alone_differentiated(q, k, v):
    s = scores_of(q, k)
    return (s.softmax(-1) @ v).detach(), s.logsumexp(-1)


FORMS = [returned, held_down, normalised_with_it, by_hand, without_a_maximum, causal, finite_fill, biased,
         weights_beside, alone_differentiated]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", FORMS, ids=[fn.__name__ for fn in FORMS])
def test_it_is_the_operators_own(fn, dynamic, shapes_left):
    (site,) = check(fn, *qkv(t=T, s=S), dynamic=dynamic)
    assert NOTE in site.notes[-1]
    assert not {s for s in shapes_left if s[-2:] == (T, S)}


@pytest.mark.parametrize("fn", [returned, causal, finite_fill], ids=lambda fn: fn.__name__)
def test_every_tier_and_dtype(fn):
    check(fn, *qkv(t=T, s=S), tiers=("chunked",))
    check(fn, *(x.double() for x in qkv(t=17, s=23)))
    check(fn, *(x.bfloat16() for x in qkv(t=T, s=S)))
    check(returned, *qkv(t=1, s=9))


def test_grouped_heads():
    def fn(q, k, v):
        b, h, t, d = q.shape
        s = torch.einsum("bgrid,bgjd->bgrij", q.view(b, 2, h // 2, t, d), k).mul(0.25)
        return torch.einsum("bgrij,bgjd->bgrid", s.softmax(-1), v), s.logsumexp(-1).permute(0, 3, 2, 1)

    (site,) = check(fn, *qkv(t=T, s=S, g=2))
    assert NOTE in site.notes[-1]


def test_a_table_takes_its_share_of_the_gradient():
    def fn(q, k, v, table):
        distance = (torch.arange(S) - torch.arange(T)[:, None]).clamp(-4, 4) + 4
        s = scores_of(q, k) + table[distance].permute(2, 0, 1)
        return s.softmax(-1) @ v, s.logsumexp(-1)

    (site,) = check(fn, *qkv(t=T, s=S), rand(9, 4))
    assert NOTE in site.notes[-1]


def test_rows_without_a_key():
    def fn(q, k, v):
        keep = torch.arange(T)[:, None] >= torch.arange(S) + 3
        s = scores_of(q, k).masked_fill(~keep, float("-inf"))
        return s.softmax(-1) @ v, s.logsumexp(-1)

    (site,) = check(fn, *qkv(t=T, s=S))
    assert NOTE in site.notes[-1]


def of_what_was_shifted(q, k, v):
    s = scores_of(q, k)
    return s.softmax(-1) @ v, (s - s.amax(-1, keepdim=True)).logsumexp(-1)


def of_other_scores(q, k, v):
    dot = q @ k.mT
    return (dot * 0.25).softmax(-1) @ v, dot.logsumexp(-1)


def over_the_rows(q, k, v):
    s = scores_of(q, k)
    return s.softmax(-1) @ v, s.logsumexp(-2)


def of_some_keys(q, k, v):
    s = scores_of(q, k)
    return s.softmax(-1) @ v, s[..., : S // 2].logsumexp(-1)


def without_a_gradient(q, k, v):
    s = scores_of(q, k)
    return s.softmax(-1) @ v, s.detach().logsumexp(-1) * v.sum()


@pytest.mark.parametrize(
    "fn", [of_what_was_shifted, of_other_scores, over_the_rows, of_some_keys, without_a_gradient],
    ids=lambda fn: fn.__name__,
)  # fmt: skip
def test_nothing_else_is_taken_for_it(fn):
    (site,) = check(fn, *qkv(t=T, s=S))
    assert not any(NOTE in note for note in site.notes)


def test_a_softmax_by_hand_reads_it_for_itself():
    def fn(q, k, v):
        s = scores_of(q, k)
        return (s - s.logsumexp(-1, keepdim=True)).exp() @ v

    (site,) = check(fn, *qkv(t=T, s=S))
    assert not site.notes


def test_dropped_weights_leave_it_whole():
    def fn(q, k, v):
        s = scores_of(q, k)
        return torch.nn.functional.dropout(s.softmax(-1), 0.4, True) @ v, s.logsumexp(-1)

    args = qkv(t=T, s=S)
    with new_reports() as filed:
        _, found = compiled(fn)(*args)
    torch.testing.assert_close(found, scores_of(*args[:2]).logsumexp(-1))
    assert NOTE in filed[0].sites[0].notes[-1]


def test_a_largest_score_that_may_be_none_is_not_added_back():
    """In a row without a key, -inf - -inf is NaN."""

    def fn(q, k, v):
        keep = torch.arange(T)[:, None] >= torch.arange(S) + 3
        s = scores_of(q, k).masked_fill(~keep, float("-inf"))
        m = s.amax(-1, keepdim=True)
        return s.softmax(-1) @ v, m + (s - m).exp().sum(-1, keepdim=True).log()

    (site,) = check(fn, *qkv(t=T, s=S), train=False)
    assert not any(NOTE in note for note in site.notes)
