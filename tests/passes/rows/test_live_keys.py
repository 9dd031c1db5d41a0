"""Compute chunks of rows over the keys that some row of them can see."""

import pytest
import torch
import torch.nn.functional as F

from attnfx.kernels.rows import run as rows
from tests.support import check, qkv, rand

T, S = 40, 56


def inputs(**sizes):
    return qkv(**{"t": T, "s": S, **sizes})


def scores_of(q, k):
    return (q @ k.mT) * 0.3


def keep_causal(q, k, offset=0):
    return torch.arange(q.shape[2])[:, None] + offset >= torch.arange(k.shape[2])


def best_of_the_past(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), float("-inf"))
    return s.masked_fill(s < s.topk(4, dim=-1).values[..., -1:], float("-inf")).softmax(-1) @ v


def talking_causal(q, k, v):
    mix = torch.eye(4, dtype=q.dtype) + 0.1
    s = torch.einsum("bhqk,hg->bgqk", scores_of(q, k), mix)
    s = s.masked_fill(torch.ones(q.shape[2], k.shape[2]).tril() == 0, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,hg->bgqk", F.dropout(s, 0.0), mix) @ v


def talking_in_a_window(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    s = scores_of(q, k) + torch.where((j <= i) & (j > i - 8), 0.0, float("-inf"))
    w = s.softmax(-1) * torch.sigmoid(s.amax(-1, keepdim=True))
    return torch.einsum("bhqk,hg->bgqk", w / w.sum(-1, keepdim=True), torch.eye(4, dtype=q.dtype) + 0.1) @ v


def two_masks(q, k, v):
    s = scores_of(q, k)
    a = s.masked_fill(~keep_causal(q, k), float("-inf")).softmax(-1)
    b = s.masked_fill(~keep_causal(q, k, 8), float("-inf")).softmax(-1)
    return (a - 0.4 * b) @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("fn", "least"),
    [(best_of_the_past, [16, 28, 40]), (talking_causal, [16, 28, 40]), (talking_in_a_window, [16, 24, 20]),
     (two_masks, [24, 36, 48])],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_chunks_take_live_keys_only(fn, least, dynamic, keys_taken):
    check(fn, *inputs(), dynamic=dynamic)
    assert [n for _, n in keys_taken[0]] == least


def mask_before_the_heads_mix(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), float("-inf")).softmax(-1)
    s = (s + 1).log()
    return s.softmax(-1) @ v


def finite_fill(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), -10.0)
    return s.masked_fill(s < s.topk(4, dim=-1).values[..., -1:], float("-inf")).softmax(-1) @ v


def mean_over_keys(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), float("-inf")).softmax(-1)
    return (s * s.mean(-1, keepdim=True)) @ v


def weights_of_dead_keys(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), float("-inf")).softmax(-1)
    return (s + s.amax(1, keepdim=True).sigmoid()) @ v


def weights_plus_a_constant(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), float("-inf"))
    return (s.masked_fill(s < s.topk(4, dim=-1).values[..., -1:], float("-inf")).softmax(-1) + 0.01) @ v


def places_of_the_best(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), float("-inf"))
    best, where = s.topk(4, dim=-1)
    return torch.full_like(s, float("-inf")).scatter(-1, where, best).softmax(-1) @ v


def least_of_the_past(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), float("-inf"))
    return s.masked_fill(s < s.topk(50, dim=-1, largest=False).values[..., -1:], 0.0).softmax(-1) @ v


def sorted_past(q, k, v):
    s = scores_of(q, k).masked_fill(~keep_causal(q, k), float("-inf"))
    return s.sort(-1).values.softmax(-1) @ v


def pairs(b=2, t=T, s=S):
    return rand(b, t, 8), rand(b, s, 8), rand(b, s, 8), rand(b, t, s, 2)


def weights_of_pairs(q, k, v, e):
    """Invariant point attention: the weights multiply a vector for each pair too, and parts of it are a bias."""
    near, far = e.square().unbind(-1)
    p = (scores_of(q, k) - near - far).masked_fill(~keep_causal(q[None], k[None]), float("-inf")).softmax(-1)
    return p @ v, torch.einsum("bij,bijc->bic", p, e)


def weights_of_pairs_in_parts(q, k, v, e):
    p = scores_of(q, k).masked_fill(~keep_causal(q[None], k[None]), float("-inf")).softmax(-1)[..., None] * e
    (x, y), (z, w) = p.unbind(-1), p.chunk(2, -1)
    return (x - y + (z * w)[..., 0]) @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("fn", "sites"), [(weights_of_pairs, 2), (weights_of_pairs_in_parts, 1)])
def test_operators_with_several_results_have_live_keys(fn, sites, dynamic, keys_taken):
    check(fn, *pairs(), sites=sites, dynamic=dynamic)
    assert keys_taken[0] is not None


def test_a_pointwise_function_with_two_results_stays_outside():
    """`frexp` returns mantissas and exponents; PyTorch tags it as pointwise."""

    def fn(q, k, v):
        s = scores_of(q, k)
        return s.softmax(-1).sort(-1).values @ v, torch.frexp(s).mantissa

    check(fn, *inputs(), train=False)


ALL_KEYS = [
    mask_before_the_heads_mix,
    finite_fill,
    mean_over_keys,
    weights_of_dead_keys,
    weights_plus_a_constant,
    places_of_the_best,
    sorted_past,
    least_of_the_past,
]


@pytest.mark.parametrize("fn", ALL_KEYS, ids=[fn.__name__ for fn in ALL_KEYS])
def test_chunks_take_all_keys_where_dead_ones_count(fn, keys_taken):
    check(fn, *inputs(), train=fn is not places_of_the_best)
    assert keys_taken[0] is None


def test_a_row_without_a_live_key_is_nan_as_in_eager():
    """The first eight rows do not see any key."""

    def fn(q, k, v):
        s = scores_of(q, k).masked_fill(~keep_causal(q, k, -8), float("-inf"))
        return torch.einsum("bhqk,hg->bgqk", s.softmax(-1), torch.eye(4, dtype=q.dtype)) @ v

    check(fn, *inputs(), train=False)


@pytest.fixture
def keys_taken(monkeypatch, unexercised):
    """Record, for each pass, the first key and the number of keys of each chunk, or None for all keys."""
    found, real = [], rows.RowCall.keys

    def keys(self, n):
        found.append(real(self, n))
        return found[-1]

    monkeypatch.setattr(rows.RowCall, "keys", keys)
    return found


def test_a_single_key_in_an_einsum_has_no_index_of_its_own():
    """Many queries attend to one pooled token (hourglass transformers); the other attention is rewritten, too."""

    def attend(q, k, v):
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)

    def both(q, k, v):
        x = attend(q, k, v)
        return x + attend(x, k[:, :, :1], v[:, :, :1])

    check(both, *qkv(t=20), sites=2)
