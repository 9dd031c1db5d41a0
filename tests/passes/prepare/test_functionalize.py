"""Functionalize scores that are changed in place, as a whole or through slices."""

import pytest
import torch

from tests.support import assert_kept, assert_right, check, compiled, qkv, rand

T = 20


def scores(q, k):
    return (q @ k.mT) * 0.25


def a_bias_for_all_but_the_first(q, k, v):
    s = scores(q, k)
    bias = torch.linspace(-1, 1, (T - 1) ** 2, dtype=q.dtype).view(T - 1, T - 1)
    s[:, :, 1:, 1:] = s[:, :, 1:, 1:].view(2, -1, T - 1, T - 1) + bias
    return s.softmax(-1) @ v


def a_bias_for_all(q, k, v):
    s = scores(q, k)
    s[:, :, 0:, 0:] = s[:, :, 0:, 0:] + torch.linspace(-1, 1, T, dtype=q.dtype)
    return s.softmax(-1) @ v


def the_last_keys_filled(q, k, v):
    s = scores(q, k)
    s[..., 12:] = float("-inf")
    return s.softmax(-1) @ v


def one_key_left_out(q, k, v):
    s = scores(q, k)
    s[:, :, :, 3] = float("-inf")
    return s.softmax(-1) @ v


def one_row_scaled(q, k, v):
    s = scores(q, k)
    s[:, :, -1].mul_(0.5)
    return s.softmax(-1) @ v


def added_to_in_turn(q, k, v):
    s = scores(q, k)
    s[:, :, :, :10] += 1.0
    s[:, :2] *= 0.5
    return s.softmax(-1) @ v


ONE = [a_bias_for_all_but_the_first, a_bias_for_all, the_last_keys_filled, one_key_left_out,
       one_row_scaled, added_to_in_turn]  # fmt: skip


@pytest.mark.parametrize("fn", ONE, ids=[fn.__name__ for fn in ONE])
def test_scores_written_in_part_are_one_site(fn):
    check(fn, *qkv(t=T))


def a_view_from_before_is_read_after(q, k, v):
    s = scores(q, k)
    first = s[:, :, :, 0]
    s[..., 12:] = -1.0
    s[..., 0] = 2.0
    return s.softmax(-1) @ v + first.unsqueeze(-1)


def read_before_and_after(q, k, v):
    s = scores(q, k)
    before = s.sum()
    s[..., 12:] = -1.0
    return s.softmax(-1) @ v * before + s[..., 12:].sum()


def test_scores_read_before_and_after_a_write_are_each_as_they_were():
    check(read_before_and_after, *qkv(t=T))


def test_a_write_under_a_view_that_is_read_later_is_kept():
    assert_kept(a_view_from_before_is_read_after, *qkv(t=T), code="rows_mixed")


def test_a_write_under_no_grad_keeps_the_gradient_of_a_value_that_was_written_before():
    """The first write is functionalized: the value that it leaves still has a gradient."""

    def fn(q, k, v):
        x = q * torch.sigmoid(q) + (q @ k.mT).softmax(-1) @ v
        x[..., :3, :] = 0.0
        with torch.no_grad():
            total = x.sum(-1, keepdim=True)
            x[..., 3:].mul_(0.5)
            made = x + total * 0.1
        return x + made

    assert_right(fn, *qkv(), inner="eager")


def test_several_writes_under_no_grad_keep_the_gradient():
    """The result of the first write is the written tensor itself, with its gradient."""

    def fn(q, k, v):
        x = q * torch.sigmoid(q) + (q @ k.mT).softmax(-1) @ v
        with torch.no_grad():
            x.mul_(0.5).add_(v, alpha=0.25)
            x.sub_(0.125)
        return x * 1.5 + torch.stack([x, k]).softmax(0).sum(0)

    assert_right(fn, *qkv(), inner="eager")


def test_exponentials_in_place_are_a_softmax():
    def fn(q, k, v):
        e = scores(q, k).exp_()
        return (e / e.sum(-1, keepdim=True)) @ v

    check(fn, *qkv(t=T))


def test_scores_with_other_strides_are_filled():
    def fn(q, k, v):
        s = torch.einsum("ibnd,jbnd->ijbn", q, k)
        s.masked_fill_(torch.ones(len(q), len(k)).triu(1).bool()[:, :, None, None], -65000)
        return torch.einsum("ijbn,jbnd->ibnd", s.softmax(1), v)

    check(fn, *(rand(T, 2, 3, 8) for _ in range(3)))


def test_an_output_of_several_values_may_be_written_through_a_view():
    def fn(q, k, v, k2, v2, new):
        w = torch.cat([q @ k2.mT, q @ k.mT], -1).softmax(-1)
        out = w[..., :4] @ v2 + w[..., 4:] @ v
        out[:, :4] = new
        return out

    check(fn, *(rand(2, n, 8) for n in (T, T, T, 4, 4, 4)))


