"""Match attention whose operands are written in place before or after it reads them; keep it if that cannot be told
apart."""

import pytest
import torch
from torch import nn

import attnfx
from tests.support import assert_kept, assert_right, check, compiled, new_reports, qkv, rand


class Layers(nn.Module):
    """Each layer masks the same input in place before it reads it."""

    def __init__(self):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))

    def forward(self, x, keep, bias):
        for project in self.projections:
            q, k, v = project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            bias.masked_fill_(~(keep[:, :, None] & keep[:, None]), 0.5)
            x = x + ((q @ k.mT + bias[:, None]).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x, bias


def test_an_input_that_each_layer_writes_before_it_reads():
    check(Layers(), rand(2, 12, 16), rand(2, 12) > 0, rand(2, 12, 12), sites=3, train=False)


def test_an_input_that_is_written_between_its_use_and_a_later_read_is_kept():
    def fn(q, k, v, bias):
        s = q @ k.mT + bias
        bias.mul_(2.0)
        return s.softmax(-1) @ v + bias.mean()

    assert_kept(fn, *qkv(), rand(40, 40), code="mutated", train=False)


def test_a_write_through_another_view_counts():
    def fn(q, k, v, bias):
        s = q @ k.mT + bias[:, :40]
        bias[:20].zero_()
        return s.softmax(-1) @ v * bias[:, 41].mean()

    assert_kept(fn, *qkv(), torch.ones(40, 44), code="mutated", train=False)


def test_a_write_that_nothing_reads_afterwards_is_delayed():
    def fn(q, k, v, bias, length):
        s = (q @ k.mT + bias[:, :40]).masked_fill(torch.arange(40) >= length, -torch.inf)
        length.add_(1)
        length.mul_(2)
        bias[:20].zero_()
        bias.add_(v.mean())
        k.copy_(torch.cat([k[:, :, 1:], v[:, :, :1]], 2))
        return s.softmax(-1) @ v

    first, second = ((*qkv(), rand(40, 44), torch.tensor(31)) for _ in range(2))
    for mine, other in zip(first, second, strict=True):
        other.copy_(mine)
    with new_reports() as filed, torch.no_grad():
        torch.testing.assert_close(compiled(fn)(*first), fn(*second))
    assert [len(r.rewritten) for r in filed] == [1]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def a_source_that_changes(q, k, v, bias):
    s, extra = q @ k.mT + bias, v.mean(1, keepdim=True).mean(0, keepdim=True)
    bias.copy_(v[0, 0, :, :1])
    v.mul_(2.0)
    return s.softmax(-1) @ v + extra


def a_view_taken_before(q, k, v, bias):
    row = bias[3]
    s = q @ k.mT + bias
    bias.mul_(2.0)
    return s.softmax(-1) @ v + row.mean()


def a_result_that_is_read(q, k, v, bias):
    s = q @ k.mT + bias
    return s.softmax(-1) @ v * bias.mul_(2.0).mean()


def a_draw(q, k, v, bias):
    s = q @ k.mT + bias
    bias.uniform_()
    return s.softmax(-1) @ v + torch.rand(40, 8)


FIXED = [a_source_that_changes, a_view_taken_before, a_result_that_is_read, a_draw]


@pytest.mark.parametrize("fn", FIXED, ids=lambda fn: fn.__name__)
def test_writes_that_must_stay_where_they_are_give_the_same(fn):
    first, second = ((*qkv(), rand(40, 40)) for _ in range(2))
    for mine, other in zip(first, second, strict=True):
        other.copy_(mine)
    results = []
    for run, args in ((compiled(fn, inner="eager"), first), (fn, second)):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(run(*args))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_a_write_under_no_grad_stays_there():
    def fn(q, k, v, mean):
        s, new = q @ k.mT, k.mean()
        with torch.no_grad():
            mean.copy_(new)
        return s.softmax(-1) @ v

    (q, k, v), mean = qkv(), torch.ones(())
    compiled(fn)(q, k.requires_grad_(), v, mean).sum().backward()
    assert not mean.requires_grad and k.grad is not None


def test_the_hint_on_a_cache_that_is_written_in_a_graph_with_gradients_names_no_grad():
    def fn(q, k, v, keys):
        keys.index_copy_(2, torch.tensor([7]), k)
        return (q @ keys.mT).softmax(-1) @ v

    q, keys, v = qkv()
    (kept,) = attnfx.explain(fn, rewrite="always")(q.requires_grad_(), rand(2, 4, 1, 8), v, keys)
    assert kept.code == "mutated" and "under `torch.no_grad()`" in kept.refusal.hint
    with torch.no_grad():
        (site,) = attnfx.explain(fn, rewrite="always")(q, rand(2, 4, 1, 8), v, keys)
    assert site.rewritten


def distances_written_before_the_bias(q, k, v, far):
    """Graphormer: the first write reads the distances too, but before the attention."""
    far = far.clone()
    far[far == 0] = 1
    bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    bias[1:, 1:] = 1.0 / far[1:, 1:].to(q.dtype)
    return (q @ k.mT + bias).softmax(-1) @ v


def test_reads_by_earlier_writes_do_not_count():
    check(distances_written_before_the_bias, *qkv(t=11), torch.randint(0, 6, (11, 11)))


def distances_written_between_two_reads(q, k, v, far):
    far = far.clone()
    near = far == 0
    far[near] = 1
    s = (q @ k.mT).masked_fill(far > 4, -1.0)
    far[far == 3] = 5
    return (s + far[:, :1].to(q.dtype)).softmax(-1) @ v


def mask_read_before_the_write(q, k, v, far):
    far = far.clone()
    kept = far > 2
    far[far == 1] = 7
    bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    bias[1:] = far[1:].to(q.dtype)
    return (q @ k.mT + bias).masked_fill(kept, -1.0).softmax(-1) @ v


@pytest.mark.parametrize("fn", [distances_written_between_two_reads, mask_read_before_the_write])
def test_values_before_and_after_a_write_are_two(fn):
    assert_right(fn, *qkv(t=11), torch.randint(0, 9, (11, 11)))


def a_write_through_another_input(q, kv, k, new):
    k[:, :, :4].copy_(new)
    return (q @ kv[0].mT).softmax(-1) @ kv[1]


def a_write_behind_the_scores(q, kv, k, new):
    s = q @ k.mT
    kv[0, :, :, :4] = new
    return s.softmax(-1) @ kv[1]


@pytest.mark.parametrize("fn", [a_write_through_another_input, a_write_behind_the_scores])
def test_inputs_that_share_memory_which_is_written_leave_the_graph_as_it_is(fn):
    q, new, first = rand(2, 2, 4, 8), rand(2, 2, 4, 8), rand(2, 2, 2, 8, 8)
    second = first.clone()
    with torch.no_grad(), new_reports() as filed:
        got = compiled(fn)(q, first, first[0], new)
        torch.testing.assert_close(got, fn(q, second, second[0], new))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not any(r.rewritten for r in filed) and any("memory another input shares" in str(r.notes) for r in filed)
