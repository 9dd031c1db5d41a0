"""Train with a padding mask, for texts of different lengths in one batch. The fused call reads the mask as (B, T)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Batch, compare

HEADS, WIDTH, LENGTH, WORDS = 4, 128, 256, 100


class Classifier(nn.Module):
    """A classifier that predicts which of four words is the most frequent in a text."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(WORDS, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

    def forward(self, text: Tensor, real: Tensor) -> Tensor:
        x = self.word(text)
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        score = torch.matmul(query, key.transpose(-1, -2)) / query.shape[-1] ** 0.5
        score = score + (1.0 - real[:, None, None, :].float()) * torch.finfo(torch.float32).min
        x = x + torch.matmul(F.softmax(score, dim=-1), value).transpose(1, 2).flatten(2)
        kept = real[..., None].float()
        return self.head((x * kept).sum(1) / kept.sum(1))


def batches() -> Iterator[Batch]:
    for _ in range(8):
        answer = torch.randint(4, (8,))
        text = torch.randint(4, WORDS, (8, LENGTH))
        text = torch.where(torch.rand(8, LENGTH) < 0.5, answer[:, None], text)
        real = torch.arange(LENGTH) < torch.randint(LENGTH // 4, LENGTH + 1, (8, 1))
        yield (text, real), answer


if __name__ == "__main__":
    compare(Classifier, batches)
