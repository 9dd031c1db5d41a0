"""Keep attention whose scores are written through a view, and never read them as the pure product."""

import pytest
import torch

from tests.support import assert_right, check, qkv, rand

T = 8
AT = torch.arange(T)
WRITES = {
    "view": lambda s: s.view(8, T, T).mul_(3.0),
    "transpose": lambda s: s.transpose(0, 1).mul_(3.0),
    "diagonal": lambda s: s.diagonal(dim1=-2, dim2=-1).fill_(3.0),
    "flattened diagonal": lambda s: s.view(8, T, T).__setitem__((slice(None), AT, AT), 3.0),
    "new dimension": lambda s: s.unsqueeze(2)[:, :, 0].fill_(3.0),
    "rows of a view": lambda s: s.view(8, T, T)[:, 0].fill_(3.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("train", [False, True])
def test_a_write_through_any_view_counts(write, train):
    def fn(q, k, v):
        s = q @ k.mT
        write(s)
        return s.softmax(-1) @ v

    assert_right(fn, *qkv(t=T), train=train)


@pytest.mark.parametrize("write", [lambda m, x: m.diagonal().copy_(x), lambda m, x: m.mT.add_(x[:, None])])
def test_learned_values_that_are_written_into_a_bias_have_a_gradient(write):
    def fn(q, k, v, x):
        bias = torch.zeros(T, T)
        write(bias, x)
        return (q @ k.mT + bias).softmax(-1) @ v

    assert_right(fn, *qkv(t=T), rand(T))


def test_a_write_through_data_counts():
    def fn(q, k, v):
        q = q * 1.0
        q.data.mul_(2.0)
        return (q @ k.mT).softmax(-1) @ v

    assert_right(fn, *qkv(t=T), train=False)


def test_scores_that_nobody_writes_are_rewritten():
    check(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *qkv(t=T))
