"""Merge a loop over heads or batch elements into one attention if that is proved correct, else keep steps separate."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support import check, compiled, new_reports, qkv, rand

B, H, T, D = 2, 4, 40, 8


def attend(q, k, v):
    return ((q @ k.mT) * 0.3).softmax(-1) @ v


def stacked(q, k, v):
    return torch.stack([attend(q[:, h], k[:, h], v[:, h]) for h in range(H)], dim=1)


def side_by_side(q, k, v):
    return torch.cat([attend(q[:, h], k[:, h], v[:, h]) for h in range(H)], dim=-1)


def one_head_at_a_time(q, k, v):
    return torch.cat([attend(*x) for x in zip(q.split(1, 1), k.split(1, 1), v.split(1, 1))], dim=1)


def two_heads_at_a_time(q, k, v):
    return torch.cat([attend(*x) for x in zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1))], dim=1)


def one_batch_element_at_a_time(q, k, v):
    return torch.stack([attend(*x) for x in zip(q.unbind(0), k.unbind(0), v.unbind(0))])


def heads_in_batch_elements(q, k, v):
    return torch.stack([torch.stack([attend(q[b, h], k[b, h], v[b, h]) for h in range(H)]) for b in range(B)])


def chunks_in_heads(q, k, v):
    parts = [torch.cat([attend(x, k[:, h], v[:, h]) for x in q[:, h].split(16, 1)], dim=1) for h in range(H)]
    return torch.stack(parts, dim=1)


def heads_in_chunks(q, k, v):
    parts = [torch.stack([attend(x[:, h], k[:, h], v[:, h]) for h in range(H)], dim=1) for x in q.split(16, 2)]
    return torch.cat(parts, dim=2)


def written_into_place(q, k, v):
    out = q.new_zeros(B, T, H, D)
    for h in range(H):
        out[:, :, h] = attend(q[:, h], k[:, h], v[:, h])
    return out.flatten(2)


def written_in_two_loops(q, k, v):
    out = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            out[b, h] = attend(q[b, h], k[b, h], v[b, h])
    return out


def written_in_chunks_of_heads(q, k, v):
    out = torch.empty_like(q)
    for n in range(0, T, 16):
        for h in range(H):
            out[:, h, n : n + 16] = attend(q[:, h, n : n + 16], k[:, h], v[:, h])
    return out


def checkpointed(q, k, v):
    parts = [checkpoint(attend, q[:, h], k[:, h], v[:, h], use_reentrant=False) for h in range(H)]
    return torch.stack(parts, dim=1)


def causal(q, k, v):
    keep = torch.ones(T, T, dtype=torch.bool).tril()
    steps = zip(q.unbind(1), k.unbind(1), v.unbind(1))
    return torch.stack([(q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v for q, k, v in steps], dim=2)


def blocks_of_their_own_keys(q, k, v):
    return torch.cat([attend(*x) for x in zip(q.chunk(2, 2), k.chunk(2, 2), v.chunk(2, 2))], dim=2)


def a_mask_that_does_not_move_on(q, k, v):
    keep = torch.arange(T // 2)[:, None] >= torch.arange(T)
    parts = [((x @ k.mT) * 0.3).masked_fill(~keep, float("-inf")).softmax(-1) @ v for x in q.chunk(2, 2)]
    return torch.cat(parts, dim=2)


ONE = [stacked, side_by_side, one_head_at_a_time, two_heads_at_a_time, one_batch_element_at_a_time,
       heads_in_batch_elements, chunks_in_heads, heads_in_chunks, written_into_place, written_in_two_loops,
       written_in_chunks_of_heads, checkpointed, causal, blocks_of_their_own_keys,
       a_mask_that_does_not_move_on]  # fmt: skip


@pytest.mark.parametrize("fn", ONE, ids=[fn.__name__ for fn in ONE])
def test_steps_of_one_attention_are_one_site(fn):
    (site,) = check(fn, *qkv(t=T))
    assert "steps of a loop over heads or batch elements" in site.notes[-1]
    assert site.sizes["B"] * site.sizes["H"] * site.sizes["T"] == B * H * T


@pytest.mark.parametrize("fn", [stacked, side_by_side, heads_in_batch_elements], ids=lambda fn: fn.__name__)
def test_with_symbolic_sizes(fn):
    check(fn, *qkv(t=T), dynamic=True)


def test_grouped_heads_read_their_keys_once():
    def fn(q, k, v):
        return torch.stack([attend(q[:, h], k[:, h // 2], v[:, h // 2]) for h in range(H)], dim=1)

    (site,) = check(fn, *qkv(t=T, g=2))
    assert (site.dims["G"], site.dims["H"]) == (2, 4)


def test_what_each_head_has_of_its_own_is_read_along_the_heads():
    def fn(q, k, v, slopes, bias, keep):
        distance = torch.arange(T) - torch.arange(T)[:, None]
        parts = []
        for h in range(H):
            scores = (q[:, h] @ k[:, h].mT) * 0.3 + slopes[h] * distance + bias[h]
            parts.append(scores.masked_fill(~keep[:, None], -1e30).softmax(-1) @ v[:, h])
        return torch.stack(parts, dim=1)

    keep = torch.rand(B, T) > 0.3
    (site,) = check(fn, *qkv(t=T), rand(H), rand(H, T, T), keep)
    assert site.dims["H"] == H and len(site.spec.captures) == 3


def test_one_matrix_of_a_batch_is_an_attention():
    def fn(q, k, v):
        return attend(q[0, 1] * 0.5, k[0, 1], v[0, 1])

    (site,) = check(fn, *qkv(t=T))
    assert (site.sizes["B"], site.sizes["H"]) == (1, 1)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, D, bias=False) for _ in range(3))

    def forward(self, x, keep):
        scores = self.query(x) @ self.key(x).mT * D**-0.5
        return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ self.value(x)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.out = nn.ModuleList(Head() for _ in range(H)), nn.Linear(32, 32)

    def forward(self, x):
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.out(torch.cat([head(x, keep) for head in self.heads], dim=-1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_heads_with_projections_of_their_own_are_stacked(dynamic):
    (site,) = check(Heads(), rand(B, T, 32), dynamic=dynamic)
    assert site.mask == "causal"


def test_dropout_in_each_head_drops_at_its_rate():
    def fn(q, k, v):
        steps = zip(q.unbind(1), k.unbind(1), v.unbind(1))
        return torch.stack([F.dropout((q @ k.mT).softmax(-1), 0.25) @ v for q, k, v in steps], dim=1)

    q, k, _ = qkv(t=T)
    with new_reports() as filed:
        out = compiled(fn)(q, k, torch.ones(B, H, T, D))
    assert len(filed[-1].sites) == 1
    assert 0.9 < out.mean().item() < 1.1 and not torch.equal(out[:, 0], out[:, 1])


def backwards(q, k, v):
    return torch.stack([attend(q[:, h], k[:, h], v[:, h]) for h in reversed(range(H))], dim=1)


def of_no_order(q, k, v):
    return torch.stack([attend(q[:, h], k[:, n], v[:, h]) for h, n in enumerate((1, 0, 2, 3))], dim=1)


def of_scales_of_their_own(q, k, v):
    return torch.stack([attend(q[:, h] * (h + 1.0), k[:, h], v[:, h]) for h in range(H)], dim=1)


def one_without_a_mask(q, k, v):
    keep = torch.ones(T, T, dtype=torch.bool).tril()
    scores = [(q[:, h] @ k[:, h].mT) * 0.3 for h in range(H)]
    scores = [s.masked_fill(~keep, float("-inf")) if h else s for h, s in enumerate(scores)]
    return torch.stack([s.softmax(-1) @ v[:, h] for h, s in enumerate(scores)], dim=1)


def one_without_a_gradient(q, k, v):
    parts = []
    for h in range(H):
        with torch.set_grad_enabled(h > 0):
            parts.append(attend(q[:, h], k[:, h], v[:, h]))
    return torch.stack(parts, dim=1)


APART = [backwards, of_no_order, of_scales_of_their_own, one_without_a_mask, one_without_a_gradient]


@pytest.mark.parametrize("fn", APART, ids=[fn.__name__ for fn in APART])
def test_what_is_not_proved_to_be_one_stays_apart(fn):
    check(fn, *qkv(t=T), sites=H)


def test_keys_that_change_between_the_steps_are_read_as_they_were():
    def fn(q, k, v):
        first = attend(q[:, 0], k[:, 0], v[:, 0])
        k.mul_(1.5)
        return torch.stack([first, attend(q[:, 1], k[:, 1], v[:, 1])], dim=1)

    for site in check(fn, *qkv(t=T, h=2), train=False, sites=2):
        assert not any("joined" in note for note in site.notes)


def places_written_twice(q, k, v):
    out = torch.zeros_like(q)
    for h in (0, 1, 2, 3, 2):
        out[:, h] = attend(q[:, h] * (1.0 + h), k[:, h], v[:, h])
    return out


def places_left_out(q, k, v):
    out = torch.zeros_like(q)
    for h in range(H - 1):
        out[:, h] = attend(q[:, h], k[:, h], v[:, h])
    return out


def places_read_in_between(q, k, v):
    out = torch.zeros_like(q)
    for h in range(H):
        out[:, h] = attend(q[:, h] + out.sum(1), k[:, h], v[:, h])
    return out


WRITES = {places_written_twice: 5, places_left_out: H - 1, places_read_in_between: H}


@pytest.mark.parametrize(("fn", "steps"), WRITES.items(), ids=[fn.__name__ for fn in WRITES])
def test_writes_that_are_not_one_result_stay_as_they_are(fn, steps):
    for site in check(fn, *qkv(t=T), sites=steps, train=False):
        assert site.sizes["H"] == 1 and not any("joined" in note for note in site.notes)
