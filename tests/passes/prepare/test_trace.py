"""What a graph holds besides attention keeps its meaning: regions, mutation, aliasing, sizes, transforms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support import assert_kept, check, compiled, error, new_reports, qkv, rand, run

SCALE = 0.3


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def softmaxes(gm) -> int:
    """How many softmax calls a graph and its submodules hold."""
    names = [str(n.target) for m in gm.modules() if hasattr(m, "graph") for n in m.graph.nodes]
    return sum("softmax" in name for name in names)


# -- higher-order operators ---------------------------------------------------------------------
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
        """The identity, whose gradient is 3 and not 1."""

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


def test_a_view_that_the_outputs_own_strides_forbid():
    """Blocks of queries that are merged by a view: the output has to be laid out as it was."""

    def fn(q, k, v):
        q, k, v = (x.unfold(2, 8, 8).mT for x in (q, k, v))
        return ((q @ k.mT) * SCALE).softmax(-1).matmul(v).view(2, 4, 40, 8)

    check(fn, *qkv())


# -- regions --------------------------------------------------------------------------------------
def test_an_autocast_region_gives_eagers_dtypes_and_values():
    def fn(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(q, k, v)

    q, k, v = qkv()
    assert compiled(fn)(q, k, v).dtype == fn(q, k, v).dtype
    check(fn, q, k, v, tolerance=2e-2)


def test_a_nested_region_that_switches_autocast_off_is_kept():
    def fn(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = attend(q, k, v)
            with torch.autocast("cpu", enabled=False):
                second = attend(q, k, v)
            third = attend(q, k, v)
        return first, second, third

    q, k, v = qkv()
    got, want = compiled(fn)(q, k, v), fn(q, k, v)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    check(fn, q, k, v, tolerance=2e-2, sites=3)


def test_attention_across_the_border_of_an_autocast_region_is_right():
    def fn(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = (q @ k.mT) * SCALE
        return scores.float().softmax(-1) @ v

    q, k, v = qkv()
    assert compiled(fn)(q, k, v).dtype == torch.float32
    assert_kept(fn, q, k, v, code="region", tolerance=1e-2, exact=False)


def test_a_region_that_switches_off_what_is_off_is_no_border():
    def fn(q, k, v):
        with torch.autocast("cpu", enabled=False):
            scores = (q.float() @ k.float().mT) * SCALE
        return scores.softmax(-1).to(v.dtype) @ v

    check(fn, *(x.bfloat16() for x in qkv()), exact=False)
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # now it is one
        assert compiled(fn)(q, k, v).dtype == fn(q, k, v).dtype
        assert_kept(fn, q, k, v, code="region", tolerance=2e-2, exact=False)


def test_ambient_autocast_gives_eagers_dtypes_and_values():
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(attend)(q, k, v).dtype == attend(q, k, v).dtype
        check(attend, q, k, v, tolerance=2e-2, exact=False)


def test_a_no_grad_region_stops_gradients_as_in_eager():
    def fn(q, k, v):
        with torch.no_grad():
            fixed = attend(q, k, v)
        return attend(q, fixed, v)

    check(fn, *qkv(), sites=2)
    q, k, v = (x.requires_grad_() for x in qkv())
    compiled(fn)(q, k, v).sum().backward()
    assert k.grad is None


def test_attention_across_the_border_of_a_no_grad_region_keeps_eagers_gradients():
    def fn(q, k, v):
        with torch.no_grad():
            weights = ((q @ k.mT) * SCALE).softmax(-1)
        return weights @ v

    assert_kept(fn, *qkv(), code="region")
    q, k, v = (x.requires_grad_() for x in qkv())
    compiled(fn)(q, k, v).sum().backward()
    assert q.grad is None
    assert k.grad is None


def test_a_detached_query_takes_no_gradient():
    check(lambda q, k, v: attend(q.detach(), k, v) + q, *qkv())


def test_detached_weights_give_gradients_to_the_values_alone():
    def fn(q, k, v):
        return ((q @ k.mT) * SCALE).softmax(-1).detach() @ v + 0 * q

    check(fn, *qkv())


# -- mutation and aliasing --------------------------------------------------------------------------
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_scores_changed_in_place_are_lifted(inner):
    def fn(q, k, v, keep, bias):
        scores = q @ k.mT
        scores *= SCALE
        scores += bias
        scores /= 2
        scores.masked_fill_(~keep, float("-inf"))
        return scores.softmax(-1) @ v

    check(fn, *qkv(t=24), torch.ones(24, 24, dtype=torch.bool).tril(), rand(4, 24, 24), inner=inner)


def unsqueezed_scores(q, k, v):
    s = (q @ k.mT) * 0.25
    s.unsqueeze_(0)
    return s.softmax(-1) @ v


def transposed_query(q, k, v):
    q = q * 0.25
    q.transpose_(1, 2)
    return torch.einsum("bihd,bhjd->bhij", q, k).softmax(-1) @ v


@pytest.mark.parametrize("fn", [unsqueezed_scores, transposed_query])
def test_a_tensor_whose_shape_changes_in_place_has_its_first_shape_until_then(fn):
    check(fn, *qkv(t=24))


def test_an_input_written_before_the_attention_is_read_after_the_write():
    def fn(q, k, v):
        k.mul_(2)
        return attend(q, k, v)

    q, k, v = qkv()
    with torch.no_grad():
        mine, theirs = k.clone(), k.clone()
        torch.testing.assert_close(compiled(fn)(q, mine, v), fn(q, theirs, v))
        assert torch.equal(mine, theirs)


def test_an_input_written_after_the_attention_is_read_before_the_write():
    def fn(q, k, v):
        out = attend(q, k, v)
        v.zero_()
        k.add_(1)
        return out

    q, k, v = qkv()
    with torch.no_grad():
        mine, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
        torch.testing.assert_close(compiled(fn)(q, *mine), fn(q, *theirs))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_an_input_written_between_scores_and_values_keeps_both_readings():
    def fn(q, k, v):
        weights = ((q @ k.mT) * SCALE).softmax(-1)
        k.mul_(-3)
        v.mul_(2)
        return weights @ v + (k.sum() * 0)

    q, k, v = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k.clone(), v.clone()), fn(q, k.clone(), v.clone()))


def test_an_output_that_aliases_an_input_still_does():
    def fn(q, k, v):
        return attend(q, k, v), q.view(-1), k

    q, k, v = qkv()
    out, flat, same = compiled(fn)(q, k, v)
    assert flat.data_ptr() == q.data_ptr()
    assert same.data_ptr() == k.data_ptr()
    torch.testing.assert_close(out, attend(q, k, v))


def test_two_outputs_that_alias_each_other_still_do():
    def fn(q, k, v):
        out = attend(q, k, v)
        return out, out.transpose(1, 2)

    q, k, v = qkv()
    with torch.no_grad():
        out, turned = compiled(fn)(q, k, v)
    assert out.data_ptr() == turned.data_ptr()
    assert turned.stride() == fn(q, k, v)[1].stride()


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(lambda x: x + 1, id="add"),
        pytest.param(lambda x: x * 2, id="mul"),
        pytest.param(torch.tanh, id="tanh"),
        pytest.param(lambda x: x, id="nothing"),
    ],
)
@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_outputs_keep_eagers_strides_through_pointwise_operators(after, inner):
    args = qkv()
    with torch.no_grad():
        got, want = compiled(lambda q, k, v: after(attend(q, k, v)), inner=inner)(*args), after(attend(*args))
    assert got.stride() == want.stride()


def cached(write):
    def fn(q, k, v, keys, values, at):
        write(keys, at, k)
        write(values, at, v)
        keep = torch.arange(keys.shape[2]) <= at[:, None]
        return ((q @ keys.mT) * SCALE).masked_fill(~keep, float("-inf")).softmax(-1) @ values

    return fn


def write_index_copy(cache, at, new):
    cache.index_copy_(2, at, new)


def write_index_put(cache, at, new):
    cache[:, :, at] = new


def write_slice(cache, at, new):
    cache[:, :, 2:5] = new


@pytest.mark.parametrize("write", [write_index_copy, write_index_put, write_slice])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_key_value_cache_written_before_the_attention_is_read_after_the_write(write, inner):
    fn, at = cached(write), torch.arange(2, 5)
    q, k, v = qkv(t=3)
    cache = rand(2, 2, 4, 16, 8)
    mine, theirs = cache.clone(), cache.clone()
    with torch.no_grad(), new_reports() as filed:
        got = compiled(fn, inner=inner)(q, k, v, *mine, at)
        want = fn(q, k, v, *theirs, at)
    torch.testing.assert_close(got, want)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, cache)
    assert [len(r.rewritten) for r in filed] == [1]


def test_batch_norms_running_statistics_move_as_in_eager():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
            q = x.unsqueeze(1)
            return attend(q, q, q)

    torch.manual_seed(1)
    mine, theirs = Block(), Block()
    fast, x = compiled(mine), rand(3, 20, 8)
    for n in range(2):
        torch.testing.assert_close(fast(x + n), theirs(x + n), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.norm.running_mean, theirs.norm.running_mean)
    torch.testing.assert_close(mine.norm.running_var, theirs.norm.running_var)
    assert mine.norm.num_batches_tracked == 2


# -- symbolic sizes and numbers ---------------------------------------------------------------------
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
        assert_kept(fn, *qkv(), torch.tensor(13), code="layout", train=False)


def test_a_graph_break_by_item_gives_two_graphs_that_are_right():
    def fn(q, k, v):
        out = attend(q, k, v)
        if out.sum().item() > 1e9:
            return out
        return attend(out, k, v)

    check(fn, *qkv(), sites=2)


# -- functorch ----------------------------------------------------------------------------------------
def graphs_that_reach_inductor(monkeypatch, fn, *args, **options):
    """The graphs that Dynamo makes of fn, and those that Inductor gets."""
    import torch._inductor.compile_fx as inductor

    from attnfx.compiler import pipeline

    made, got = [], []
    original_run, original_compile = pipeline.run, inductor.compile_fx
    monkeypatch.setattr(pipeline, "run", lambda gm, *a, **k: (made.append(gm), original_run(gm, *a, **k))[1])
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, *a, **k: (got.append(gm), original_compile(gm, *a, **k))[1])
    compiled(fn, inner="inductor", **options)(*args)
    return made, got


def test_a_graph_with_nothing_to_find_reaches_inductor_as_dynamo_made_it(monkeypatch):
    made, got = graphs_that_reach_inductor(monkeypatch, lambda x, w: torch.tanh(x @ w) + 1, rand(4, 8), rand(8, 8))
    assert len(made) == 1
    assert got[0] is made[0]


def test_a_graph_with_a_softmax_that_is_no_attention_reaches_inductor_as_dynamo_made_it(monkeypatch):
    made, got = graphs_that_reach_inductor(
        monkeypatch, lambda x, w: (x @ w).softmax(-1).log().mean(), rand(4, 8), rand(8, 8)
    )
    assert len(made) == 1
    assert got[0] is made[0]


def test_rewrite_never_hands_over_dynamos_own_graph(monkeypatch):
    made, got = graphs_that_reach_inductor(monkeypatch, attend, *qkv(), rewrite="never")
    assert got[0] is made[0]
    assert softmaxes(got[0]) == 1


def test_dynamos_graph_is_not_changed_by_a_rewrite(monkeypatch):
    made, got = graphs_that_reach_inductor(monkeypatch, attend, *qkv())
    assert got[0] is not made[0]
    assert softmaxes(made[0]) == 1
    assert softmaxes(got[0]) == 0


def test_a_vmap_that_draws_for_each_element_passes_through_untouched(monkeypatch):
    def fn(q, k, v):
        return torch.vmap(lambda *x: attend(*x) + 0 * torch.rand(()), randomness="different")(q, k, v)

    args = qkv()
    made, got = graphs_that_reach_inductor(monkeypatch, fn, *args)
    assert all(a is b for a, b in zip(made, got))
    torch.testing.assert_close(compiled(fn)(*args), fn(*args))


def test_func_grad_passes_through_untouched(monkeypatch):
    def fn(q, k, v):
        return torch.func.grad(lambda q: attend(q, k, v).square().sum())(q)

    args = qkv()
    made, got = graphs_that_reach_inductor(monkeypatch, fn, *args)
    assert all(a is b for a, b in zip(made, got))
    torch.testing.assert_close(compiled(fn)(*args), fn(*args), rtol=1e-4, atol=1e-5)


# -- other operators in the graph ---------------------------------------------------------------------
def test_a_custom_operator_beside_the_attention_is_left_alone():
    with torch.library._scoped_library("attnfx_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", lambda x: torch.empty_like(x), "Meta")

        def fn(q, k, v):
            return torch.ops.attnfx_test.twice(attend(q, k, v))

        check(fn, *qkv(), train=False)


def test_an_embedding_with_a_padding_index_keeps_its_gradient():
    def fn(table, ids, w):
        x = F.embedding(ids, table, padding_idx=0)
        q = (x @ w).unsqueeze(1)
        return attend(q, q, q)

    check(fn, rand(11, 8), torch.arange(24).view(2, 12) % 11, rand(8, 8))


def test_a_model_in_which_random_numbers_are_drawn_draws_as_many():
    def fn(q, k, v):
        return attend(q, k, v) + 0 * torch.rand(3).sum(), torch.rand(2)

    q, k, v = qkv()
    torch.manual_seed(5)
    got = compiled(fn)(q, k, v)[1]
    torch.manual_seed(5)
    assert torch.equal(got, fn(q, k, v)[1])


# -- what is recorded without being run -----------------------------------------------------------
def everything_direct(x, y, w, b, n, h):
    linear = F.linear(F.linear(x, w, b), w)
    mixed = linear * 2 + n - 0.5 * y / n
    mixed += x
    return torch.matmul(-mixed, y.mT), torch.tanh(mixed).mT.contiguous() * torch.rsqrt(y * y + 1).mT, h * n + h, n / 3


def recorded(monkeypatch, direct, autocast):
    """(operator, shape, dtype, strides) of each node of the trace."""
    from attnfx.passes.prepare import trace

    if not direct:
        monkeypatch.setattr(trace, "DIRECT", {})
    seen, original = [], trace.run

    def spy(graph):
        made = original(graph)
        for n in graph.gm.graph.nodes:
            held = n.meta.get("val")
            facts = (held.shape, held.dtype, held.stride()) if isinstance(held, torch.Tensor) else ()
            seen.append((str(n.target), *facts, "test_trace.py" in n.meta.get("stack_trace", "")))
        return made

    monkeypatch.setattr(trace, "run", spy)
    args = (rand(2, 4, 6), rand(2, 4, 6), rand(6, 6), rand(6), torch.arange(6), rand(6, dtype=torch.float16))

    def fn(*args):
        q = args[0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return attend(q, q, q), *everything_direct(*args)

    with new_reports() as filed:
        compiled(fn)(*args)
    torch._dynamo.reset()
    monkeypatch.undo()
    assert filed[0].sites
    return seen


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_recorded_without_being_run_is_what_running_it_records(monkeypatch, autocast):
    assert recorded(monkeypatch, True, autocast) == recorded(monkeypatch, False, autocast)


def test_what_was_not_run_can_be_changed_in_place():
    def fn(q, k, v, w):
        q = q * w
        q += 1
        return attend(q, k, v)

    check(fn, *qkv(), rand(8))


def test_contiguous_is_kept_where_it_changes_nothing():
    """A compiler may give what it is called on other strides than eager does, as Inductor does to this `cat`."""

    def fn(x, nothing):
        made = torch.cat([x.transpose(1, 2), nothing], -1).contiguous()
        q = made.view(8, 5, 4)
        return (q @ q.mT).softmax(-1) @ q

    check(fn, rand(2, 5, 4, 4), rand(2, 4, 5, 0), train=False, inner="inductor")
