"""Train a model in eager mode and through attnfx, and print the losses of both and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnfx

Batch = tuple[tuple[Tensor, ...], Tensor]  # the model's inputs, and the target classes


def train(make: Callable[[], nn.Module], batches: Callable[[], Iterator[Batch]], compiled: bool) -> list[float]:
    """Train for a few steps and return the losses. Every run starts from the same weights."""
    torch.manual_seed(0)
    model = make()
    run = torch.compile(model, backend="attnfx", options={"rewrite": "always"}) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for inputs, classes in batches():
        loss = F.cross_entropy(run(*inputs).flatten(0, -2), classes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(make: Callable[[], nn.Module], batches: Callable[[], Iterator[Batch]]) -> None:
    eager, rewritten = train(make, batches, compiled=False), train(make, batches, compiled=True)
    print("step   eager    attnfx")
    for step, (a, b) in enumerate(zip(eager, rewritten)):
        print(f"{step:4} {a:8.5f} {b:8.5f}")
    for report in attnfx.reports():
        print(report)
    gap = max(abs(a - b) for a, b in zip(eager, rewritten))
    print(f"largest difference of the losses: {gap:.1e}", "(ok)" if gap < 1e-3 else "(too large)")
