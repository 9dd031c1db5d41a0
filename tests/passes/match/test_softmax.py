"""Recognize softmaxes written with exponentials, in ways that the respelling tests do not cover."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support import check, qkv, rand


def of_two(q, k, v):
    s = (q @ k.mT) * (0.3 * math.log2(math.e))
    p = torch.exp2(s - s.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True) @ v


def of_the_negative(q, k, v):
    return F.softmin((q @ k.mT) * -0.3, dim=-1) @ v


@pytest.mark.parametrize("fn", [of_two, of_the_negative], ids=lambda fn: fn.__name__)
def test_other_exponentials_are_a_softmax(fn):
    (site,) = check(fn, *qkv())
    assert site.spec is not None and site.spec.normaliser == "softmax"


def test_a_small_number_beside_the_sum_is_computed_row_by_row():
    """It is added to exponentials of scores minus their maximum, so it is not a constant logit."""

    def fn(q, k, v):
        s = (q @ k.mT) * 0.3
        e = (s - s.amax(-1, keepdim=True)).exp() * (torch.arange(s.shape[-1]) % 3 > 0)
        return e / (e.sum(-1, keepdim=True) + 1e-2) @ v

    (site,) = check(fn, *qkv())
    assert site.spec is None and site.decision.tier == "chunked"


def test_a_number_beside_the_sum_stays_if_the_subtraction_was_rounded():
    def fn(q, k, v):
        s = ((q @ k.mT) * 0.3).half()
        e = (s - s.amax(-1, keepdim=True)).to(v.dtype).exp()
        return e / (e.sum(-1, keepdim=True) + 1) @ v

    (site,) = check(fn, *qkv(), train=False)
    assert site.spec is None and site.decision.tier == "chunked"


def of_a_polynomial(s):
    a = 1 + s + s**2 / 2
    return a / a.sum(-1, keepdim=True)


def of_squares(s):
    return F.normalize(s.square(), p=1, dim=-1)


def of_what_is_masked(s):
    a = (F.elu(s) + 1).masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), 0)
    return a / (a.sum(-1, keepdim=True) + 1e-6)


def of_detached_lengths(s):
    return s / s.detach().abs().sum(-1, keepdim=True).clamp(max=5e4)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("shares", [of_a_polynomial, of_squares, of_what_is_masked, of_detached_lengths])
def test_shares_of_any_function_are_computed_row_by_row(shares, dynamic):
    def fn(q, k, v):
        return shares(q @ k.mT * 0.3) @ v

    assert check(fn, *qkv(), dynamic=dynamic)[0].decision.tier == "chunked"


def test_rows_over_their_length_are_no_shares():
    def fn(q, k, v):
        x = (q @ k.mT * 0.3).softmax(-1) @ v
        return (x / x.norm(dim=-1, keepdim=True)) @ k.mT, (x / x.square().sum(-1, keepdim=True).sqrt()) @ k.mT

    check(fn, *qkv())


@pytest.mark.parametrize("factor", [-1.0, torch.tensor(-0.7), torch.linspace(-1, 1, 40)[:, None]])
def test_an_added_fill_that_wins_keeps_the_gradient_of_what_it_swallows(factor):
    """Times -1, the fill is the largest score: its keys have all weights, and the sum passes their gradient on."""

    def fn(q, k, v):
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        s = (q @ k.mT + (j > i) * torch.finfo(torch.float32).min) * factor
        return s.softmax(-1) @ v, s.clamp_min(-9.0)

    def filled_too(q, k, v):
        i, j, low = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]), torch.finfo(torch.float32).min
        s = (q @ k.mT + (j > i) * low).masked_fill(j == 3, low) * factor
        return s.softmax(-1) @ v

    check(fn, *qkv())
    check(lambda *operands: fn(*operands)[0], *qkv())
    check(filled_too, *qkv())


@pytest.mark.parametrize("rows", [1, 40])
def test_values_of_width_one_are_fused(rows):
    """A dimension of size 1 is read at index zero, which leaves no variable for the width."""
    (site,) = check(lambda q, k, v: (q[:, :, :rows] @ k.mT).softmax(-1) @ v[..., :1], *qkv())
    assert site.spec is not None and site.dims["Dv"] == 1


@pytest.mark.parametrize("depth", [2, 3, 30])
def test_the_gradients_are_right_where_the_scores_are_the_values_too(depth):
    """The values are a step on the way from the weights to queries and keys: these must get their gradient as well."""

    def fn(q, k, v):
        s = q @ k.mT
        for _ in range(depth):
            s = s.softmax(-1) @ s
        return s.softmax(-1) @ v

    check(fn, *qkv(t=8), sites=depth + 1)


def test_a_learned_slope_is_part_of_the_score():
    (site,) = check(lambda q, k, v, slope: F.prelu(q @ k.mT, slope).softmax(-1) @ v, *qkv(), rand(4))
    assert site.spec is not None
