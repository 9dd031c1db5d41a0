"""Attentions written as one function: library calls, loops, caches, windows, segments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.attentions import INF, SCALE, causal, heads, merged, separate
from tests.fuzz.parts import ATTENTIONS, LONGEST, B, Context, D, E, H, named


@named(ATTENTIONS)
def library(c: Context, x: Tensor) -> Tensor:
    return x + merged(F.scaled_dot_product_attention(*separate(c, x)))


@named(ATTENTIONS)
def library_causal(c: Context, x: Tensor) -> Tensor:
    return x + merged(F.scaled_dot_product_attention(*separate(c, x), is_causal=True))


@named(ATTENTIONS)
def library_masked(c: Context, x: Tensor) -> Tensor:
    mask = c.keep[:, None, None] & causal(x @ x.mT)
    return x + merged(F.scaled_dot_product_attention(*separate(c, x), attn_mask=mask))


@named(ATTENTIONS)
def without_heads(c: Context, x: Tensor) -> Tensor:
    return ((x @ c.weight()) @ (x @ c.weight(1)).mT * SCALE).softmax(-1) @ x + x


@named(ATTENTIONS)
def without_dropping(c: Context, x: Tensor) -> Tensor:
    q, k, v = separate(c, x)
    return x + merged(F.dropout((q @ k.mT * SCALE).softmax(-1), 0.0, True) @ v)


@named(ATTENTIONS)
def with_a_sink(c: Context, x: Tensor) -> Tensor:
    q, k, v = separate(c, x)
    s = q @ k.mT * SCALE
    s = torch.cat([s, c.model.bias[:H].view(1, H, 1, 1).expand(s.shape[0], H, s.shape[2], 1)], -1)
    return x + merged(s.softmax(-1)[..., :-1] @ v)


@named(ATTENTIONS)
def queries_in_turn(c: Context, x: Tensor) -> Tensor:
    q, k, v = separate(c, x)
    return x + merged(torch.cat([(part @ k.mT * SCALE).softmax(-1) @ v for part in q.split(4, 2)], 2))


@named(ATTENTIONS)
def queries_written(c: Context, x: Tensor) -> Tensor:
    q, k, v = separate(c, x)
    out = torch.empty_like(q)
    for n in range(0, 8, 4):
        out[:, :, n : n + 4] = (q[:, :, n : n + 4] @ k.mT * SCALE).softmax(-1) @ v
    out[:, :, 8:] = q[:, :, 8:]
    return x + merged(out)


@named(ATTENTIONS)
def batches_in_turn(c: Context, x: Tensor) -> Tensor:
    q, k, v = separate(c, x)
    return x + merged(torch.stack([(q[n] @ k[n].mT * SCALE).softmax(-1) @ v[n] for n in range(B)]))


@named(ATTENTIONS)
def windows_of_two_shapes(c: Context, x: Tensor) -> Tensor:
    def windows(x, wide):
        q = x[:, :8].reshape(-1, 8 // wide, wide, E // 2).reshape(-1, wide, E // 2)
        return ((q * 0.5) @ q.mT).softmax(-1) @ q

    parts = [windows(x[..., : E // 2], 4), windows(x[..., E // 2 :], 2)]
    return x + torch.cat([p.view(-1, 8, E // 2) for p in parts], -1).sum(1, keepdim=True)


@named(ATTENTIONS)
def segments_merged(c: Context, x: Tensor) -> Tensor:
    q, k, v = separate(c, x)
    outs, logs = [], []
    for step in (1, 2):
        s = q[:, :, ::step] @ k[:, :, ::step].mT * SCALE
        out, log = torch.zeros_like(q), q.new_full((*q.shape[:3], 1), -1e8)
        out[:, :, ::step], log[:, :, ::step] = s.softmax(-1) @ v[:, :, ::step], s.logsumexp(-1, keepdim=True)
        outs.append(out)
        logs.append(log)
    w = torch.stack(logs).detach().softmax(0)
    return x + merged((torch.stack(outs) * w).sum(0))


@named(ATTENTIONS)
def one_step_with_a_cache(c: Context, x: Tensor) -> Tensor:
    at = c.ids[0, :1] % LONGEST
    c.model.cache.index_copy_(1, at, (x[:, -1:] @ c.weight()).detach())
    k = heads(c.model.cache)
    s = (heads(x[:, -1:]) @ k.mT * SCALE).masked_fill(torch.arange(LONGEST) > at, -INF)
    return x + merged(s.softmax(-1) @ k)


@named(ATTENTIONS)
def summed_weights(c: Context, x: Tensor) -> Tensor:
    q, k, v = separate(c, x)
    w = (q @ k.mT * SCALE).softmax(-1)
    c.out.append(w.mean(1))
    return x + merged(w @ v)


@named(ATTENTIONS)
def rotated(c: Context, x: Tensor) -> Tensor:
    q, k, v = separate(c, x)
    turn = torch.outer(torch.arange(x.shape[1]).to(x.dtype), torch.tensor([1.0, 0.1], dtype=x.dtype))
    cos, sin = torch.cat([turn, turn], -1).cos(), torch.cat([turn, turn], -1).sin()
    q, k = (t * cos + torch.cat([-t[..., D // 2 :], t[..., : D // 2]], -1) * sin for t in (q, k))
    return x + merged((q @ k.mT * SCALE).masked_fill(~causal(q @ k.mT), -INF).softmax(-1) @ v)
