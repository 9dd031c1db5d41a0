"""Attentions: a projection, a product, a mask and a softmax put together, with edits in between; some are whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.parts import ATTENTIONS, EDITS, LONGEST, B, Context, D, E, H, named, neighbor

INF = math.inf
LOW = torch.finfo(torch.float32).min
SCALE = D**-0.5
Heads = tuple[Tensor, Tensor, Tensor]  # each (B, H, T, D)


def heads(x: Tensor, h: int = H) -> Tensor:
    return x.view(x.shape[0], x.shape[1], h, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def causal(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2], s.shape[-1], dtype=torch.bool).tril()


# -- query, key and value ---------------------------------------------------------------------------
def separate(c: Context, x: Tensor) -> Heads:
    return heads(x @ c.weight()), heads(x @ c.weight(1)), heads(x @ c.weight(2))


def packed(c: Context, x: Tensor) -> Heads:
    return c.model.packed(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


def chunked(c: Context, x: Tensor) -> Heads:
    q, k, v = (heads(t) for t in c.model.packed(x).chunk(3, -1))
    return q, k, v


def bare(c: Context, x: Tensor) -> Heads:
    return heads(x * 1.0), heads(x * 0.5), heads(x + 0.0)


def cross(c: Context, x: Tensor) -> Heads:
    return heads(x @ c.weight()), heads(c.y @ c.weight(1)), heads(c.y @ c.weight(2))


def grouped(c: Context, x: Tensor) -> Heads:
    k, v = (heads(x @ c.weight(n)[:, :D], 1).repeat_interleave(H, dim=1) for n in (1, 2))
    return heads(x @ c.weight()), k, v


def expanded(c: Context, x: Tensor) -> Heads:
    k, v = (heads(x @ c.weight(n)[:, :D], 1).expand(-1, H, -1, -1) for n in (1, 2))
    return heads(x @ c.weight()), k, v


def one_head(c: Context, x: Tensor) -> Heads:
    return heads(x @ c.weight(), 1), heads(x @ c.weight(1), 1), heads(x @ c.weight(2), 1)


def one_key(c: Context, x: Tensor) -> Heads:
    return heads(x @ c.weight()), heads(c.y[:, :1] @ c.weight(1)), heads(c.y[:, :1] @ c.weight(2))


def remembered(c: Context, x: Tensor) -> Heads:
    """Keys of a cache that is written in place."""
    c.model.cache[:, : x.shape[1]] = (x @ c.weight(1)).detach()
    past = c.model.cache[:, : x.shape[1]]
    return heads(x @ c.weight()), heads(past), heads(x @ c.weight(2))


# -- scores ------------------------------------------------------------------------------------------
def by_matmul(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * SCALE


def divided(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)


def by_einsum(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q * SCALE, k)


def by_einsum_of_tokens(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), k.transpose(1, 2)) * SCALE


def by_bmm(q: Tensor, k: Tensor) -> Tensor:
    flat = torch.bmm(q.reshape(-1, q.shape[2], D), k.reshape(-1, k.shape[2], k.shape[3]).transpose(1, 2))
    return flat.view(q.shape[0], q.shape[1], q.shape[2], k.shape[2]) * SCALE


def scaled_in_place(q: Tensor, k: Tensor) -> Tensor:
    s = q @ k.mT
    s *= SCALE
    return s


def by_sum(q: Tensor, k: Tensor) -> Tensor:
    return (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) * SCALE


# -- masks and biases ----------------------------------------------------------------------------------
def unmasked(c: Context, s: Tensor) -> Tensor:
    return s


def causal_filled(c: Context, s: Tensor) -> Tensor:
    return s.masked_fill(~causal(s), -INF)


def causal_filled_in_place(c: Context, s: Tensor) -> Tensor:
    s.masked_fill_(~causal(s), -INF)
    return s


def causal_where(c: Context, s: Tensor) -> Tensor:
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None]
    return torch.where(j <= i, s, LOW)


def causal_added(c: Context, s: Tensor) -> Tensor:
    return s + torch.triu(torch.full((s.shape[-2], s.shape[-1]), LOW), 1)


def causal_indexed(c: Context, s: Tensor) -> Tensor:
    s[:, :, ~causal(s)] = -INF
    return s


def causal_from_buffer(c: Context, s: Tensor) -> Tensor:
    return torch.where(c.model.triangle[:, :, : s.shape[-2], : s.shape[-1]], s, torch.tensor(-INF, dtype=s.dtype))


def padding_filled(c: Context, s: Tensor) -> Tensor:
    return s.masked_fill(~c.keep[:, None, None, : s.shape[-1]], LOW)


def padding_added(c: Context, s: Tensor) -> Tensor:
    return s + (1.0 - c.keep[:, None, None, : s.shape[-1]].to(s.dtype)) * -10000.0


def padding_added_in_place(c: Context, s: Tensor) -> Tensor:
    s += torch.zeros(c.keep.shape).masked_fill_(~c.keep, -1e9)[:, None, None, : s.shape[-1]]
    return s


def biased(c: Context, s: Tensor) -> Tensor:
    i, j = torch.arange(s.shape[-2]), torch.arange(s.shape[-1])
    return s + c.model.table[(i[:, None] - j).abs().clamp(max=7)].permute(2, 0, 1)[: s.shape[1]]


def documents(c: Context, s: Tensor) -> Tensor:
    i, j = (c.ids[:, : s.shape[n]] // 4 for n in (-2, -1))
    return s.masked_fill(i[:, None, :, None] != j[:, None, None, :], LOW)


# -- softmax -------------------------------------------------------------------------------------------
def by_softmax(s: Tensor) -> Tensor:
    return s.softmax(-1)


def in_float(s: Tensor) -> Tensor:
    return F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype)


def by_hand(s: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def by_hand_in_place(s: Tensor) -> Tensor:
    e = (s - s.max(-1, keepdim=True).values).exp().clone()
    return e.div_(e.sum(-1, keepdim=True))


def less_the_most(s: Tensor) -> Tensor:
    return F.softmax(s - s.max(-1, keepdim=True)[0], -1)


def by_logsumexp(s: Tensor) -> Tensor:
    return (s - s.logsumexp(-1, keepdim=True)).exp()


# -- values ----------------------------------------------------------------------------------------------
def weigh(w: Tensor, v: Tensor) -> Tensor:
    return w @ v


def weigh_by_einsum(w: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", w, v)


def weigh_by_bmm(w: Tensor, v: Tensor) -> Tensor:
    flat = torch.bmm(w.reshape(-1, w.shape[2], w.shape[3]), v.reshape(-1, v.shape[2], v.shape[3]))
    return flat.view(w.shape[0], w.shape[1], w.shape[2], v.shape[3])


def table(*parts: Callable) -> dict[str, Callable]:
    return {p.__name__: p for p in parts}


# The first of each is the plain one.
PARTS: dict[str, dict[str, Callable]] = {
    "operands": table(separate, packed, chunked, bare, cross, grouped, expanded, one_head, one_key, remembered),
    "product": table(by_matmul, divided, by_einsum, by_einsum_of_tokens, by_bmm, scaled_in_place, by_sum),
    "mask": table(unmasked, causal_filled, causal_filled_in_place, causal_where, causal_added, causal_indexed,
                  causal_from_buffer, padding_filled, padding_added, padding_added_in_place, biased, documents),
    "softmax": table(by_softmax, in_float, by_hand, by_hand_in_place, less_the_most, by_logsumexp),
    "values": table(weigh, weigh_by_einsum, weigh_by_bmm),
}  # fmt: skip
PLACES = ("query", "key", "value", "scores", "weights", "mixed")  # where an edit may stand


def attend(c: Context, x: Tensor, chosen: dict[str, str]) -> Tensor:
    """An attention of the parts `chosen`, with edits at the places `chosen`; what is not named is plain."""

    def part(kind: str) -> Callable:
        return PARTS[kind][chosen.get(kind, next(iter(PARTS[kind])))]

    def edited(t: Tensor, place: str) -> Tensor:
        return EDITS[chosen[place]].call(c, t) if place in chosen else t

    q, k, v = (edited(t, place) for t, place in zip(part("operands")(c, x), PLACES))
    s = edited(part("mask")(c, part("product")(q, k)), "scores")
    w = part("softmax")(s).to(v.dtype)
    w = edited(w * 1.0, "weights") if "weights" in chosen else w  # what the softmax gave is saved
    return x + merged(edited(part("values")(w, v), "mixed")) @ c.weight(3)


# -- attentions written as one ------------------------------------------------------------------------------
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


# -- edits inside of an attention -----------------------------------------------------------------------------
@neighbor(EDITS)
def part_added_to(c: Context, t: Tensor) -> Tensor:
    t[:, :, 1:] += 0.25
    return t


@neighbor(EDITS)
def columns_scaled(c: Context, t: Tensor) -> Tensor:
    t[..., : t.shape[-1] // 2] *= 0.5
    return t


@neighbor(EDITS)
def every_other_row(c: Context, t: Tensor) -> Tensor:
    t[:, :, ::2] -= 0.5
    return t


@neighbor(EDITS)
def column_set(c: Context, t: Tensor) -> Tensor:
    t[..., -1] = 0.125
    return t


@neighbor(EDITS)
def row_copied(c: Context, t: Tensor) -> Tensor:
    t[:, :, 0].copy_(t[:, :, 1].clone())
    return t


@neighbor(EDITS)
def added_to(c: Context, t: Tensor) -> Tensor:
    t.add_(c.model.scale[0]).mul_(0.75)
    return t


@neighbor(EDITS)
def view_read_later(c: Context, t: Tensor) -> Tensor:
    first = t[..., :1]
    t[:, :, 2:] += 1
    return t + first * 0.1


@neighbor(EDITS)
def copied_and_changed(c: Context, t: Tensor) -> Tensor:
    made = t.clone()
    made[:, 0].mul_(0.5)
    return made


@neighbor(EDITS)
def half_detached(c: Context, t: Tensor) -> Tensor:
    return t * 0.5 + t.detach() * 0.5


@neighbor(EDITS)
def without_gradient(c: Context, t: Tensor) -> Tensor:
    with torch.no_grad():
        shift = t.mean() * 0.1
        shift += 0.25
    return t + shift


@neighbor(EDITS)
def noisy(c: Context, t: Tensor) -> Tensor:
    return t + torch.rand(t.shape[-1]).to(t.dtype)


@neighbor(EDITS)
def summed_beside(c: Context, t: Tensor) -> Tensor:
    c.out.append(t.sum(-1))
    return t


@neighbor(EDITS)
def part_returned(c: Context, t: Tensor) -> Tensor:
    c.out.append(t[:, 0])
    return t


@neighbor(EDITS)
def hooked_inside(c: Context, t: Tensor) -> Tensor:
    made = t * 1.0
    if made.requires_grad:
        made.register_hook(lambda g: g * 0.5)
    return made


@neighbor(EDITS, sharp=True)
def bounded(c: Context, t: Tensor) -> Tensor:
    return t.clamp_(-3, 3)


@neighbor(EDITS)
def unread_inside(c: Context, t: Tensor) -> Tensor:
    made = t * 2
    made.zero_()
    made[..., 0].fill_(1.0)
    return t


@neighbor(EDITS, coarse=True)
def rounded(c: Context, t: Tensor) -> Tensor:
    return t.bfloat16().to(t.dtype)
