"""Hand-written attention, in the ways that models write it. Each function takes query, key and value (B, H, T, D).

`pad` is (B, T) of ones and zeros. Programs without padding ignore it; programs that need another tensor take that
instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])


def plain(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax(scores(query, key), -1) @ value


def causal(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    length = query.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.softmax(scores(query, key).masked_fill(future, -math.inf), -1) @ value


def in_window(query: Tensor, key: Tensor, width: int) -> Tensor:
    """Return the mask (T, S) of the keys that a query sees: itself and the `width - 1` before it."""
    i = torch.arange(query.shape[-2])[:, None]
    j = torch.arange(key.shape[-2])[None, :]
    return (j <= i) & (i - j < width)


def window(width: int) -> Program:
    """Create causal attention with a sliding window: the key is at most `width - 1` before the query."""

    def program(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
        return torch.softmax(torch.where(in_window(query, key, width), scores(query, key), -math.inf), -1) @ value

    return program


def plain_upcast(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    """Compute `plain` as the transformers library writes it, which Inductor's own patterns do not match."""
    weight = torch.softmax(torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5, -1, dtype=torch.float32)
    return torch.matmul(weight.to(query.dtype), value)


def padding_upcast(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    """Compute `padding` as the transformers library writes it, with a mask (B, 1, T, S) from `pad`."""
    lowest = torch.finfo(query.dtype).min
    seen = pad[:, None, None, :].bool().expand(-1, 1, query.shape[-2], -1)
    bias = torch.where(seen, torch.tensor(0.0, dtype=query.dtype), lowest)
    weight = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5 + bias
    return torch.matmul(torch.softmax(weight, -1, dtype=torch.float32).to(query.dtype), value)


def padding(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    bias = (1.0 - pad[:, None, None, :].to(query.dtype)) * torch.finfo(query.dtype).min
    return torch.softmax(scores(query, key) + bias, -1) @ value


def hidden(query: Tensor, key: Tensor) -> Tensor:
    """Return the causal mask, True at the later keys that a query must not see."""
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)


def alibi(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    heads, length = query.shape[1:3]
    slope = torch.exp2(-8.0 * torch.arange(1, heads + 1) / heads)[:, None, None]
    at = torch.arange(length)
    score = scores(query, key) + (slope * (at[None, :] - at[:, None])).to(query.dtype)
    return torch.softmax(score.masked_fill(hidden(query, key), -math.inf), -1) @ value


def relative(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """Add a learned bias by clipped distance, from `table` (2 * n + 1, H)."""
    most = table.shape[0] // 2
    distance = torch.arange(key.shape[-2])[None, :] - torch.arange(query.shape[-2])[:, None]
    bias = table[distance.clamp(-most, most) + most].permute(2, 0, 1)
    return torch.softmax(scores(query, key) + bias, -1) @ value


def masked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Add a mask that the caller made, `bias` (1, 1, T, S)."""
    weight = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5 + bias
    return torch.matmul(torch.softmax(weight, -1, dtype=torch.float32).to(query.dtype), value)


def softcap(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    score = torch.tanh(scores(query, key) / 50.0) * 50.0
    return torch.softmax(score.masked_fill(hidden(query, key), -math.inf), -1) @ value


def grouped(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    """Compute causal attention with fewer key heads, which are repeated."""
    batch, groups, length, width = key.shape
    each = query.shape[1] // groups
    key, value = (
        x[:, :, None].expand(batch, groups, each, length, width).reshape(batch, -1, length, width) for x in (key, value)
    )
    return causal(query, key, value, pad)


def decoding(spelling: str, cache: str) -> Program:
    """Create a decode step: new queries (B, H, T, D) against a cache of G key heads.

    A "static" cache has S places, and a mask (B, 1, T, S) that is added to the scores. A "growing" one holds the S - T
    places before the step; its last argument is the new keys and values, (2, B, G, T, D). `spelling` is how a key head
    serves the query heads of its group: "interleave" and "expand" repeat it, "broadcast" views the queries as groups.
    """

    def program(query: Tensor, key: Tensor, value: Tensor, more: Tensor) -> Tensor:
        if cache == "growing":
            key, value = torch.cat([key, more[0]], 2), torch.cat([value, more[1]], 2)
        batch, groups, length, width = key.shape
        each = query.shape[1] // groups
        if each > 1 and spelling == "broadcast":
            query, key, value = query.unflatten(1, (groups, each)), key[:, :, None], value[:, :, None]
        elif each > 1 and spelling == "interleave":
            key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        elif each > 1:
            key, value = (
                x[:, :, None].expand(batch, groups, each, length, width).reshape(batch, -1, length, width)
                for x in (key, value)
            )
        weight = torch.matmul(query, key.mT) * width**-0.5
        if cache == "static":
            weight = weight + (more if query.ndim == 4 else more[:, :, None])
        out = torch.matmul(torch.softmax(weight, -1, dtype=torch.float32).to(query.dtype), value)
        return out if out.ndim == 4 else out.flatten(1, 2)

    return program


def dropout(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    weight = torch.softmax(scores(query, key), -1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weight, 0.1, training=True) @ value


def fused_masked(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    """Call PyTorch's own operator with a causal mask as a tensor."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=~hidden(query, key))


def fused(name: str) -> Program:
    """Return "causal" or "window:WIDTH" as a call of PyTorch's own operator; the window is a mask tensor there."""

    def program(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
        if name == "causal":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        seen = in_window(query, key, int(name.partition(":")[2]))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)

    return program


NAMED = (
    plain, plain_upcast, causal, padding, padding_upcast, alibi, relative, masked, softcap, grouped, dropout,
    fused_masked,
)  # fmt: skip


def make(name: str, length: int) -> Program:
    """Return a program by its function's name. "window:N" has the width N, "window" an eighth of the length.
    "decoding:SPELLING:CACHE" is a decode step."""
    if name.startswith("decoding"):
        _, spelling, cache = name.split(":")
        return decoding(spelling, cache)
    if name.startswith("window"):
        _, _, width = name.partition(":")
        return window(int(width) if width else max(32, length // 8))
    return next(f for f in NAMED if f.__name__ == name)
