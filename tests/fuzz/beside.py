"""Neighbors without writes: random values, integers, modules, returned views, and other softmaxes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.parts import Context, D, E, H, neighbor


# -- random values --------------------------------------------------------------------------------
@neighbor()
def noise_added(c: Context, x: Tensor) -> Tensor:
    return x + torch.rand(x.shape[0], x.shape[1], 1).to(x.dtype)


@neighbor(draws=True)
def noise_like(c: Context, x: Tensor) -> Tensor:
    return x + torch.randn_like(x) * 0.1


@neighbor(draws=True)
def dropped_out(c: Context, x: Tensor) -> Tensor:
    return F.dropout(x, 0.3, True)


@neighbor(draws=True)
def dropout_module(c: Context, x: Tensor) -> Tensor:
    return x + c.model.dropout(x)


@neighbor()
def stochastic_depth(c: Context, x: Tensor) -> Tensor:
    return x + x * torch.rand(x.shape[0], 1, 1).to(x.dtype).add_(0.5).floor_()


@neighbor(draws=True)
def bernoulli_mask(c: Context, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full((x.shape[0], x.shape[1], 1), 0.5)).to(x.dtype)


@neighbor(draws=True)
def drawn_in_place(c: Context, x: Tensor) -> Tensor:
    return x + torch.empty_like(x).normal_(0, 0.1) + x.new_empty(E).uniform_(-1, 1)


@neighbor()
def draw_unread(c: Context, x: Tensor) -> Tensor:
    torch.rand(3)
    torch.randint(0, 5, (2,))
    return x


@neighbor()
def permuted(c: Context, x: Tensor) -> Tensor:
    return x[:, torch.randperm(x.shape[1])]


@neighbor(sharp=True)
def sampled(c: Context, x: Tensor) -> Tensor:
    chosen = torch.multinomial(torch.ones(x.shape[0], 8), 3)
    c.out.append(chosen)
    return x + c.model.embedding(chosen).sum(1, keepdim=True)


@neighbor()
def integers_drawn(c: Context, x: Tensor) -> Tensor:
    return x + c.model.embedding(torch.randint(0, 8, (x.shape[0], x.shape[1])))


# -- integers and booleans --------------------------------------------------------------------------
@neighbor(sharp=True)
def largest_channel(c: Context, x: Tensor) -> Tensor:
    c.out.append(x.argmax(-1))
    return x + F.one_hot(x.argmax(-1), E).to(x.dtype)


@neighbor(sharp=True)
def topk_gathered(c: Context, x: Tensor) -> Tensor:
    best, where = x[..., 0].topk(3, dim=-1)
    c.out.append(where)
    return x + x.gather(1, where[..., None].expand(-1, -1, E)).mean(1, keepdim=True) + best.sum()


@neighbor(pure=True)
def embedded(c: Context, x: Tensor) -> Tensor:
    return x + c.model.embedding(c.ids) + F.embedding(c.ids % 3, c.model.weights[0])


@neighbor()
def positions_counted(c: Context, x: Tensor) -> Tensor:
    places = (c.keep.long().cumsum(-1) - 1).clamp_min(0)
    places.masked_fill_(~c.keep, 1)
    c.out.append(places)
    return x + c.model.places[places]


@neighbor()
def bucketed(c: Context, x: Tensor) -> Tensor:
    apart = torch.arange(x.shape[1])
    back = torch.max(apart, torch.zeros_like(apart))
    log = 2 + torch.log(back.float() / 2 + 1e-6) / math.log(8) * 2
    log = torch.min(log, torch.ones_like(log) * 3).int()
    bucket = torch.where(back < 2, back.int(), log).long().clamp_(0, 7)
    c.out.append(bucket)
    return x + c.model.embedding(bucket)


@neighbor(pure=True)
def largest_of_two(c: Context, x: Tensor) -> Tensor:
    return torch.max(x, c.y * 0.5) + torch.min(x, torch.ones_like(x)) + torch.maximum(c.y, c.model.bias)


@neighbor()
def counted_by_class(c: Context, x: Tensor) -> Tensor:
    made = torch.zeros(8, dtype=torch.long)
    made.index_add_(0, c.ids.flatten(), torch.ones_like(c.ids).flatten())
    c.out.append(made)
    c.out.append(c.ids.flatten()[:3])
    return x + made.to(x.dtype).mean()


@neighbor()
def sorted_rows(c: Context, x: Tensor) -> Tensor:
    order = torch.argsort(c.ids, dim=1, stable=True)
    back = torch.empty_like(order).scatter_(1, order, torch.arange(x.shape[1]).expand_as(order))
    moved = x.gather(1, order[..., None].expand_as(x)) * 0.5
    return x + moved.gather(1, back[..., None].expand_as(x))


# -- modules ----------------------------------------------------------------------------------------
@neighbor(pure=True)
def layer_norm(c: Context, x: Tensor) -> Tensor:
    return c.model.norm(x)


@neighbor()
def batch_norm(c: Context, x: Tensor) -> Tensor:
    # contiguous: of such a tensor, PyTorch's fake kernel returns other strides than the real one on a CPU
    return c.model.batch(x.transpose(1, 2)).transpose(1, 2).contiguous()


@neighbor(pure=True)
def group_norm(c: Context, x: Tensor) -> Tensor:
    return x + c.model.group(x.mT).mT


@neighbor(pure=True)
def convolved(c: Context, x: Tensor) -> Tensor:
    return x + c.model.conv(x.transpose(1, 2)).transpose(1, 2)


@neighbor(pure=True)
def feed_forward(c: Context, x: Tensor) -> Tensor:
    return x + F.gelu(x @ c.weight(1)) @ c.weight(2)


@neighbor(pure=True)
def recurrent(c: Context, x: Tensor) -> Tensor:
    state, out = x[:, 0], []
    for n in range(3):
        state = torch.tanh(state @ c.weight() + x[:, n])
        out.append(state)
    return x + torch.stack(out, 1).mean(1, keepdim=True)


@neighbor()
def hooked(c: Context, x: Tensor) -> Tensor:
    return x + c.model.hooked(x)


@neighbor(breaks=True)
def gradient_hooked(c: Context, x: Tensor) -> Tensor:
    made = x * 1.5
    if made.requires_grad:
        made.register_hook(lambda g: g * 0.5)
    return made


# -- softmaxes outside attention ---------------------------------------------------------------------
@neighbor(sharp=True)
def routed(c: Context, x: Tensor) -> Tensor:
    gates = (x @ c.weight()).softmax(-1)
    best, chosen = gates.topk(2, -1)
    best = best / best.sum(-1, keepdim=True)
    c.out.append(chosen)
    return x + (best[..., None] * c.weight(1)[chosen]).sum(-2)


@neighbor(pure=True)
def gated(c: Context, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x @ c.weight()) + x * F.silu(c.y)


@neighbor()
def loss(c: Context, x: Tensor) -> Tensor:
    log = F.log_softmax(x, -1)
    c.out.append(F.nll_loss(log.flatten(0, 1), c.ids.flatten()))
    c.out.append(F.cross_entropy(x.mT, c.ids))
    return x


@neighbor(pure=True)
def softmax_over_batch(c: Context, x: Tensor) -> Tensor:
    return x + x.softmax(0) + x.softmax(1)


@neighbor(pure=True)
def pooled(c: Context, x: Tensor) -> Tensor:
    weights = (x @ c.model.bias).softmax(-1)
    return x + torch.einsum("bt,bte->be", weights, x)[:, None]


# -- precision ----------------------------------------------------------------------------------------
@neighbor(pure=True)
def doubled(c: Context, x: Tensor) -> Tensor:
    return x + (x.double() * 3 + c.y).cumsum(1).to(x.dtype) * 0.1


@neighbor(coarse=True, pure=True)
def halved(c: Context, x: Tensor) -> Tensor:
    return x + (x.half() * 0.5).to(x.dtype) + c.model.scale.bfloat16()


@neighbor(pure=True)
def complex_rotated(c: Context, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones(E // 2), torch.arange(E // 2).float())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


@neighbor(pure=True)
def transformed(c: Context, x: Tensor) -> Tensor:
    return x + torch.fft.irfft(torch.fft.rfft(x.float(), dim=1) * 0.5, n=x.shape[1], dim=1).to(x.dtype)


@neighbor()
def not_finite(c: Context, x: Tensor) -> Tensor:
    made = x[:, :1] / torch.zeros(1, dtype=x.dtype)
    c.out.append(made)
    c.out.append(made - made)
    return x + torch.nan_to_num(made - made) * 0


# -- results: views, copies, strides -------------------------------------------------------------------
@neighbor()
def view_returned(c: Context, x: Tensor) -> Tensor:
    c.out.append(x)
    c.out.append(x[:, 1:])
    c.out.append(x.view(x.shape[0], -1, H, D).transpose(1, 2))
    return x * 2


@neighbor()
def strides_returned(c: Context, x: Tensor) -> Tensor:
    c.out.append((x * 2).transpose(1, 2))
    c.out.append(c.model.bias.expand(2, E))
    c.out.append((x + 1).permute(2, 0, 1))
    c.out.append((x + 2)[:, ::2])
    return x


@neighbor()
def returned_twice(c: Context, x: Tensor) -> Tensor:
    made = x.sum(1)
    c.out.append(made)
    c.out.append(made)
    c.out.append(c.model.bias)
    return x


@neighbor()
def input_returned(c: Context, x: Tensor) -> Tensor:
    c.out.append(c.y)
    c.out.append(c.y[0])
    c.out.append(c.keep)
    c.out.append(c.ids)
    return x


@neighbor()
def detached(c: Context, x: Tensor) -> Tensor:
    c.out.append(x.detach())
    c.out.append(x.detach().mean())
    return x + x.detach() * 0.5


@neighbor()
def empty_and_scalar(c: Context, x: Tensor) -> Tensor:
    nothing = x[:, :0]
    c.out.append(nothing)
    c.out.append(torch.zeros((), dtype=torch.long) + x.shape[1])
    c.out.append(x[0, 0, 0])
    return torch.cat([nothing, x * x.new_tensor(0.5)], 1) + nothing.sum()


@neighbor()
def structure_returned(c: Context, x: Tensor) -> Tensor:
    c.out.append({"sum": x.sum(), "sizes": (x.shape[1], c.number, None)})
    return x


# -- joins -------------------------------------------------------------------------------------------
@neighbor(pure=True)
def chunks_joined(c: Context, x: Tensor) -> Tensor:
    return torch.cat([part @ c.weight(n) for n, part in enumerate(x.split(3, 1))], 1)


@neighbor(pure=True)
def shapes_joined(c: Context, x: Tensor) -> Tensor:
    wide = (x.reshape(-1, 2, E) @ c.weight()).reshape(x.shape[0], -1)
    tall = (x.reshape(-1, 4, E // 2) @ c.weight()[:4, :4]).reshape(x.shape[0], -1)
    return torch.cat([wide, tall], 1).view(x.shape[0], 2, -1, E).sum(1)


@neighbor(pure=True)
def stacked(c: Context, x: Tensor) -> Tensor:
    return torch.stack([x, c.y, x * 0.5]).mean(0) + torch.stack(x.unbind(1), 1)


@neighbor(pure=True)
def sizes_of_one(c: Context, x: Tensor) -> Tensor:
    return x + torch.einsum("bij,bjk->bik", x[..., :1], c.y[:, :1]) + torch.einsum("bte,xe->btx", x, c.model.bias[None])


@neighbor(pure=True)
def scalar_used(c: Context, x: Tensor) -> Tensor:
    return x * c.number + c.count * 0.1 + x[:, c.count : c.count + 1] + torch.arange(x.shape[1])[:, None] * 0.01


@neighbor(pure=True)
def size_used(c: Context, x: Tensor) -> Tensor:
    return x / x.shape[1] + x.new_ones(x.shape[1], 1).cumsum(0) / x.shape[1] ** 0.5
