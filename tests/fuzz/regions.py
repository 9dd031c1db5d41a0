"""Neighbors with their own regions (autograd.Functions, subclasses, graph breaks), and regions that can wrap any part.

The latter are no_grad, autocast, checkpoint and cond."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.fuzz.parts import WRAPS, Context, Part, named, neighbor


# -- autograd.Function ------------------------------------------------------------------------------
class Halved(torch.autograd.Function):
    """A function that writes in place in both passes; the writes' results are unused."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        out = x * 0.5
        out.add_(y)
        out[:, 0] *= 2
        return out

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        out = grad * 0.5
        out[:, 0].mul_(2)
        out.clamp_(-10, 10)
        other = torch.zeros_like(y)
        other.copy_(grad)
        return out, other


class Routed(torch.autograd.Function):
    """A function that scatters into the gradient that it returns; three of its inputs get none."""

    @staticmethod
    def forward(ctx, scores, share, chosen, gates):
        ctx.save_for_backward(share, chosen, gates)
        return share * 0.5

    @staticmethod
    def backward(ctx, grad):
        share, chosen, gates = ctx.saved_tensors
        grad = grad * share
        out = gates * -grad
        out.scatter_add_(-1, chosen, grad)
        return out, None, None, None


class Parted(torch.autograd.Function):
    """A function with two results, one without a gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        signs = x.sign()
        ctx.mark_non_differentiable(signs)
        return x * x, signs

    @staticmethod
    def backward(ctx, grad, _):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Written(torch.autograd.Function):
    """A function that changes its input."""

    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Straight(torch.autograd.Function):
    """A rounding with a straight-through gradient."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


@neighbor()
def function_in_place(c: Context, x: Tensor) -> Tensor:
    return Halved.apply(x, c.y)


@neighbor()
def function_scattering(c: Context, x: Tensor) -> Tensor:
    scores = x @ c.weight()
    gates = scores.softmax(-1)
    chosen = c.ids[..., None] % x.shape[-1]
    return x * Routed.apply(scores, gates.gather(-1, chosen), chosen, gates)


@neighbor()
def function_of_two_results(c: Context, x: Tensor) -> Tensor:
    square, signs = Parted.apply(x)
    c.out.append(signs)
    return x + square * 0.1


@neighbor()
def function_marking_dirty(c: Context, x: Tensor) -> Tensor:
    return Written.apply(x * 0.5)


@neighbor(sharp=True)
def function_rounding(c: Context, x: Tensor) -> Tensor:
    return Straight.apply(x)


# -- subclasses ---------------------------------------------------------------------------------------
class Tagged(torch.Tensor):
    """A tensor subclass with default behavior."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@neighbor()
def subclassed(c: Context, x: Tensor) -> Tensor:
    return ((x * 2).as_subclass(Tagged) + c.y).as_subclass(torch.Tensor)


# -- graph breaks ---------------------------------------------------------------------------------------
@neighbor(breaks=True)
def broken(c: Context, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x * 1.5


@neighbor(breaks=True)
def broken_by_data(c: Context, x: Tensor) -> Tensor:
    if c.ids.sum() > 0:
        return x + 1
    return x - 1


@neighbor()
def number_taken(c: Context, x: Tensor) -> Tensor:
    return x * (1 + 0.1 * c.ids[0, 0].item())


@neighbor(breaks=True)
def nonzero_rows(c: Context, x: Tensor) -> Tensor:
    return x + x[c.keep].mean(0) + c.keep.nonzero().sum()


# -- regions ----------------------------------------------------------------------------------------------
@named(WRAPS)
def no_grad(part: Part, c: Context, x: Tensor) -> Tensor:
    with torch.no_grad():
        made = part(c, x)
    return x + made * 0.5


@named(WRAPS)
def enable_grad(part: Part, c: Context, x: Tensor) -> Tensor:
    with torch.no_grad():
        twice = x * 2
        with torch.enable_grad():
            made = part(c, x)
        twice.add_(1)
    return made + twice


@named(WRAPS)
def switched_off(part: Part, c: Context, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    made = part(c, x.detach().clone())
    torch.set_grad_enabled(before)
    return x + made


@named(WRAPS)
def autocast(part: Part, c: Context, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        made = part(c, x)
    return made.to(x.dtype)


@named(WRAPS)
def autocast_off(part: Part, c: Context, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        before = x @ c.weight()
        with torch.autocast("cpu", enabled=False):
            made = part(c, x)
    return made + before.to(x.dtype)


@named(WRAPS)
def detached_around(part: Part, c: Context, x: Tensor) -> Tensor:
    return x + part(c, x.detach() * 1.0).detach()


@named(WRAPS)
def residual(part: Part, c: Context, x: Tensor) -> Tensor:
    return x + part(c, x * 1.0) * 0.5


@named(WRAPS)
def checkpointed(part: Part, c: Context, x: Tensor) -> Tensor:
    def body(x):
        inner = c.aside()
        return part(inner, x), *(o for o in inner.out if isinstance(o, Tensor))

    made, *more = checkpoint(body, x, use_reentrant=False)
    c.out.extend(more)
    return made


@named(WRAPS)
def conditional(part: Part, c: Context, x: Tensor) -> Tensor:
    return torch.cond(c.ids.sum() > 0, lambda x: part(c.aside(), x) * 1.0, lambda x: x * 2.0, (x,))


@named(WRAPS)
def twice(part: Part, c: Context, x: Tensor) -> Tensor:
    return part(c, part(c, x))


COARSE_WRAPS = {"autocast", "autocast_off"}
PURE_WRAPS = {"conditional"}  # their bodies must be pure
