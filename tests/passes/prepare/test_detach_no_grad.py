"""Replace no_grad around a part of the scores by detaches, and leave other no_grad regions alone."""

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


def test_a_frozen_part_of_a_model_stays_without_gradients():
    """Products and layers under no_grad are not detached one by one."""

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
