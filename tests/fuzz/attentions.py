"""Attentions composed of a projection, a product, a mask and a softmax, with edits in between."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.parts import EDITS, Context, D, H

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
    """Return heads whose keys come from a cache that is written in place."""
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


# The first entry of each is the default.
PARTS: dict[str, dict[str, Callable]] = {
    "operands": table(separate, packed, chunked, bare, cross, grouped, expanded, one_head, one_key, remembered),
    "product": table(by_matmul, divided, by_einsum, by_einsum_of_tokens, by_bmm, scaled_in_place, by_sum),
    "mask": table(unmasked, causal_filled, causal_filled_in_place, causal_where, causal_added, causal_indexed,
                  causal_from_buffer, padding_filled, padding_added, padding_added_in_place, biased, documents),
    "softmax": table(by_softmax, in_float, by_hand, by_hand_in_place, less_the_most, by_logsumexp),
    "values": table(weigh, weigh_by_einsum, weigh_by_bmm),
}  # fmt: skip
PLACES = ("query", "key", "value", "scores", "weights", "mixed")  # possible places of an edit


def attend(c: Context, x: Tensor, chosen: dict[str, str]) -> Tensor:
    """Compute an attention from the parts and edits in `chosen`; parts without an entry are the defaults."""

    def part(kind: str) -> Callable:
        return PARTS[kind][chosen.get(kind, next(iter(PARTS[kind])))]

    def edited(t: Tensor, place: str) -> Tensor:
        return EDITS[chosen[place]].call(c, t) if place in chosen else t

    q, k, v = (edited(t, place) for t, place in zip(part("operands")(c, x), PLACES))
    s = edited(part("mask")(c, part("product")(q, k)), "scores")
    w = part("softmax")(s).to(v.dtype)
    w = edited(w * 1.0, "weights") if "weights" in chosen else w  # the softmax's own result is saved
    return x + merged(edited(part("values")(w, v), "mixed")) @ c.weight(3)
