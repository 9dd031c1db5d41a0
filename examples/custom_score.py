"""Compile attention that library calls cannot express: soft capping, ALiBi slopes and a sliding window at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnfx

HEADS, WIDTH, LENGTH, WINDOW, CAP = 8, 256, 512, 128, 30.0


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        score = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        score = CAP * torch.tanh(score / CAP)
        behind = torch.arange(t)[:, None] - torch.arange(t)[None, :]
        score = score - self.slopes[None, :, None, None] * behind
        score = torch.where((behind >= 0) & (behind < WINDOW), score, float("-inf"))
        return self.out((score.softmax(-1) @ v).transpose(1, 2).reshape(b, t, WIDTH))


def main() -> None:
    torch.manual_seed(0)
    model = Attention()
    x = torch.randn(2, LENGTH, WIDTH)
    report = attnfx.explain(model, rewrite="always")(x)
    print(report)
    for site in report:
        print(site.name, "computes", site.spec)
    compiled = torch.compile(model, backend="attnfx", options={"rewrite": "always"})

    def step(run: nn.Module) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        out = run(x)
        out.square().sum().backward()
        return out.detach(), model.qkv.weight.grad.clone()

    gaps = [(a - b).abs().max() / b.abs().max() for a, b in zip(step(compiled), step(model))]
    print(f"difference from eager: outputs {gaps[0]:.1e}, gradients {gaps[1]:.1e}", end=" ")
    print("(ok)" if max(gaps) < 1e-4 else "(too large)")


if __name__ == "__main__":
    main()
