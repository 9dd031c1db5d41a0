"""Match attention whose operands are written in place before they are read; keep it if they change later."""

import torch
from torch import nn

from tests.support import assert_kept, check, qkv, rand


class Layers(nn.Module):
    """Each layer masks the same input in place before it reads it."""

    def __init__(self):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))

    def forward(self, x, keep, bias):
        for project in self.projections:
            q, k, v = project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            bias.masked_fill_(~(keep[:, :, None] & keep[:, None]), 0.5)
            x = x + ((q @ k.mT + bias[:, None]).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x, bias


def test_an_input_that_each_layer_writes_before_it_reads():
    check(Layers(), rand(2, 12, 16), rand(2, 12) > 0, rand(2, 12, 12), sites=3, train=False)


def test_an_input_that_is_written_between_its_use_and_the_product_is_kept():
    def fn(q, k, v, bias):
        s = q @ k.mT + bias
        bias.mul_(2.0)
        return s.softmax(-1) @ v

    assert_kept(fn, *qkv(), rand(40, 40), code="mutated", train=False)


def test_a_write_through_another_view_counts():
    def fn(q, k, v, bias):
        s = q @ k.mT + bias[:, :40]
        bias[:20].zero_()
        return s.softmax(-1) @ v

    assert_kept(fn, *qkv(), torch.ones(40, 44), code="mutated", train=False)
