"""Train a small GPT with hand-written attention for a few steps, in eager mode and through attnfx."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Batch, compare

WIDTH, HEADS, LENGTH, LETTERS = 128, 4, 256, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(x).split(WIDTH, dim=2))
        weight = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        weight = weight.masked_fill(torch.tril(torch.ones(t, t)) == 0, float("-inf"))
        weight = F.softmax(weight, dim=-1)
        return self.out((weight @ v).transpose(1, 2).reshape(b, t, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.before(x))
        return x + self.mlp(self.after(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS))

    def forward(self, text: Tensor) -> Tensor:
        x = self.letter(text) + self.place(torch.arange(text.shape[1]))
        return self.head(self.blocks(x))


def batches() -> Iterator[Batch]:
    """Yield batches of repetitive text."""
    text = torch.randint(LETTERS, (4, 16)).repeat(1, LENGTH // 16 + 1)[:, : LENGTH + 1]
    for _ in range(5):
        yield (text[:, :-1],), text[:, 1:]


if __name__ == "__main__":
    compare(GPT, batches)
