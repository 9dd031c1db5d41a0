"""Add up the results of chunks of rows: weights that are normalized over the queries, and sums of weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import assert_right, check, rand

SLOTS, TOKENS, D = 5, 50, 8


def inputs():
    return rand(2, SLOTS, D), rand(2, TOKENS, D), rand(2, TOKENS, D)


def scores(slots, k):
    return slots @ k.mT * 0.4


def over_queries(q, k, v):
    return scores(q, k).softmax(1) @ v


def shares_with_a_constant(q, k, v):
    w = torch.einsum("bid,bjd->bij", q, k).softmax(dim=1) + 1e-8
    return torch.einsum("bjd,bij->bid", v, w / w.sum(dim=-1, keepdim=True))


def shares_with_keys_first(q, k, v):
    w = (k @ q.mT).softmax(-1)
    w = w / (w.sum(1, keepdim=True) + 1e-8)
    return w.mT @ v


def shares_after_the_product(q, k, v):
    w = scores(q, k).softmax(-2)
    return torch.einsum("bij,bjd->bid", w, v) / torch.einsum("bij->bi", w)[..., None]


def shares_by_a_norm(q, k, v):
    return F.normalize(scores(q, k).softmax(1), p=1, dim=-1) @ v


def shares_of_masked_weights(q, k, v):
    s = scores(q, k).masked_fill(torch.arange(TOKENS) > 40, -1e9).softmax(1) * (torch.arange(TOKENS) <= 40)
    return (s / s.sum(-1, keepdim=True)) @ v


def weights_transposed(q, k, v):
    return scores(k, q).softmax(-1).mT @ v


def by_hand(q, k, v):
    w = scores(q, k).exp()
    return (w / w.sum(1, keepdim=True)) @ v


def heads_and_queries_compete(q, k, v):
    w = scores(q.unflatten(-1, (2, -1)).transpose(1, 2), k.unflatten(-1, (2, -1)).transpose(1, 2))
    w = w.flatten(1, 2).softmax(1).view(2, 2, SLOTS, TOKENS)
    return (w / w.sum(-1, keepdim=True)) @ v.unflatten(-1, (2, -1)).transpose(1, 2)


FORMS = [
    over_queries, shares_with_a_constant, shares_with_keys_first, shares_after_the_product, shares_by_a_norm,
    shares_of_masked_weights, weights_transposed, by_hand, heads_and_queries_compete,
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", FORMS)
def test_weights_normalized_over_the_queries(fn, dynamic):
    check(fn, *inputs(), dynamic=dynamic)


@pytest.mark.parametrize("fn", [shares_with_a_constant, shares_with_keys_first])
def test_as_many_queries_as_keys(fn):
    check(fn, *(rand(2, 36, D) for _ in range(3)))


def test_as_many_queries_as_numbers_of_a_value():
    check(shares_with_a_constant, rand(2, D, D), *(rand(2, TOKENS, D) for _ in range(2)))


def test_a_total_that_is_used_again():
    """The chunks know only their part of the total."""

    def fn(q, k, v):
        s = scores(q, k)
        w = torch.where(s < s.topk(4, -1).values[..., -1:], -9.0, s).softmax(-1)
        return w @ v, w / w.sum(-2, keepdim=True)

    check(fn, *inputs())


@pytest.mark.parametrize("fn", [shares_with_a_constant, shares_with_keys_first, weights_transposed])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(fn, dtype):
    check(fn, *(x.to(dtype) for x in inputs()))


def test_shares_in_place():
    def fn(q, k, v):
        w = scores(q, k).softmax(1)
        w /= w.sum(-1, keepdim=True)
        return w @ v

    check(fn, *inputs(), train=False)


def test_no_weights_are_stored(shapes_left):
    check(shares_with_a_constant, *inputs())
    assert shapes_left and (2, SLOTS, TOKENS) not in shapes_left


def test_slots_that_are_refined():
    class SlotAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
            self.cell, self.norm = nn.GRUCell(D, D), nn.LayerNorm(D)

        def forward(self, x, slots):
            k, v = self.k(x), self.v(x)
            for _ in range(2):
                update = shares_with_a_constant(self.q(self.norm(slots)), k, v)
                slots = self.cell(update.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            return slots

    check(SlotAttention(), rand(2, TOKENS, D), rand(2, SLOTS, D), sites=2)


def test_sums_of_weights_over_the_queries_beside_rows():
    def fn(q, k, v):
        s = scores(q, k)
        w = torch.where(s < s.topk(4, -1).values[..., -1:], -9.0, s).softmax(-1)
        return w @ v, w.sum(-2), w.mT @ q

    check(fn, *inputs(), sites=2)


# -- sums that mix rows -----------------------------------------------------------------------------
def divided_by_the_sum_of_each_key(q, k, v):
    w = scores(q, k).softmax(-1)
    return (w / w.sum(1, keepdim=True)) @ v


def both_ways_twice(q, k, v):
    w = scores(q, k).softmax(1)
    w = w / w.sum(-1, keepdim=True)
    return (w / w.sum(1, keepdim=True)) @ v


def mean_of_the_weights_before_the_product(q, k, v):
    w = scores(q, k).softmax(1)
    return (w - w.mean(-1, keepdim=True)) @ v


def divided_by_the_largest(q, k, v):
    w = scores(q, k).softmax(1)
    return (w / w.amax(-1, keepdim=True)) @ v


def summed_up_over_keys(q, k, v):
    return scores(q, k).softmax(1).cumsum(-1) @ v


def over_everything(q, k, v):
    s = scores(q, k)
    return s.flatten(1).softmax(-1).view_as(s) @ v


@pytest.mark.parametrize(
    "fn",
    [divided_by_the_sum_of_each_key, both_ways_twice, mean_of_the_weights_before_the_product, divided_by_the_largest,
     summed_up_over_keys, over_everything],
)  # fmt: skip
@pytest.mark.parametrize("count", [SLOTS, TOKENS])
def test_sums_that_mix_rows_stay_right(fn, count):
    assert_right(fn, rand(2, count, D), rand(2, TOKENS, D), rand(2, TOKENS, D))


def test_half_precision_divides_first():
    """The sum of the weights before their division may exceed the largest number of float16."""

    def fn(q, k, v):
        w = scores(q, k).softmax(1)
        return (w / w.sum(-1, keepdim=True)) @ v

    x = rand(1, 2, 8).half(), rand(1, 4000, 8).half(), torch.full((1, 4000, 4), 60.0).half()
    assert_right(fn, *x, train=False, exact=False, tolerance=5e-3)
