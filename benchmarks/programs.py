"""Attention written by hand, in the spellings that models use. Each takes query, key, value of (B, H, T, D).

`pad` is (B, T) of ones and zeros; the programs that have no padding leave it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])


def plain(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax(scores(query, key), -1) @ value


def causal(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    length = query.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.softmax(scores(query, key).masked_fill(future, -math.inf), -1) @ value


def window(width: int) -> Program:
    """Causal, and the key at most `width - 1` behind the query."""

    def program(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
        i = torch.arange(query.shape[-2])[:, None]
        j = torch.arange(key.shape[-2])[None, :]
        seen = (j <= i) & (i - j < width)
        return torch.softmax(torch.where(seen, scores(query, key), -math.inf), -1) @ value

    return program


def plain_upcast(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    """As the transformers library writes it: `plain` again, but Inductor's own patterns do not know it."""
    weight = torch.softmax(torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5, -1, dtype=torch.float32)
    return torch.matmul(weight.to(query.dtype), value)


def padding_upcast(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    """As the transformers library writes it, its mask (B, 1, T, S) made of `pad`."""
    lowest = torch.finfo(query.dtype).min
    seen = pad[:, None, None, :].bool().expand(-1, 1, query.shape[-2], -1)
    bias = torch.where(seen, torch.tensor(0.0, dtype=query.dtype), lowest)
    weight = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5 + bias
    return torch.matmul(torch.softmax(weight, -1, dtype=torch.float32).to(query.dtype), value)


def padding(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    bias = (1.0 - pad[:, None, None, :].to(query.dtype)) * torch.finfo(query.dtype).min
    return torch.softmax(scores(query, key) + bias, -1) @ value


def make(name: str, length: int) -> Program:
    """A program by name, that of its function; window takes its width after a colon, else an eighth of the length."""
    if name.startswith("window"):
        _, _, width = name.partition(":")
        return window(int(width) if width else max(32, length // 8))
    return next(f for f in (plain, plain_upcast, causal, padding, padding_upcast) if f.__name__ == name)
