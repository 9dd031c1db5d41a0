"""Fuse weights that are a function of each score without normalization, unless they form a linear layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import check, compiled, new_reports, qkv, rand

FUNCTIONS = {
    "relu": lambda s: F.relu(s) / 20,
    "squared relu": lambda s: s.relu().square() / 20,
    "gelu": F.gelu,
    "gelu by tanh": lambda s: F.gelu(s, approximate="tanh"),
    "silu": F.silu,
    "softplus": lambda s: F.softplus(s) / 20,
    "normal distribution": lambda s: 0.5 * (1 + torch.erf((s - 0.7) * 2.5)),
}


def keep(s):
    return torch.ones(s.shape[-2:], dtype=torch.bool).tril()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_weights_are_a_function_of_each_score(function):
    check(lambda q, k, v: function((q @ k.mT) * 0.3) @ v, *qkv())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_their_mask_is_a_product(function):
    def fn(q, k, v):
        s = (q @ k.mT) * 0.3
        return (function(s) * keep(s)) @ v

    check(fn, *qkv())


@pytest.mark.parametrize("fill", [float("-inf"), -1e9])
def test_their_mask_is_a_fill(fill):
    def fn(q, k, v):
        s = (q @ k.mT) * 0.3
        return F.relu(s.masked_fill(~keep(s), fill)).square() @ v

    check(fn, *qkv())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_scores_pass_through_a_gate_before_the_softmax(approximate):
    check(lambda q, k, v: F.silu(F.gelu(q @ k.mT, approximate=approximate)).softmax(-1) @ v, *qkv())


def test_infinite_scores_give_what_eager_gives():
    def fn(q, k, v):
        return F.silu((q @ k.mT) * 1e30 * 1e10) @ v

    q, k, v = qkv()
    torch.testing.assert_close(compiled(fn)(q, k, v), fn(q, k, v), equal_nan=True)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(rand(3, 8, 32)), nn.Parameter(rand(3, 32, 8))

    def forward(self, x):
        return F.gelu(torch.bmm(x, self.up)) @ self.down


def test_linear_layers_of_experts_are_no_attention():
    with new_reports() as reports:
        check(Experts(), rand(3, 24, 8), sites=0)
    assert not any(r.sites for r in reports)


def test_a_plain_product_of_three_is_no_attention():
    check(lambda q, k, v: ((q @ k.mT) * 0.3) @ v, *qkv(), sites=0)
