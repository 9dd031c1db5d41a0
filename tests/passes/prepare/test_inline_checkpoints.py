"""Find attention through checkpointed regions, and save no more than these regions did."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.support import check, compiled, new_reports, qkv, rand

T = 50
region = functools.partial(checkpoint, use_reentrant=False)


def attend(q, k, v):
    return ((q @ k.mT) * 0.3).softmax(-1) @ v


def saved_by(fn, *args, **options):
    """Return the shapes of the tensors that the compiled step saves, except inputs, and the reports."""
    args = [x.requires_grad_() for x in args]
    given = {x.data_ptr() for x in args}
    found, fast = [], compiled(fn, dynamic=False, **options)

    def pack(x):
        if x.data_ptr() not in given:
            found.append(tuple(x.shape))
        return x

    with new_reports() as filed:
        fast(*args)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fast(*args).sum().backward()
    return found, filed


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_chunks_of_queries_are_one_attention(reentrant, dynamic):
    def fn(q, k, v):
        return torch.cat([checkpoint(attend, x, k, v, use_reentrant=reentrant) for x in q.split(16, 2)], dim=2)

    (site,) = check(fn, *qkv(t=T), dynamic=dynamic)
    if not dynamic:
        assert site.dims["T"] == T


def test_a_mask_in_each_checkpointed_chunk_is_a_part_of_one():
    def part(q, k, v, start):
        keep = torch.arange(q.shape[2])[:, None] + start >= torch.arange(T)
        return ((q @ k.mT) * 0.3).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    def fn(q, k, v):
        out = torch.empty_like(q)
        for n in range(0, T, 16):
            out[:, :, n : n + 16] = region(part, q[:, :, n : n + 16], k, v, n)
        return out

    (site,) = check(fn, *qkv(t=T))
    assert site.dims["T"] == T and site.mask == "causal"


def test_chunks_with_dropout_are_joined_and_drop_at_their_rate():
    def part(q, k, v):
        return F.dropout((q @ k.mT).softmax(-1), 0.25) @ v

    def fn(q, k, v):
        return torch.cat([region(part, x, k, v) for x in q.split(25, 2)], dim=2)

    q, k, v = (x.requires_grad_() for x in qkv(t=T))
    with new_reports() as filed:
        out = compiled(fn)(q, k, v)
    out.backward(v.detach())
    assert len(filed[-1].sites) == 1
    # <out, v> is linear in the values, and its gradient has the same dropout
    torch.testing.assert_close((v.grad * v).sum(), (out * v).sum(), rtol=1e-4, atol=1e-4)


def test_autocast_in_a_region_gives_eagers_dtypes_and_values():
    def part(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v)

    def fn(q, k, v):
        return torch.cat([region(part, x, k, v) for x in q.split(25, 2)], dim=2)

    check(fn, *qkv(t=T), exact=False, tolerance=2e-2)


def test_what_follows_each_chunk_in_its_autocast_region_stays_there():
    def part(q, k, v, w):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(attend(q, k, v), w)

    def fn(q, k, v, w):
        return torch.cat([part(x, k, v, w) for x in q.split(25, 2)], dim=2)

    check(fn, *qkv(t=T), rand(8, 8), exact=False, tolerance=2e-2, sites=2)


def test_an_attention_alone_in_its_region_saves_no_weights_and_runs_once():
    def fn(q, k, v):
        return region(attend, q, k, v).sin()

    found, filed = saved_by(fn, *qkv(t=T))
    assert filed[-1].rewritten and not any(shape[-2:] == (T, T) for shape in found)
    assert (2, 4, T) in [shape[:3] for shape in found]  # the logsumexp is saved, so nothing is recomputed


def block(x, w):
    q, k, v = (x @ w).view(2, T, 3, 4, 8).permute(2, 0, 3, 1, 4)
    return torch.tanh(attend(q, k, v).transpose(1, 2).reshape(2, T, 32))


def test_a_region_that_holds_more_than_attention_is_computed_again():
    def fn(x, w):
        return region(block, region(block, x, w), w)

    found, filed = saved_by(fn, rand(2, T, 32), rand(32, 96))
    assert len(filed[-1].rewritten) == 2
    elements = sum(torch.Size(shape).numel() for shape in found)
    assert elements <= 2 * 2 * T * 32, found  # the tensors between the regions, and two views of one scalar
    check(fn, rand(2, T, 32), rand(32, 96), sites=2)


def test_a_site_that_is_kept_stays_checkpointed():
    def fn(q, k, v):
        return region(attend, q, k, v) + region(attend, q.sin(), k, v)

    found, filed = saved_by(fn, *qkv(t=T), rewrite="cost", tiers=("decode",))
    assert not filed[-1].rewritten
    assert not any(shape[-2:] == (T, T) for shape in found)


def test_nested_regions():
    def inner(x, w):
        return region(block, x, w) + x

    def fn(x, w):
        return region(inner, x, w).sin()

    check(fn, rand(2, T, 32), rand(32, 96))


def test_a_region_with_a_policy_of_its_own_is_left_as_it_is():
    def policy(_, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def fn(x, w):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return region(block, x, w, context_fn=contexts).sin()

    check(fn, rand(2, T, 32), rand(32, 96))


def test_a_region_whose_result_is_its_input():
    def fn(q, k, v):
        same, out = region(lambda q, k, v: (q, attend(q, k, v)), q, k, v)
        return out + same

    check(fn, *qkv(t=T))
