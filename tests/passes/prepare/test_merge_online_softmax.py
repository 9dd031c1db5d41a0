"""Merge a hand-written online softmax over chunks of keys into one attention over all keys."""

import pytest
import torch

from tests.support import check, qkv

INF = float("inf")
STEP = 8


def scores(q, k):
    return q @ k.mT * 0.3


def chunks(*xs):
    return zip(*(x.split(STEP, 2) for x in xs))


def running(q, k, v, mask=None):
    out, total = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    top = torch.full_like(total, -INF)
    for n, (kc, vc) in enumerate(chunks(k, v)):
        s = scores(q, kc) if mask is None else mask(scores(q, kc), n * STEP)
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        p, c = torch.exp(s - new), torch.exp(top - new)
        out, total, top = out * c + p @ vc, total * c + p.sum(-1, keepdim=True), new
    return out / total


def the_first_chunk_outside(q, k, v):
    (kc, vc), *rest = chunks(k, v)
    s = scores(q, kc)
    top = s.amax(-1)
    p = (s - top[..., None]).exp()
    out, total = p @ vc, p.sum(-1)
    for kc, vc in rest:
        s = scores(q, kc)
        new = torch.maximum(top, s.amax(-1))
        p, c = (s - new[..., None]).exp(), (top - new).exp()
        out, total, top = out * c[..., None] + torch.einsum("bhij,bhjd->bhid", p, vc), total * c + p.sum(-1), new
    return out / total.unsqueeze(-1)


def divided_at_each_step(q, k, v):
    """Combine the chunks as algorithm 1 of Dao et al. 2022 (arXiv:2205.14135)."""
    out, total = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    top = torch.full_like(total, -1e30)
    for kc, vc in chunks(k, v):
        s = scores(q, kc)
        here = s.amax(-1, keepdim=True)
        p = (s - here).exp()
        new = torch.maximum(top, here)
        a, b = (top - new).exp(), (here - new).exp()
        grown = a * total + b * p.sum(-1, keepdim=True)
        out, total, top = (total * a * out + b * (p @ vc)) / grown, grown, new
    return out


def combined_at_the_end(q, k, v):
    """Combine the chunks as Rabe and Staats 2021 (arXiv:2112.05682)."""
    parts = []
    for kc, vc in chunks(k, v):
        s = scores(q, kc)
        top = s.amax(-1, keepdim=True).detach()
        e = (s - top).exp()
        parts.append((e @ vc, e.sum(-1, keepdim=True), top))
    values, totals, tops = (torch.stack(x) for x in zip(*parts))
    w = (tops - tops.amax(0)).exp()
    return (values * w).sum(0) / (totals * w).sum(0)


def divided_by_its_logarithm(q, k, v):
    """Scale the weights by exp(-log(sum)) at the end."""
    parts = [((s := scores(q, kc)).exp() @ vc, s.exp().sum(-1, keepdim=True)) for kc, vc in chunks(k, v)]
    return sum(out for out, _ in parts) * torch.exp(-sum(total for _, total in parts).log())


def in_both_loops(q, k, v):
    return torch.cat([running(x, k, v) for x in q.split(20, 2)], 2)


def weights_cast(q, k, v):
    """Keep the statistics in float32, but compute the products in the values' dtype."""
    out, total = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(q[..., :1], dtype=torch.float32)
    top = torch.full_like(total, -INF)
    for kc, vc in chunks(k, v):
        s = scores(q, kc).float()
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        p, c = torch.exp(s - new), torch.exp(top - new)
        out, total, top = out * c + (p.to(vc.dtype) @ vc).float(), total * c + p.sum(-1, keepdim=True), new
    return (out / total).to(q.dtype)


def causal(s, start, fill=-INF):
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(start, start + s.shape[-1])
    return s.masked_fill(j > i, fill)


ONE = [running, the_first_chunk_outside, divided_at_each_step, combined_at_the_end,
       divided_by_its_logarithm, in_both_loops]  # fmt: skip


@pytest.mark.parametrize("fn", ONE, ids=[fn.__name__ for fn in ONE])
def test_one_attention(fn):
    check(fn, *qkv())


@pytest.mark.parametrize("fn", [running, weights_cast], ids=["as they are", "cast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype, fn):
    check(fn, *(x.to(dtype) for x in qkv()), exact=fn is running)


def test_values_that_lie_otherwise_in_one_chunk_are_not_joined():
    def fn(q, k, v):
        a, b = scores(q, k[:, :, :8]).exp(), scores(q, k[:, :, 8:]).exp()
        out = torch.einsum("bhij,bhjd->bhid", a, v[:, :, :8]) + torch.einsum("bhij,bhdj->bhid", b, v[:, :, 8:].mT)
        return out / (a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True))

    assert {s.decision.kernel for s in check(fn, *qkv(), sites=2)} == {"rows"}


@pytest.mark.parametrize("fill", [-INF, -1e9])
def test_causal(fill):
    check(lambda q, k, v: running(q, k, v, lambda s, start: causal(s, start, fill)), *qkv())


def each_chunk_by_itself(fn, *args, **how):
    """Check that five chunks of eight keys stay separate sites of whole rows."""
    sites = check(fn, *args, sites=40 // STEP, **how)
    assert [(s.spec, s.decision.kernel, s.dims["S"]) for s in sites] == [(None, "rows", STEP)] * len(sites)


def test_a_row_whose_first_chunk_is_dead_stays_nan():
    def fn(q, k, v):
        return running(q, k, v, lambda s, start: s.masked_fill(torch.arange(start, start + STEP) < STEP, -INF))

    q, k, v = qkv()
    assert fn(q, k, v).isnan().all()
    each_chunk_by_itself(fn, q, k, v, train=False)


def test_a_given_mask_is_not_trusted():
    def fn(q, k, v, mask):
        return running(q, k, v, lambda s, start: s + mask[:, start : start + STEP])

    mask = torch.zeros(40, 40).index_fill(0, torch.tensor([3]), -INF)
    each_chunk_by_itself(fn, *qkv(), mask, train=False)


def test_a_step_that_is_wrong_stays_wrong():
    def fn(q, k, v):
        out, total = torch.zeros_like(q), torch.zeros_like(q[..., :1])
        for kc, vc in chunks(k, v):
            s = scores(q, kc)
            p = (s - s.amax(-1, keepdim=True)).exp()  # each chunk's own maximum, never rescaled to a common one
            out, total = out + p @ vc, total + p.sum(-1, keepdim=True)
        return out / total

    each_chunk_by_itself(fn, *qkv())