def test_powers_in_place_are_powers():
    def fn(q, k, v):
        s = scores(q, k)
        s.pow_(2)
        return s.softmax(-1) @ v

    check(fn, *qkv(t=T))


@pytest.mark.parametrize("edit", [lambda s, m: s.masked_fill_(m, -1e4), lambda s, m: s.add_(m).mul_(0.5)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_write_to_scores_with_heads_last(edit, dynamic):
    """Out of place, an operator returns the strides of its mask, or contiguous ones."""
    mask = (torch.arange(24) > 19)[:, None]

    def fn(q, k, v):
        s = edit(torch.einsum("bihd,bjhd->bijh", q, k) * 0.3, mask)
        return torch.einsum("bijh,bjhd->bihd", s.softmax(-2), v)

    check(fn, *(rand(2, 24, 3, 8) for _ in range(3)), dynamic=dynamic)


def test_a_write_to_scores_with_heads_last_keeps_their_strides():
    def fn(q, k, v):
        s = (torch.einsum("bihd,bjhd->bijh", q, k) * 0.3).masked_fill_((torch.arange(24) > 19)[:, None], -1e4)
        return torch.einsum("bijh,bjhd->bihd", s.softmax(-2), v), s

    given = [rand(2, 24, 3, 8) for _ in range(3)]
    assert compiled(fn)(*given)[1].stride() == fn(*given)[1].stride()


def add_to_the_diagonal(s):
    s.diagonal(dim1=-2, dim2=-1).add_(1.5)


def scale_another_diagonal(s):
    s.diagonal(-2, -2, -1).mul_(s.diagonal(-2, -2, -1) + 0.5)


def fill_the_diagonal_of_flat_scores(s):
    s.view(*s.shape[:2], -1)[:, :, :: s.shape[-1] + 1] = -torch.inf


def add_to_every_third_key(s):
    s.flatten(0, 1)[:, :, 1::3] += 2.0


def scale_through_two_reshapes(s):
    s.unsqueeze(2).view(-1, s.shape[-2], s.shape[-1])[:, :, 2:].mul_(0.5)


def diagonal_of_transposed_scores(s):
    s.mT.diagonal(dim1=-2, dim2=-1).add_(1.5)


VIEWS_WRITTEN = [add_to_the_diagonal, scale_another_diagonal, fill_the_diagonal_of_flat_scores, add_to_every_third_key,
                 scale_through_two_reshapes]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("keys", [13, 9])
@pytest.mark.parametrize("write", VIEWS_WRITTEN)
def test_scores_written_through_views_are_scores(write, keys, dynamic):
    def fn(q, k, v):
        s = scores(q, k)
        write(s)
        return s.softmax(-1) @ v

    (site,) = check(fn, *qkv(t=11, s=keys), dynamic=dynamic)
    assert site.spec is not None or write is add_to_every_third_key


def the_diagonal_is_read_for_each_key(q, k, v):
    s = scores(q, k)
    own = s.diagonal(dim1=-2, dim2=-1).clone()
    s.diagonal(dim1=-2, dim2=-1).add_(1.5)
    return (s + own[..., None] * own[..., None, :]).softmax(-1) @ v


def a_reshape_that_is_overwritten(q, k, v):
    """Eager gives the scores a gradient of zeros, not None."""
    s = scores(q, k)
    s.view(-1).copy_(v[:, :, :1].expand(-1, -1, 11, -1).repeat(1, 1, 1, 2)[..., :11].flatten())
    return s.softmax(-1) @ v


def a_view_of_the_bits(q, k, v):
    s = scores(q, k).detach()
    s.view(torch.int32).bitwise_and_(-2)
    return s.softmax(-1) @ v


def keys_written_at_places(q, k, v):
    at = torch.tensor([2, 5])
    s = scores(q, k).index_fill(-1, at + 1, 0.5)
    s = s.index_copy(-1, at, torch.ones_like(s[..., :2]))
    return s.index_add(-1, torch.tensor([0, 0]), s[..., 7:9]).softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [False, True])
def test_keys_that_are_written_at_given_places_are_whole_rows(dynamic):
    check(keys_written_at_places, *qkv(t=11), dynamic=dynamic)


def rows_written_at_places(q, k, v):
    return scores(q, k).index_fill(-2, torch.tensor([2, 5]), 0.5).softmax(-1) @ v


@pytest.mark.parametrize(
    "fn", [rows_written_at_places, the_diagonal_is_read_for_each_key, a_reshape_that_is_overwritten, a_view_of_the_bits]
)
def test_what_views_write_reaches_nothing_else(fn):
    assert_right(fn, *qkv(t=11))


def test_a_write_through_a_transposed_view_is_right():
    def fn(q, k, v):
        s = scores(q, k)
        diagonal_of_transposed_scores(s)
        return s.softmax(-1) @ v

    assert_right(fn, *qkv(t=11))
