"""Merge a loop over chunks of queries into one attention if that is proved correct, else keep its chunks separate."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import check, compare, compiled, new_reports, qkv

T = 50


def chunk(q, k, v, keep=None, fill=float("-inf")):
    s = (q @ k.mT) * 0.25
    return (s if keep is None else s.masked_fill(~keep, fill)).softmax(-1) @ v


def joined_by_cat(q, k, v):
    return torch.cat([chunk(q[:, :, n : n + 16], k, v) for n in range(0, T, 16)], dim=2)


def written_into_place(q, k, v):
    keep, out = torch.ones(T, T, dtype=torch.bool).tril(), torch.empty_like(q)
    for n in range(0, T, 16):
        out[:, :, n : n + 16] = chunk(q[:, :, n : n + 16], k, v, keep[n : n + 16])
    return out


def written_from_the_end(q, k, v):
    out = torch.empty_like(q)
    out[:, :, :-20] = chunk(q[:, :, :-20], k, v)
    out[:, :, -20:] = chunk(q[:, :, -20:], k, v)
    return out


def offsets_by_hand(q, k, v):
    out = []
    for part, n in zip(q.split(16, dim=2), range(0, T, 16)):
        i = torch.arange(part.shape[2]) + n
        out.append(chunk(part, k, v, i[:, None] >= torch.arange(T)).transpose(1, 2).flatten(2))
    return torch.cat(out, dim=1)


def a_last_chunk_of_one_row(q, k, v):
    keep = torch.ones(T, T, dtype=torch.bool).tril()
    return torch.cat([chunk(a, k, v, m) for a, m in zip(q.split(T - 1, 2), keep.split(T - 1, 0))], dim=2)


def a_window_that_the_first_rows_do_not_show(q, k, v):
    i = torch.arange(T)[:, None]
    keep = (i >= torch.arange(T)) & (i - torch.arange(T) < 16)
    return torch.cat([chunk(q[:, :, n : n + 16], k, v, keep[n : n + 16]) for n in range(0, T, 16)], dim=-2)


def keys_up_to_the_chunks_last_row(q, k, v, fill=float("-inf")):
    out = []
    for n in range(0, T, 16):
        end = min(n + 16, T)
        keep = torch.arange(n, end)[:, None] >= torch.arange(end)
        out.append(chunk(q[:, :, n:end], k[:, :, :end], v[:, :, :end], keep, fill))
    return torch.cat(out, dim=2)


def projected_one_by_one(q, k, v):
    weight = torch.linspace(-1, 1, 32 * 12).view(12, 32).to(q)
    parts = [chunk(x, k, v).transpose(1, 2).reshape(2, -1, 32) for x in q.chunk(3, dim=2)]
    return torch.cat([F.linear(x, weight).relu() for x in parts], dim=1)


def pytorchs_own_operator(q, k, v):
    keep = torch.ones(T, T, dtype=torch.bool).tril()
    parts = zip(q.chunk(3, 2), keep.chunk(3, 0))
    return torch.cat([F.scaled_dot_product_attention(a, k, v, attn_mask=m) for a, m in parts], dim=2)


ONE = [joined_by_cat, written_into_place, written_from_the_end, offsets_by_hand, a_last_chunk_of_one_row,
       a_window_that_the_first_rows_do_not_show, keys_up_to_the_chunks_last_row, projected_one_by_one,
       pytorchs_own_operator]  # fmt: skip


@pytest.mark.parametrize("fn", ONE, ids=[fn.__name__ for fn in ONE])
def test_chunks_of_one_attention_are_one_site(fn):
    (site,) = check(fn, *qkv(t=T))
    assert site.dims["T"] == site.dims["S"] == T
    assert "chunks of queries" in site.notes[-1]


def test_a_bias_is_read_in_chunks_and_has_its_gradient():
    def fn(q, k, v, bias):
        parts = zip(q.split(20, 2), bias.split(20, 1))
        return torch.cat([((a @ k.mT) * 0.25 + b).softmax(-1) @ v for a, b in parts], dim=2)

    (site,) = check(fn, *qkv(t=T), torch.randn(4, T, T))
    assert site.dims["T"] == T


def test_dropout_in_chunks_drops_at_its_rate():
    def fn(q, k, v):
        return torch.cat([F.dropout((x @ k.mT).softmax(-1), 0.25) @ v for x in q.split(25, 2)], dim=2)

    q, k, _ = qkv(t=T, d=8)
    with new_reports() as filed:
        sums = compiled(fn)(q, k, torch.ones(2, 4, T, 8))
    assert len(filed[-1].sites) == 1
    assert 0.9 < sums.mean().item() < 1.1 and sums.std().item() > 0.01


def overlapping(q, k, v):
    return torch.cat([chunk(q[:, :, n : n + 25], k, v) for n in (0, 24)], dim=2)


def with_a_gap(q, k, v):
    out = torch.zeros_like(q)
    for n in (0, 30):
        out[:, :, n : n + 20] = chunk(q[:, :, n : n + 20], k, v)
    return out


def in_another_order(q, k, v):
    return torch.cat([chunk(q[:, :, n : n + 25], k, v) for n in (25, 0)], dim=2)


def of_another_scale(q, k, v):
    return torch.cat([chunk(q[:, :, n : n + 25] * (1.0 + n), k, v) for n in (0, 25)], dim=2)


def of_fewer_keys_and_no_mask(q, k, v):
    return torch.cat([chunk(q[:, :, n : n + 25], k[:, :, : n + 25], v[:, :, : n + 25]) for n in (0, 25)], dim=2)


def of_fewer_keys_and_a_finite_fill(q, k, v):
    return keys_up_to_the_chunks_last_row(q, k, v, fill=-1e30)


def of_other_values(q, k, v):
    return torch.cat([chunk(q[:, :, :25], k, v), chunk(q[:, :, 25:], k, v.flip(1))], dim=2)


def read_outside_too(q, k, v):
    first, second = (chunk(x, k, v) for x in q.split(25, 2))
    return torch.cat([first, second], dim=2), first.sum()


APART = [overlapping, with_a_gap, in_another_order, of_another_scale, of_fewer_keys_and_no_mask,
         of_fewer_keys_and_a_finite_fill, of_other_values, read_outside_too]  # fmt: skip


@pytest.mark.parametrize("fn", APART, ids=[fn.__name__ for fn in APART])
def test_what_is_not_proved_to_be_one_stays_apart(fn):
    sites = check(fn, *qkv(t=T), sites=4 if fn is of_fewer_keys_and_a_finite_fill else 2, train=fn is not with_a_gap)
    assert all(site.dims["T"] < T for site in sites)


def test_keys_that_change_between_the_chunks_are_read_as_they_were():
    def fn(q, k, v):
        first = chunk(q[:, :, :25], k, v)
        k.mul_(1.5)
        return torch.cat([first, chunk(q[:, :, 25:], k, v)], dim=2)

    sites = check(fn, *qkv(t=T), train=False, sites=2)
    assert [site.dims["T"] for site in sites] == [25, 25]


def test_a_part_that_is_written_in_chunks_can_be_read_too():
    """The reader of an intermediate view sees the chunks that were written, not the empty tensor."""

    def fn(q, k, v):
        out, total = torch.empty_like(q), 0.0
        for b in range(2):
            part = out[b]
            for n in range(0, T, 16):
                part[:, n : n + 16] = chunk(q[b, :, n : n + 16], k[b], v[b])
            total = total + part.sum(-1)
        return out, total

    compare(fn, *qkv(t=T), train=False)
