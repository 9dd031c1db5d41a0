"""Expand vmap: recognize a vmapped attention and a mask made by vmap, and leave the rest unchanged."""

import pytest
import torch
import torch.nn.functional as F
from torch._C._functorch import maybe_current_level
from torch._subclasses.fake_tensor import FakeTensorMode

from attnfx.passes.lift.graph import Graph
from attnfx.passes.prepare import expand_vmap
from attnfx.passes.prepare.expand_vmap import ENTER, LEAVE, uses_functorch
from tests.support import check, compiled, new_reports, qkv, rand


def attend(q, k, v):
    return ((q @ k.mT) * 0.3).softmax(-1) @ v


def masked(reads):
    """Build attention under a mask from a function of four indices, mapped over each index as libraries do."""

    def fn(q, k, v):
        mask = reads
        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
            mask = torch.vmap(mask, in_dims=dims)
        sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        alive = mask(*(torch.arange(n) for n in sizes))
        return ((q @ k.mT) * 0.3).masked_fill(~alive, float("-inf")).softmax(-1) @ v

    return fn


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_of_one_head_is_mapped_over_batch_and_heads(dynamic):
    def fn(q, k, v):
        return torch.vmap(torch.vmap(attend))(q, k, v)

    try:
        torch.compile(fn, backend="eager", dynamic=dynamic)(*qkv())
    except torch._dynamo.exc.TorchRuntimeError:
        pytest.skip("PyTorch 2.11 itself maps no product of symbolic sizes")
    check(fn, *qkv(), dynamic=dynamic)


def test_dimensions_are_mapped_in_and_out_wherever_they_stand():
    def fn(q, k, v):
        return torch.vmap(attend, in_dims=(1, 1, 1), out_dims=2)(q, k, v)

    check(fn, *qkv())


def test_keys_and_values_that_are_not_mapped_are_shared():
    def fn(q, k, v):
        return torch.vmap(attend, in_dims=(0, None, None))(q, k[0], v[0])

    check(fn, *qkv())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "reads",
    [lambda b, h, i, j: j <= i, lambda b, h, i, j: (j <= i) & (i - j < 5), lambda b, h, i, j: (j <= i) | (h == 1)],
    ids=["causal", "window", "by head"],
)
def test_a_mask_made_by_vmap_is_read_as_a_formula(reads, dynamic):
    (site,) = check(masked(reads), *qkv(), dynamic=dynamic)
    assert not site.spec.captures


def test_a_mask_made_by_vmap_reads_a_tensor():
    documents = torch.arange(99) // 7

    def same(b, h, i, j):
        of = [torch.index_select(documents, 0, x[None])[0] for x in (i, j)]
        return of[0] == of[1]

    check(masked(same), *qkv())


def test_the_place_in_the_code_survives():
    (site,) = check(lambda q, k, v: torch.vmap(attend)(q, k, v), *qkv())
    assert "test_expand_vmap.py" in site.where


def test_a_constant_stands_in_the_body():
    def one(q, k, v):
        return (q @ k.mT * torch.tensor(0.3) + torch.tensor([0.5, -0.5]).repeat(k.shape[-2] // 2)).softmax(-1) @ v

    check(
        lambda q, k, v: torch.vmap(one)(q, k, v) + torch.vmap(one)(q, k, v),
        *(rand(2, 3, 24, 8) for _ in range(3)),
        sites=2,
    )


# -- unchanged code -----------------------------------------------------------------------------------
def test_random_numbers_drawn_for_each_element_are_left_to_functorch():
    def fn(q, k, v):
        one = lambda q, k, v: F.dropout(((q @ k.mT) * 0.3).softmax(-1), 0.5) @ v  # noqa: E731
        return torch.vmap(one, randomness="different")(q, k, v)

    with new_reports() as reports:
        compiled(fn)(*qkv())
    assert [x.refusal.code for x in reports[0].others] == ["functorch"]


def test_a_body_that_changes_a_tensor_is_left_to_functorch():
    def fn(q, k, v):
        def one(q, k, v):
            q.mul_(2)
            return attend(q, k, v)

        return torch.vmap(one)(q.clone(), k, v)

    q, k, v = qkv()
    with new_reports() as reports:
        torch.testing.assert_close(compiled(fn)(q, k, v), fn(q, k, v))
    assert not reports[0].rewritten


def test_a_body_that_switches_gradients_off_is_right():
    def fn(q, k, v):
        def one(q, k, v):
            with torch.no_grad():
                scale = q.square().mean().rsqrt()
            return attend(q * scale, k, v)

        return torch.vmap(one)(q, k, v)

    args = [x.requires_grad_() for x in qkv()]
    torch.testing.assert_close(
        torch.autograd.grad(compiled(fn)(*args).sum(), args), torch.autograd.grad(fn(*args).sum(), args)
    )


def test_a_gradient_inside_vmap_is_left_to_functorch():
    def fn(q, k, v):
        return torch.vmap(torch.func.grad(lambda q, k, v: attend(q, k, v).square().sum()))(q, k, v)

    q, k, v = qkv()
    torch.testing.assert_close(compiled(fn)(q, k, v), fn(q, k, v), rtol=1e-4, atol=1e-5)


def test_a_body_that_fails_leaves_no_level_behind():
    gm = torch.fx.symbolic_trace(lambda x: x)
    x, out = gm.graph.nodes
    with gm.graph.inserting_before(out):
        gm.graph.call_function(ENTER, (3, "error"))
        made = gm.graph.call_method("view", (x, 5))  # of six elements
        gm.graph.call_function(LEAVE)
    out.args = (made,)
    with FakeTensorMode():
        x.meta["example_value"] = made.meta["example_value"] = torch.ones(2, 3)
    graph = Graph(gm)
    assert expand_vmap.run(graph) == 0
    assert graph.gm is gm and uses_functorch(gm)
    assert maybe_current_level() is None
