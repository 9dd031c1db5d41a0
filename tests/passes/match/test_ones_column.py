"""Recognize a column of ones in the values as the sum of the weights, and the division by it as the softmax's."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import assert_right, check, qkv


def weights(q, k):
    s = q @ k.mT * 0.3
    return (s - s.amax(-1, keepdim=True)).exp()


def padded(q, k, v):
    out = weights(q, k) @ F.pad(v, (0, 1), value=1.0)
    return out[..., :-1] / out[..., -1:]


def the_ones_first(q, k, v):
    out = weights(q, k) @ torch.cat([torch.ones_like(v[..., :1]), v], -1)
    return out[..., 1:] / out[..., 0].unsqueeze(-1)


def split(q, k, v):
    out, total = (weights(q, k) @ torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)).split([v.shape[-1], 1], -1)
    return out / total


def for_all_heads(q, k, v):
    out = weights(q, k) @ F.pad(v, (0, 1), value=1.0)[:, :1]
    return out[..., :-1] / out[..., -1:]


ONE = [padded, the_ones_first, split, for_all_heads]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", ONE, ids=[fn.__name__ for fn in ONE])
def test_one_attention(fn, dynamic):
    check(fn, *qkv(), dynamic=dynamic)


def read_as_whole_rows(fn):
    """Check that the column is not read as a divisor: the site lacks a spec and runs as whole rows, as written."""
    (site,) = check(fn, *qkv())
    assert (site.spec, site.decision.kernel) == (None, "rows")


def test_a_column_of_twos_is_none():
    def fn(q, k, v):
        out = weights(q, k) @ F.pad(v, (0, 1), value=2.0)
        return out[..., :-1] / out[..., -1:]

    read_as_whole_rows(fn)


def test_a_product_that_is_read_as_a_whole_stays():
    def fn(q, k, v):
        out = weights(q, k) @ F.pad(v, (0, 1), value=1.0)
        return out[..., :-1] / out[..., -1:], out

    read_as_whole_rows(fn)


def test_a_sum_that_is_changed_in_place():
    def fn(q, k, v):
        out = weights(q, k) @ F.pad(v, (0, 1), value=1.0)
        total = out[..., -1:]
        total.clamp_(min=2.0)
        return out[..., :-1] / total

    assert_right(fn, *qkv())
