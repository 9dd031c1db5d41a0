"""Sample dropout at its rate, the same in both passes, and anew for each call."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.support import compiled, new_reports, qkv, rand

SCALE = 0.3


LOW = torch.finfo(torch.float32).min


INF = float("-inf")


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def dropped(q, k, v):
    return F.dropout(((q @ k.mT) * SCALE).softmax(-1), 0.4, True) @ v


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_manual_seed_repeats_a_run_with_dropout(inner):
    fast, args = compiled(dropped, inner=inner), qkv()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append((fast(*args), fast(*args)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1])
    assert not torch.equal(results[0][0], results[2][0])


def draws_agree(fn, q, k, v):
    """Return whether forward and backward dropped the same weights: then <out, g> = <v, dv> for `fn` linear in v."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = fn(q, k, v)
    g = torch.randn_like(out)
    out.backward(g)
    return torch.allclose((out.detach().double() * g).sum(), (v.detach().double() * v.grad.double()).sum(), rtol=1e-4)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_forward_and_backward_draw_the_same_dropout(inner):
    with new_reports() as filed:
        assert draws_agree(compiled(dropped, inner=inner), *qkv(t=150))
    assert [s.spec.dropout for r in filed for s in r.rewritten] == [0.4]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_checkpoint_region_recomputes_with_the_same_draw(inner):
    def fn(q, k, v):
        return checkpoint(dropped, q, k, v, use_reentrant=False)

    assert draws_agree(compiled(fn, inner=inner), *qkv(t=150))


def test_two_sites_draw_apart():
    def fn(q, k, v):
        return dropped(q, k, v), dropped(q, k, v)

    with new_reports() as filed:
        first, second = compiled(fn)(*qkv())
    assert sum(len(r.rewritten) for r in filed) == 2
    assert not torch.equal(first, second)


def test_the_share_of_dropped_weights_is_the_one_that_was_asked_for():
    fast = compiled(lambda q, k, v: F.dropout(((q @ k.mT) * SCALE).softmax(-1), 0.25, True) @ v)
    t = 64
    q, k, v = rand(8, 8, t, 8) * 0, rand(8, 8, t, 8), torch.eye(t).expand(8, 8, t, t)
    weights = fast(q, k, v)  # unit values return the weights themselves
    assert abs((weights == 0).float().mean().item() - 0.25) < 0.01
    torch.testing.assert_close(weights[weights != 0], torch.full(((weights != 0).sum(),), 1 / t / 0.75))
    columns = (weights == 0).float().mean((0, 1, 2))
    assert columns.min() > 0.2
    assert columns.max() < 0.3
