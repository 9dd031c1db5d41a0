"""Preserve the meaning of autocast and no_grad regions, of in-place writes and of aliases."""

import pytest
import torch
from torch import nn

from tests.support import assert_kept, check, compiled, new_reports, qkv, rand

SCALE = 0.3


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def test_a_view_that_the_outputs_own_strides_forbid():
    """A view merges blocks of queries, so the output must keep its layout."""

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
    with torch.autocast("cpu", dtype=torch.bfloat16):  # now there is an autocast region
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

    check(fn, *qkv())
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
