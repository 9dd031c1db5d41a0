"""A small GPT with hand-written attention: a few steps of training in eager mode and through attnfx, and the report."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnfx

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


def train(compiled: bool, steps: int = 5) -> list[float]:
    """The losses of a few steps on text that repeats itself; every run starts from the same weights."""
    torch.manual_seed(0)
    model = GPT()
    run = torch.compile(model, backend="attnfx", options={"rewrite": "always"}) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.randint(LETTERS, (4, 16)).repeat(1, LENGTH // 16 + 1)[:, : LENGTH + 1]
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(run(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    eager, rewritten = train(compiled=False), train(compiled=True)
    print("step   eager    attnfx")
    for step, (a, b) in enumerate(zip(eager, rewritten)):
        print(f"{step:4} {a:8.5f} {b:8.5f}")
    for report in attnfx.reports():
        print(report)
    gap = max(abs(a - b) for a, b in zip(eager, rewritten))
    print(f"largest difference of the losses: {gap:.1e}", "(ok)" if gap < 1e-3 else "(too large)")


if __name__ == "__main__":
    main()
