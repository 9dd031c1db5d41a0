"""Edits of a tensor (.., T, n) inside an attention: query, key, value, scores, weights or result."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.fuzz.parts import EDITS, Context, neighbor


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
