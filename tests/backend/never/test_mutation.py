"""Read each tensor with the value that eager would read, despite in-place writes."""

import pytest
import torch

from tests.support import compiled, qkv, rand

SCALE = 0.3


LOW = torch.finfo(torch.float32).min


INF = float("-inf")


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def mask_changed(q, k, v, mask):
    out = ((q @ k.mT) * SCALE).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    mask.logical_or_(torch.ones_like(mask).tril())
    return out


def bias_changed(q, k, v, bias):
    out = ((q @ k.mT) * SCALE + bias).softmax(-1) @ v
    bias.add_(torch.arange(bias.shape[-1]))
    return ((out @ k.mT) * SCALE + bias).softmax(-1) @ v


def query_changed(q, k, v, x):
    out = ((x * SCALE) @ k.mT).softmax(-1) @ v
    x.mul_(3.0)
    return out + x.mean()


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("fn", [mask_changed, bias_changed, query_changed], ids=lambda fn: fn.__name__)
def test_inputs_that_are_written_in_place_give_the_gradients_that_the_compiler_gives_without_attnfx(fn, inner):
    """The reference is not eager, because PyTorch's own compilers read the mask of `mask_changed` after its change."""
    q, k, v = qkv()
    last = {
        mask_changed: torch.rand(q.shape[0], 1, q.shape[2], k.shape[2]) > 0.3,
        bias_changed: torch.randn(q.shape[0], 1, q.shape[2], k.shape[2]),
        query_changed: torch.randn_like(q),
    }[fn]
    if fn is mask_changed:
        last[..., 0] = True
    results = []
    for run_ in (torch.compile(fn, backend=inner), compiled(fn, inner=inner)):
        torch._dynamo.reset()
        operands, held = [x.detach().clone().requires_grad_() for x in (k, v)], last.clone()
        out = run_(q, *operands, held)
        results.append([out, *torch.autograd.grad(out.square().sum(), operands), held])
    for a, b in zip(*results):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_a_mask_that_is_written_after_it_was_read_counts_as_it_was_read():
    def fn(q, k, v, bias):
        scores = (q @ k.mT) * SCALE + bias
        bias.fill_(0)
        return scores.softmax(-1) @ v

    q, k, v = qkv()
    bias = rand(40, 40)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k, v, bias.clone()), fn(q, k, v, bias.clone()))


def test_a_view_of_a_key_that_is_written_before_the_product_is_read_after_the_write():
    def fn(q, k, v):
        kt = k.mT
        k[:, :, 3] = 0
        return ((q @ kt) * SCALE).softmax(-1) @ v

    q, k, v = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k.clone(), v), fn(q, k.clone(), v))


def test_values_computed_in_the_graph_and_written_between_are_read_as_in_eager():
    def fn(q, k, v):
        value = v * 2
        weights = ((q @ k.mT) * SCALE).softmax(-1)
        early = weights @ value
        value.add_(1)
        return early, weights @ value

    with torch.no_grad():
        args = qkv()
        torch.testing.assert_close(compiled(fn)(*args), fn(*args))


def test_a_scaled_key_whose_source_is_written_before_the_product_keeps_the_old_numbers():
    """Looking through `k * 2` must not read the k that has changed since."""

    def fn(q, k, v):
        doubled = k * 2
        k.zero_()
        return ((q @ doubled.mT) * SCALE).softmax(-1) @ v

    q, k, v = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k.clone(), v), fn(q, k.clone(), v))


def test_expanded_heads_whose_source_is_written_before_the_product_keep_the_old_numbers():
    def fn(q, k, v):
        wide = k.repeat_interleave(2, dim=1)
        k.neg_()
        return ((q @ wide.mT) * SCALE).softmax(-1) @ v.repeat_interleave(2, dim=1)

    q, k, v = qkv(g=2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k.clone(), v), fn(q, k.clone(), v))
