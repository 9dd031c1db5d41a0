"""Compute integers and comparisons that depend on float arithmetic exactly as eager does."""

import math

import pytest
import torch

from tests.support import check, compiled, new_reports, qkv, rand

SCALE = 0.3


LOW = torch.finfo(torch.float32).min


INF = float("-inf")


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def t5_bucket(distance, buckets, longest, both):
    found = torch.zeros_like(distance)
    if both:
        buckets //= 2
        found = found + (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = -torch.minimum(distance, torch.zeros_like(distance))
    exact = buckets // 2
    large = exact + (torch.log(distance.float() / exact) / math.log(longest / exact) * (buckets - exact)).long()
    return found + torch.where(distance < exact, distance, torch.minimum(large, torch.full_like(large, buckets - 1)))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(
    ("buckets", "longest"), [(32, 128), (32, 81)]
)  # 81: at distance 36 a merged constant rounds over
def test_the_buckets_of_a_relative_bias_are_exact_for_all_lengths(both, buckets, longest):
    """With q = 0 and unit values the output is the softmax of the bias, so one wrong bucket is visible."""

    def fn(q, k, v, table):
        distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
        bias = table[t5_bucket(distance, buckets, longest, both)].permute(2, 0, 1)[None]
        return (q @ k.mT + bias).softmax(-1) @ v

    table = torch.arange(buckets).float()[:, None] * 0.9
    t = 600
    q, k, v = torch.zeros(1, 1, t, 4), torch.zeros(1, 1, t, 4), torch.eye(t)[None, None]
    with new_reports() as filed:
        got = compiled(fn)(q, k, v, table)
    want = fn(q, k, v, table)
    assert [len(r.rewritten) for r in filed] == [1]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


def test_a_bucket_table_takes_its_gradient():
    def fn(q, k, v, table):
        distance = torch.arange(40)[None, :] - torch.arange(40)[:, None]
        return (q @ k.mT + table[t5_bucket(distance, 32, 128, True)].permute(2, 0, 1)[None]).softmax(-1) @ v

    check(fn, *qkv(), rand(32, 4))


def test_a_comparison_of_computed_floats_decides_as_in_eager():
    def fn(q, k, v):
        i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
        keep = torch.sqrt((i - j).abs().float()) <= 3.0  # sqrt(9) = 3 exactly
        near = torch.log(1.0 + (i - j).abs().float()) * 2.5 < math.log(8.0) * 2.5
        return ((q @ k.mT) * SCALE).masked_fill(~(keep & near), INF).softmax(-1) @ v

    check(fn, *qkv())
