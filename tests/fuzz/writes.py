"""Neighbors that write in place: into parts, through views, under masks, into buffers and inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.fuzz.parts import Context, E, H, neighbor


# -- writes into parts ----------------------------------------------------------------------------
@neighbor()
def slice_added(c: Context, x: Tensor) -> Tensor:
    x[:, 1:] += c.model.places[: x.shape[1] - 1]
    return x


@neighbor()
def slice_set(c: Context, x: Tensor) -> Tensor:
    x[:, 1:] = c.y[:, 1:] * 0.5
    return x


@neighbor()
def token_set(c: Context, x: Tensor) -> Tensor:
    x[:, 0] = c.model.bias
    return x


@neighbor()
def number_set(c: Context, x: Tensor) -> Tensor:
    x[:, -1] = 0.5
    x[..., 0] = c.number
    return x


@neighbor()
def channels_multiplied(c: Context, x: Tensor) -> Tensor:
    x[..., : E // 2] *= c.model.scale[: E // 2]
    return x


@neighbor()
def every_other_added(c: Context, x: Tensor) -> Tensor:
    x[:, ::2] += c.y[:, ::2]
    return x


@neighbor()
def masked_set(c: Context, x: Tensor) -> Tensor:
    x[~c.keep] = 0.0
    return x


@neighbor()
def masked_tensor_set(c: Context, x: Tensor) -> Tensor:
    x[~c.keep] = c.model.bias
    return x


@neighbor()
def part_copied(c: Context, x: Tensor) -> Tensor:
    x[:, 2:4].copy_(c.y[:, :2])
    return x


@neighbor()
def whole_copied(c: Context, x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    made.copy_(x)
    made[0].copy_(c.y[0])
    return made


@neighbor()
def slice_of_slice(c: Context, x: Tensor) -> Tensor:
    x[:, 1:][:, :3][..., 1] -= 0.25
    return x


@neighbor()
def index_written(c: Context, x: Tensor) -> Tensor:
    x.index_put_((torch.tensor([0, 1]), torch.tensor([2, 3])), c.model.bias)
    x.index_copy_(1, torch.tensor([1, 4]), c.y[:, :2])
    return x


@neighbor()
def index_added(c: Context, x: Tensor) -> Tensor:
    x.index_add_(1, torch.tensor([0, 0, 3]), c.y[:, :3], alpha=0.5)
    x.index_fill_(2, torch.tensor([5]), 0.125)
    return x


@neighbor()
def scatter_added(c: Context, x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made.scatter_add_(1, c.ids[..., None].expand_as(x) % x.shape[1], x)
    return x + made


@neighbor()
def scatter_unread(c: Context, x: Tensor) -> Tensor:
    made = x * 0.5
    made.scatter_(2, c.ids[..., None] % E, 1.0)
    made.scatter_add_(2, c.ids[..., None] % E, c.y[..., :1])
    return made


# -- whole tensors --------------------------------------------------------------------------------
@neighbor()
def pointwise_in_place(c: Context, x: Tensor) -> Tensor:
    x.mul_(0.5).add_(c.y, alpha=0.25)
    x.sub_(0.125)
    return x


@neighbor(sharp=True)
def clamped(c: Context, x: Tensor) -> Tensor:
    x.clamp_(-2, 2)
    return x


@neighbor()
def filled(c: Context, x: Tensor) -> Tensor:
    x.masked_fill_(~c.keep[..., None], 0.25)
    made = torch.empty(x.shape[0], x.shape[1], 1, dtype=x.dtype).fill_(c.number)
    made[:, 0].zero_()
    return x + made


@neighbor()
def zeroed_scratch(c: Context, x: Tensor) -> Tensor:
    scratch = x.detach().clone()
    scratch.zero_()
    scratch += 1
    scratch[:, 2].fill_(3.0)
    return x * scratch


@neighbor()
def result_unread(c: Context, x: Tensor) -> Tensor:
    made = x + 1
    torch.add(x, c.y)
    made.neg_()
    made.sub_(c.y)
    return x + made


@neighbor()
def shape_changed_in_place(c: Context, x: Tensor) -> Tensor:
    made = x * 2
    made.unsqueeze_(1)
    made.squeeze_(1)
    made.transpose_(1, 2)
    return x - made.mT


@neighbor(sharp=True)
def logical_in_place(c: Context, x: Tensor) -> Tensor:
    chosen = c.keep & (x[..., 0] > 0)
    chosen |= x[..., 1] > 0.5
    chosen[:, 0] = True
    chosen.logical_not_()
    c.out.append(chosen)
    return x.masked_fill(chosen[..., None], 0.0)


# -- views taken before and after ------------------------------------------------------------------
@neighbor()
def view_before(c: Context, x: Tensor) -> Tensor:
    first = x[:, 0]
    x[:, :2] += 1.0
    return x + first[:, None]


@neighbor()
def view_written(c: Context, x: Tensor) -> Tensor:
    heads = x.view(x.shape[0], x.shape[1], H, -1)
    flat = x.view(-1, E)
    heads[:, :, 0] *= 0.5
    flat[1:].add_(0.25)
    return x + heads.flatten(2) * 0.5


@neighbor()
def transpose_written(c: Context, x: Tensor) -> Tensor:
    turned = x.transpose(1, 2)
    turned[:, :, 1:] -= 0.5
    turned[:, 0].zero_()
    return x


@neighbor()
def copy_before(c: Context, x: Tensor) -> Tensor:
    before = x.clone()
    x[:, 1] = 0
    x += before
    return x


@neighbor()
def sum_before(c: Context, x: Tensor) -> Tensor:
    before = x.sum(-1, keepdim=True)
    x[..., 3:].mul_(0.5)
    return x + before * 0.1


@neighbor()
def chunk_written(c: Context, x: Tensor) -> Tensor:
    made = x.detach() * 1.5
    first, second = made.chunk(2, -1)  # with a gradient, autograd forbids writes to one of several views
    second.mul_(0.5)
    return x + made + torch.cat([second, first], -1)


@neighbor()
def split_written(c: Context, x: Tensor) -> Tensor:
    made = x * 1.5
    left = made[..., : E // 2]
    right = made[..., E // 2 :]
    left += right
    right -= left * 0.5
    return made


@neighbor()
def diagonal_written(c: Context, x: Tensor) -> Tensor:
    made = x @ c.weight()
    made.diagonal(0, 1, 2).fill_(0.5)
    made.diagonal(1, 1, 2).add_(1.0)
    return made


@neighbor()
def strided_written(c: Context, x: Tensor) -> Tensor:
    made = (x * 2).contiguous()
    part = torch.as_strided(made, (2, 3), (E, 2), 1)
    part.add_(1.0)
    return made + x


@neighbor()
def unfolded(c: Context, x: Tensor) -> Tensor:
    return x + x.unfold(1, 2, 1).sum((1, -1)).unsqueeze(1) * 0.1


@neighbor()
def accumulated(c: Context, x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for n in range(3):
        total += x[:, n]
        total[..., n] = 0.5
    return x + total[:, None]


@neighbor()
def rows_written(c: Context, x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape[0], x.shape[1], E)
    made[:, :3] = x[:, :3] * 2
    made[:, 3:] = x[:, 3:] + 1
    return made


# -- buffers and inputs -----------------------------------------------------------------------------
@neighbor()
def running_mean(c: Context, x: Tensor) -> Tensor:
    c.model.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
    return x - c.model.mean


@neighbor()
def counted(c: Context, x: Tensor) -> Tensor:
    c.model.calls += 1
    return x * (1.0 + 0.1 * c.model.calls)


@neighbor()
def cache_by_index(c: Context, x: Tensor) -> Tensor:
    c.model.cache.index_copy_(1, torch.arange(x.shape[1]), x.detach())
    return x + c.model.cache[:, : x.shape[1]] * 0.5


@neighbor()
def cache_by_slice(c: Context, x: Tensor) -> Tensor:
    c.model.cache[:, 2 : 2 + x.shape[1]] = x.detach()
    return x + c.model.cache.sum(1, keepdim=True) * 0.1


@neighbor()
def buffer_replaced(c: Context, x: Tensor) -> Tensor:
    c.model.mean = c.model.mean * 0.5 + x.detach().mean((0, 1))
    return x + c.model.mean


@neighbor()
def memory_written(c: Context, x: Tensor) -> Tensor:
    c.memory[:, : x.shape[1]] += x.detach()
    c.memory[:, -1].zero_()
    return x + c.memory[:, : x.shape[1]] * 0.5


@neighbor()
def memory_returned(c: Context, x: Tensor) -> Tensor:
    c.memory.mul_(0.5)
    c.out.append(c.memory)
    c.out.append(c.memory[:, 1:])
    return x


@neighbor()
def ids_written(c: Context, x: Tensor) -> Tensor:
    c.ids[:, 0] = 1
    c.ids.add_(1).remainder_(8)
    return x + c.model.embedding(c.ids)


@neighbor()
def leaf_written(c: Context, x: Tensor) -> Tensor:
    with torch.no_grad():
        c.model.bias.mul_(0.5)
        c.model.scale[:2] += 0.25
    return x * c.model.scale + c.model.bias
