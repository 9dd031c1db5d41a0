"""Run scores other than products of queries and keys in chunks of rows: additive, by distance, of a graph's nodes."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import check, new_reports, qkv, rand

INF = float("inf")


def pairs(q, k):
    return q[:, :, :, None], k[:, :, None]


SCORES = {
    "additive": lambda q, k, w: torch.tanh(sum(pairs(q, k))) @ w,
    "additive, by a layer": lambda q, k, w: F.linear(torch.tanh(sum(pairs(q, k))), w[None]).squeeze(-1),
    "of two numbers": lambda q, k, w: F.leaky_relu((q @ w)[..., None] + (k @ w)[..., None, :], 0.2),
    "squared distance": lambda q, k, w: -(pairs(q, k)[0] - pairs(q, k)[1]).square().sum(-1),
    "distance": lambda q, k, w: -torch.cdist(q, k),
    "city-block distance": lambda q, k, w: -torch.cdist(q, k, p=1),
    "by a layer with a learned slope": lambda q, k, w: F.prelu(sum(pairs(q, k)), w[:1]) @ w,
    "product over several layers": lambda q, k, w: (torch.tanh(pairs(q, k)[0] * pairs(q, k)[1]) * w).sum(-1),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_scores_without_a_product(scores, dynamic):
    (site,) = check(lambda q, k, v, w: scores(q, k, w).softmax(-1) @ v, *qkv(), rand(8), dynamic=dynamic)
    assert site.decision.tier == "chunked"


@pytest.mark.parametrize("fill", [-INF, -1e9])
def test_their_mask_is_a_tensor(fill):
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[1, -5:] = False

    def fn(q, k, v, w):
        s = SCORES["additive"](q, k, w).masked_fill(~keep[:, None, None], fill)
        return s.softmax(-1) @ v

    q, k, v = rand(2, 3, 24, 8), rand(2, 3, 20, 8), rand(2, 3, 20, 8)
    check(fn, q, k, v, rand(8))


def test_keys_that_stand_first_in_the_scores():
    def fn(q, k, v, w):
        s = torch.tanh(k[:, :, :, None] + q[:, :, None]) @ w  # keys, queries
        return s.softmax(-2).mT @ v

    check(fn, *qkv(), rand(8))


def test_heads_last_and_weights_that_leave():
    def fn(h, a, b):
        e = F.leaky_relu((h * a).sum(-1)[:, :, None] + (h * b).sum(-1)[:, None], 0.2)
        weights = e.softmax(2)
        return torch.einsum("bijh,bjhd->bihd", weights, h), weights.mean(-1)

    check(fn, rand(2, 24, 3, 8), rand(3, 8), rand(3, 8))


def test_scores_of_positions_alone_are_left_alone():
    def fn(x, v):
        at = torch.arange(24.0)
        return (-(at[:, None] - at).abs()).softmax(-1) @ v + x.sum()

    check(fn, rand(3), rand(2, 3, 24, 8), sites=0, exact=False)


def test_linear_attention_is_none():
    def fn(q, k, v):
        angle = torch.outer(torch.arange(24.0), torch.arange(8.0))
        k = (k * angle.cos()).softmax(-2)
        return q.softmax(-1) @ (k.mT @ v)

    with new_reports() as reports:
        check(fn, *(rand(2, 3, 24, 8) for _ in range(3)), sites=0)
    assert not any(r.rewritten for r in reports)


def test_rows_that_are_normalized_together_are_refused():
    def fn(q, k, v, w):
        s = SCORES["additive"](q, k, w)
        return (s - s.mean((-1, -2), keepdim=True)).softmax(-1) @ v

    check(fn, *qkv(), rand(8), sites=0)


# -- keys of each row's own, and matrices without a batch ------------------------------------------
def of_edges(q, k, v, e):
    return torch.einsum("bid,bijd->bij", q, k[:, None] + e).softmax(-1) @ v


def of_three_operands(q, k, v, e):
    return torch.einsum("bid,bjd,bijd->bij", q, k, e).softmax(-1) @ v


def of_edges_in_values_too(q, k, v, e):
    s = torch.einsum("bid,bijd->bij", q, k[:, None] + e) * 0.3
    return torch.einsum("bij,bijd->bid", s.softmax(-1), v[:, None] + e)


def summed(q, k, v, e):
    s = (q.unsqueeze(2) * (k.unsqueeze(1) + e)).sum(-1).masked_fill(torch.ones(36, 36).triu(1) > 0, -INF)
    return (s.softmax(-1).unsqueeze(-1) * (v.unsqueeze(1) + e)).sum(dim=-2)


def summed_products(q, k, v, e):
    return ((q[:, :, None] * k[:, None] * e).sum(-1, keepdim=True).squeeze(-1) * 0.3).softmax(-1) @ v


def summed_values(q, k, v, e):
    return ((q @ k.mT).softmax(-1)[..., None] * (v[:, None] * e)).sum(2)


def weights_for_each_channel(q, k, v, e):
    return ((q[:, :, None] - k[:, None] + e).softmax(2) * (v[:, None] + e)).sum(2)


EDGES = [of_edges, of_edges_in_values_too, of_three_operands, summed, summed_products, summed_values,
         weights_for_each_channel]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", EDGES)
def test_keys_with_edges_are_computed_row_by_row(fn, dynamic, shapes_left):
    check(fn, *(rand(2, 36, 8) for _ in range(3)), rand(2, 36, 36, 8), dynamic=dynamic)
    assert dynamic or shapes_left.count((2, 36, 36, 8)) == 1  # the edges alone


def test_queries_along_the_keys_of_edges():
    def fn(q, k, v, e):
        w = (q[:, None] * (k[:, None] + e)).sum(-1).softmax(-1)
        return (w[..., None] * (v[:, :, None] + e)).sum(2)

    check(fn, *(rand(2, 12, 8) for _ in range(3)), rand(2, 12, 12, 8))


def test_sums_of_squares_stay_as_they_are():
    """They belong to distances, and are the product of one tensor with itself."""

    def fn(q, k, v):
        norms = (q * q).sum(-1)[..., None], (k * k).sum(-1)[:, :, None]
        return (2 * q @ k.mT - sum(norms)).softmax(-1) @ v

    (site,) = check(fn, *qkv())
    assert "dot" in str(site.spec)


def test_scores_of_a_graph_without_a_batch():
    def fn(h, left, right, adjacent):
        e = F.leaky_relu(h @ left + (h @ right).T)
        return torch.where(adjacent > 0, e, -9e15).softmax(1) @ h

    check(fn, rand(21, 8), rand(8, 1), rand(8, 1), rand(21, 21))
