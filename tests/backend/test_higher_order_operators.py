"""Rewrite attention in and around checkpoints, autograd functions and branches, and keep their gradients."""

import torch
from torch.utils.checkpoint import checkpoint

from tests.support import check, compiled, qkv

SCALE = 0.3


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def test_attention_inside_a_checkpoint_region_is_rewritten():
    def fn(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False).sin()

    check(fn, *qkv())


def test_attention_around_a_checkpoint_region_is_rewritten_as_well():
    def block(q, k, v):
        return attend(q, k, v) + torch.tanh(q)

    def fn(q, k, v):
        q = checkpoint(block, q, k, v, use_reentrant=False)
        return attend(q, k, v)

    check(fn, *qkv(), sites=2)


def test_an_autograd_function_keeps_its_own_gradient():
    class Twice(torch.autograd.Function):
        """An identity whose gradient is 3, not 1."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    def fn(q, k, v):
        return attend(Twice.apply(q), k, Twice.apply(v))

    check(fn, *qkv())
    q, k, v = (x.requires_grad_() for x in qkv())
    compiled(fn)(q, k, v).sum().backward()
    with_three = v.grad.clone()
    v.grad = None
    attend(q, k, v).sum().backward()
    torch.testing.assert_close(with_three, 3 * v.grad)


def test_attention_inside_an_autograd_function_gives_its_gradients():
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return attend(q, k, v)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(attend(*leaves), leaves, 2 * grad)

    def fn(q, k, v):
        return Attention.apply(q, k, v)

    check(fn, *qkv())


def test_both_branches_of_a_cond_are_right():
    def doubled(q, k, v):
        return ((q * 2 @ k.transpose(2, 3)) * SCALE).softmax(-1) @ v + 1

    def plain(q, k, v):
        return ((q @ k.transpose(2, 3)) * SCALE).softmax(-1) @ v

    def fn(q, k, v):
        return torch.cond(q.sum() > 0, plain, doubled, (q, k, v))

    q, k, v = qkv()
    check(fn, q.abs(), k, v, train=False, sites=2)
    check(fn, -q.abs(), k, v, train=False, sites=0)  # compiled already
