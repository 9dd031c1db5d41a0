"""The attention programs of the GPU benchmark, as hand-written code and as flex_attention's functions of one score.

These functions also define the reference, which evaluates them in float64 on some rows of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW, CAP, BUCKETS = 1024, 50.0, 32
Tensors = dict[str, Tensor]


def nothing(batch: int, heads: int, length: int) -> Tensors:
    return {}


def slopes(batch: int, heads: int, length: int) -> Tensors:
    return {"slopes": 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)}


def documents(batch: int, heads: int, length: int) -> Tensors:
    """Assign the tokens of each sequence to eight documents of unequal length."""
    ends = torch.tensor([0.05, 0.11, 0.25, 0.31, 0.5, 0.72, 0.9]).mul(length).long()
    return {"doc": torch.bucketize(torch.arange(length), ends, right=True).expand(batch, length).contiguous()}


def padding(batch: int, heads: int, length: int) -> Tensors:
    return {"keep": (torch.arange(length) < length * 3 // 4).expand(batch, length).contiguous()}


def table(batch: int, heads: int, length: int) -> Tensors:
    return {"table": torch.randn(BUCKETS, heads)}


def bucket(distance: Tensor) -> Tensor:
    """Return T5's bucket of j - i, for an encoder."""
    half = BUCKETS // 2
    size = distance.abs()
    large = half // 2 + (torch.log(size.clamp(min=1).float() / (half // 2)) / math.log(16) * (half // 2)).long()
    return (distance > 0).long() * half + torch.where(size < half // 2, size, large.clamp(max=half - 1))


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    return i, torch.arange(k.shape[2], device=q.device)[None, :]


Change = Callable[[Tensor, Tensor, Tensor, Tensor, Tensors], Tensor]  # (score, head, i, j, tensors) -> score
Keep = Callable[[Tensor, Tensor, Tensor, Tensors], Tensor]  # (batch, i, j, tensors) -> bool


@dataclass(frozen=True)
class Program:
    """An attention program.

    score    changes one score, or None
    keep     the mask of one score, or None
    make     creates the program's tensors from (batch, heads, length)
    fused    further arguments of PyTorch's own operator; None if it cannot express the program
    groups   query heads per key head
    """

    name: str
    score: Change | None = None
    keep: Keep | None = None
    make: Callable[[int, int, int], Tensors] = nothing
    fused: dict[str, bool] | None = None
    groups: int = 1

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor, x: Tensors) -> Tensor:
        """Compute the attention as models do: the whole matrix, index tensors, `where` with the lowest value."""
        n = q.shape[1] // k.shape[1]
        if n > 1:
            k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        i, j = places(q, k)
        if self.name == "alibi":
            scores = scores + x["slopes"].to(q.dtype)[:, None, None] * (j - i)
        elif self.name == "soft cap":
            scores = CAP * torch.tanh(scores / CAP)
        elif self.name == "t5 bias":
            scores = scores + x["table"].to(q.dtype)[bucket(j - i)].permute(2, 0, 1).unsqueeze(0)
        keep = self._kept(i, j, x)
        if keep is not None:
            scores = torch.where(keep, scores, torch.finfo(q.dtype).min)
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)

    def _kept(self, i: Tensor, j: Tensor, x: Tensors) -> Tensor | None:
        if self.keep is None:
            return None
        if self.name == "padding":
            return x["keep"][:, None, None, :]
        if self.name == "documents":
            return (x["doc"][:, None, :, None] == x["doc"][:, None, None, :]) & (j <= i)
        return (j <= i) & (i - j < WINDOW) if self.name == "window" else j <= i


def causal(b: Tensor, i: Tensor, j: Tensor, x: Tensors) -> Tensor:
    return j <= i


def window(b: Tensor, i: Tensor, j: Tensor, x: Tensors) -> Tensor:
    return (j <= i) & (i - j < WINDOW)


def same_document(b: Tensor, i: Tensor, j: Tensor, x: Tensors) -> Tensor:
    return (x["doc"][b, i] == x["doc"][b, j]) & (j <= i)


def unpadded(b: Tensor, i: Tensor, j: Tensor, x: Tensors) -> Tensor:
    return x["keep"][b, j]


def alibi(s: Tensor, h: Tensor, i: Tensor, j: Tensor, x: Tensors) -> Tensor:
    return s + x["slopes"][h] * (j - i)


def soft_cap(s: Tensor, h: Tensor, i: Tensor, j: Tensor, x: Tensors) -> Tensor:
    return CAP * torch.tanh(s / CAP)


def t5(s: Tensor, h: Tensor, i: Tensor, j: Tensor, x: Tensors) -> Tensor:
    return s + x["table"][bucket(j - i), h]


PROGRAMS = [
    Program("full", fused={}),
    Program("causal", keep=causal, fused={"is_causal": True}),
    Program("window", keep=window),
    Program("alibi", alibi, causal, slopes),
    Program("soft cap", soft_cap, causal),
    Program("documents", keep=same_document, make=documents),
    Program("padding", keep=unpadded, make=padding),
    Program("t5 bias", t5, make=table),
    Program("grouped 8:1", keep=causal, fused={"is_causal": True, "enable_gqa": True}, groups=8),
]
DECODE = Program("decode", fused={"enable_gqa": True}, groups=4)


def reference(program: Program, q: Tensor, k: Tensor, v: Tensor, x: Tensors, rows: Tensor) -> Tensor:
    """Compute the output at some rows of the last batch and head, (rows, D), in float64. Differentiable."""
    b = torch.tensor(q.shape[0] - 1, device=q.device)
    h = torch.tensor(q.shape[1] - 1, device=q.device)
    query, key, value = q[-1, -1, rows].double(), k[-1, -1].double(), v[-1, -1].double()
    i, j = rows[:, None], torch.arange(k.shape[2], device=q.device)[None, :]
    scores = query @ key.mT * q.shape[-1] ** -0.5
    if program.score is not None:
        scores = program.score(scores, h, i, j, {n: t.double() if t.is_floating_point() else t for n, t in x.items()})
    if program.keep is not None:
        scores = scores.masked_fill(~program.keep(b, i, j, x), -math.inf)
    return scores.softmax(-1) @ value


def live_share(program: Program, x: Tensors, length: int, device: torch.device) -> float:
    """Return the unmasked share of the last batch's scores."""
    if program.keep is None:
        return 1.0
    i = torch.arange(0, length, max(1, length // 256), device=device)[:, None]
    j = torch.arange(length, device=device)[None, :]
    batch = len(next(iter(x.values()))) - 1 if "doc" in x or "keep" in x else 0
    kept = program.keep(torch.tensor(batch, device=device), i, j, x)
    return kept.expand(i.shape[0], length).double().mean().item()
