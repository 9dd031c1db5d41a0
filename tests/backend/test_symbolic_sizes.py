"""Serve every length and scalar with one compilation if sizes are symbolic."""

import pytest
import torch

from tests.support import check, compiled, error, new_reports, qkv, run

SCALE = 0.3


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


@pytest.mark.parametrize("train", [False, True])
def test_one_compilation_serves_all_lengths(train):
    def fn(q, k, v):
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        return scores.masked_fill((j > i) | (i - j >= 7), float("-inf")).softmax(-1) @ v

    fast = compiled(fn, dynamic=True)
    with new_reports() as filed:
        for t in (19, 40, 7, 133):
            args = qkv(t=t)
            assert error(run(fast, args, train), run(fn, args, train)) < 1e-5
    assert [len(r.rewritten) for r in filed] == [1]


def test_a_length_that_becomes_symbolic_after_the_first_call_is_served():
    def fn(q, k, v, keep):
        return ((q @ k.mT) * SCALE + (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min).softmax(
            -1
        ) @ v

    fast = compiled(fn)
    with new_reports() as filed:
        for t in (16, 23, 31, 40):
            args = (*qkv(t=t), torch.arange(t).expand(2, t) < torch.tensor([[t], [t - 3]]))
            assert error(run(fast, args, False), run(fn, args, False)) < 1e-5
    assert len(filed) == 2
    assert all(len(r.rewritten) == 1 for r in filed)


def test_different_query_and_key_lengths_are_symbolic_apart():
    def fn(q, k, v):
        t, s = q.shape[2], k.shape[2]
        keep = torch.arange(s)[None, :] <= torch.arange(t)[:, None] + (s - t)
        return torch.where(keep, (q @ k.mT) * SCALE, torch.finfo(q.dtype).min).softmax(-1) @ v

    fast = compiled(fn, dynamic=True)
    for t, s in ((5, 17), (12, 30), (9, 9)):
        args = qkv(t=t, s=s)
        assert error(run(fast, args, True), run(fn, args, True)) < 1e-5


@pytest.mark.slow
def test_a_scale_that_is_a_python_float_does_not_stop_a_dynamic_graph():
    def fn(q, k, v, scale):
        return ((q @ k.mT) * scale).softmax(-1) @ v

    fast = compiled(fn, dynamic=True)
    args = qkv()
    with new_reports() as filed, torch.no_grad():
        for scale in (0.3, 0.7, 1.9):
            torch.testing.assert_close(fast(*args, scale), fn(*args, scale))
    assert sum(len(r.rewritten) for r in filed) >= 1
    assert all(not r.kept for r in filed)


def test_a_number_read_from_a_tensor_does_not_stop_the_compilation():
    def fn(q, k, v, gain):
        return attend(q * gain.item(), k, v)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        check(fn, *qkv(), torch.tensor(1.7), train=False)


def test_a_length_read_from_a_tensor_does_not_stop_the_compilation():
    def fn(q, k, v, length):
        n = length.item()
        torch._check(n >= 2)
        torch._check(n <= k.shape[2])
        keep = torch.arange(k.shape[2]) < n
        return ((q @ k.mT) * SCALE).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        check(fn, *qkv(), torch.tensor(13), train=False)


def test_a_length_that_is_the_larger_of_two_is_served():
    """The keys are the last 8 positions of a cache, or all of a shorter one."""

    def fn(q, k, v):
        t, s = q.shape[2], k.shape[2]
        first = torch.sym_max(s - 8, 0)
        i, j = torch.arange(t)[:, None] + (s - t), torch.arange(s - first) + first
        keep = (j <= i) & (j > i - 6)
        scores = (q @ k[:, :, first:].mT).masked_fill(~keep, -torch.inf)
        return scores.softmax(-1) @ v[:, :, first:]

    fast = compiled(fn, dynamic=True)
    with new_reports() as filed:
        for s in (5, 19, 8, 40):
            args = qkv(t=3, s=s)
            assert error(run(fast, args, False), run(fn, args, False)) < 1e-5
    assert all(len(r.rewritten) == 1 for r in filed) and len(filed) <= 2


def test_a_graph_break_by_item_gives_two_graphs_that_are_right():
    def fn(q, k, v):
        out = attend(q, k, v)
        if out.sum().item() > 1e9:
            return out
        return attend(out, k, v)

    check(fn, *qkv(), sites=2)
