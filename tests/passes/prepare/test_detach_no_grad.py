"""Replace no_grad around a part of the scores by detaches, and leave other no_grad regions alone."""

import pytest
import torch
from torch import nn

from tests.support import assert_right, check, compiled, qkv, rand


def decayed(s):
    with torch.no_grad():
        near = s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, -1e9).softmax(-1)
        left = (near.sum(-1, keepdim=True) - near.cumsum(-1)).clamp(min=0).sqrt()
    return s * (-left).exp()


def test_a_decay_of_the_scores_without_gradients():
    check(lambda q, k, v: decayed(q @ k.mT * 0.3).softmax(-1) @ v, *qkv())


def test_a_parameter_that_is_read_without_gradients():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(rand(4, 1, 1))

        def forward(self, q, k, v):
            with torch.no_grad():
                scale = self.temperature.exp()
            return (q @ k.mT * scale + self.temperature).softmax(-1) @ v

    check(Model(), *qkv())


def scores(q, k, v):
    with torch.no_grad():
        s = q @ k.mT * 0.3
    return s.softmax(-1) @ v


def weights(q, k, v):
    with torch.no_grad():
        w = (q @ k.mT * 0.3).softmax(-1)
    return w @ v + q + k


def another_product(q, k, v):
    with torch.no_grad():
        bias = k @ q.mT
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def product_and_weighted_sum_in_two_regions(q, k, v):
    with torch.no_grad():
        s = q @ k.mT * 0.3
        with torch.enable_grad():
            out = s.softmax(-1) @ v
    return out


def mask_of_products(q, k, v):
    with torch.no_grad():
        keep = (q @ k.mT > 0) | torch.eye(q.shape[2], dtype=torch.bool)
    return (q @ k.mT * 0.3).masked_fill(~keep, float("-inf")).softmax(-1) @ v


FORMS = [scores, weights, another_product, product_and_weighted_sum_in_two_regions, mask_of_products]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", FORMS)
def test_products_without_gradients(fn, dynamic):
    check(fn, *qkv(), dynamic=dynamic)


@pytest.mark.parametrize("fn", [scores, weights])
def test_operands_of_a_product_without_gradients_have_none(fn):
    q, k, v = (x.requires_grad_() for x in qkv())
    want = torch.autograd.grad(fn(q, k, v).sum(), (q, k, v), allow_unused=True)
    got = torch.autograd.grad(compiled(fn)(q, k, v).sum(), (q, k, v), allow_unused=True)
    assert [g is None for g in got] == [g is None for g in want]


def test_a_layer_without_gradients_before_the_scores():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.temperature = nn.Linear(8, 8), nn.Parameter(rand(1))

        def forward(self, q, k, v):
            with torch.no_grad():
                s = self.layer(q) @ k.mT * self.temperature
            return (s * self.temperature).softmax(-1) @ self.layer(v)

    check(Model(), *qkv())


def test_a_frozen_part_of_a_model_stays_without_gradients():
    """An attention under no_grad is rewritten where it is."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, q, k, v):
            with torch.no_grad():
                frozen = (self.layer(q) @ k.mT).softmax(-1) @ v
            return frozen + (q @ k.mT).softmax(-1) @ v

    assert_right(Model(), *qkv())


def test_a_write_under_no_grad_stays():
    def fn(q, k, v):
        with torch.no_grad():
            v.mul_(0.5)
            scale = q.detach().amax(-1, keepdim=True).exp()
        return (q @ k.mT * scale).softmax(-1) @ v, v

    assert_right(fn, *qkv(), train=False)


def test_results_of_the_region_have_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv())

    def fn(q, k, v):
        s = q @ k.mT
        with torch.no_grad():
            peak = s.softmax(-1).amax(-1)
        return s.softmax(-1) @ v, peak

    assert [x.requires_grad for x in compiled(fn)(q, k, v)] == [True, False]


SAME = {
    "contiguous": lambda s: s.contiguous(),
    "to": lambda s: s.to(s.dtype),
    "flatten": lambda s: s.flatten(3),
    "dropout": lambda s: torch.dropout(s, 0.5, False),
    "view": lambda s: s.transpose(-1, -2).transpose(-1, -2),
}


@pytest.mark.parametrize("op", SAME.values(), ids=SAME)
def test_an_operator_that_returns_its_operand_keeps_the_gradient(op):
    """Under no_grad, s.contiguous() of a contiguous s is s itself, and s has a gradient."""

    def fn(q, k, v):
        s = q @ k.mT
        with torch.no_grad():
            same = op(s)
            peak = same.amax(-1, keepdim=True)
        return (same - peak).softmax(-1) @ v

    assert_right(fn, *qkv(), inner="eager")


def test_gradients_do_not_pass_the_region_after_a_rotation_by_complex_numbers():
    turn = torch.polar(torch.ones(40, 4), torch.arange(40)[:, None] * torch.arange(1, 5) * 0.1)

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def fn(q, k, v):
        s = rotated(q) @ rotated(k).mT
        with torch.no_grad():
            w = s.softmax(-1)
        return w @ v

    q, k, v = (x.requires_grad_() for x in qkv())
    compiled(fn)(q, k, v).sum().backward()
    assert q.grad is None and k.grad is None and v.grad is not None


def with_a_bias(q, k, v, b):
    with torch.no_grad():
        b = b.contiguous()
    return (q @ k.mT + b).softmax(-1) @ v


def with_keys(q, k, v, b):
    with torch.no_grad():
        k, b = k.to(k.dtype), b.flatten()
    return (q @ k.mT * b[0]).softmax(-1) @ v


@pytest.mark.parametrize("fn", [with_a_bias, with_keys])
def test_operands_that_pass_a_region_unchanged_keep_their_gradients(fn):
    assert_right(fn, *qkv(), rand(40, 40), inner="eager")
