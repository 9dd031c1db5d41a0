"""Lift writes through index arrays: the diagonal, a band or a block of the scores, a constant or a tensor."""

import pytest
import torch

from tests.support import assert_kept, assert_right, check, qkv, rand

T = 24
range_ = torch.arange


def written(place):
    """Attention whose scores are overwritten by `place(scores, tensor)`."""

    def fn(q, k, v, w):
        s = (q @ k.mT) * 0.25
        place(s, w)
        return s.softmax(-1) @ v

    return fn


def diagonal(s, w):
    s[:, :, range_(T), range_(T)] = -5e4


def diagonal_from_a_tensor(s, w):
    s[..., range_(T), range_(T)] = w


def band(s, w):
    s[:, :, range_(T - 1), range_(1, T)] = -1e4


def counted_from_the_end(s, w):
    s[:, :, range_(T - 1), range_(T - 1) - T] = -1e4


def antidiagonal(s, w):
    s[:, :, range_(T), T - 1 - range_(T)] = -1e4


def block(s, w):
    s[:, :, range_(4, 12)[:, None], range_(3, 9)[None]] = float("-inf")


def columns_from_a_tensor(s, w):
    s[..., range_(T - 6) + 6] = w[: T - 6]


def rows_of_one_key(s, w):
    s[:, :, range_(T), range_(T) * 0 + 3] = w


def dims_apart(s, w):
    s[:, range_(2) + 1, :, range_(2)] = 2.0


def every_other(s, w):
    s[:, :, range_(0, T, 2), range_(0, T, 2)] = -1e4


PLACES = [every_other, diagonal, diagonal_from_a_tensor, band, counted_from_the_end, antidiagonal, block,
          columns_from_a_tensor, rows_of_one_key, dims_apart]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=[p.__name__ for p in PLACES])
def test_writes_through_affine_index_arrays_lift(place):
    check(written(place), *qkv(t=T), rand(T))


def test_a_constant_that_is_written_is_a_mask():
    (site,) = check(written(block), *qkv(t=T), rand(T))
    assert "-inf" in str(site.spec)


def diagonal_view(s, w):
    s.diagonal(dim1=-2, dim2=-1).fill_(-1e4)


def diagonal_view_above(s, w):
    s.diagonal(2, -2, -1).copy_(w[: T - 2])


def diagonal_view_below(s, w):
    s.diagonal(-3, -2, -1).copy_(w[: T - 3])


@pytest.mark.parametrize("place", [diagonal_view, diagonal_view_above, diagonal_view_below], ids=lambda p: p.__name__)
def test_writes_into_a_diagonal_lift(place):
    check(written(place), *qkv(t=T), rand(T))


def into_a_bias(s, w):
    bias = torch.zeros(1, 1, T, T, dtype=w.dtype)
    bias[0, :, range_(T), range_(T)] = w
    s += bias


def test_a_write_by_a_number_and_index_arrays_into_zeros():
    assert_right(written(into_a_bias), *qkv(t=T), rand(T))


def accumulated(s, w):
    s.index_put_((range_(2)[:, None], range_(4), range_(3)[:, None, None]), w[0], accumulate=True)


def by_data(s, w):
    rows, columns = torch.triu_indices(T, T, 1)
    s[:, :, rows, columns] = -1e9


@pytest.mark.parametrize("place", [accumulated, by_data], ids=lambda p: p.__name__)
def test_other_writes_are_left_alone(place):
    assert_kept(written(place), *qkv(t=T), rand(T), code="rows_mixed")
