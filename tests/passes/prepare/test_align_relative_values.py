"""Read weights at their keys in products with a vector for each distance."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import assert_right, check, compiled, qkv, rand

T = 24


def skewed(w):
    """Move the diagonals of the weights to columns: column c of row i is the key c + i - T + 1 (Shaw et al. 2018)."""
    b, h, t, _ = w.shape
    flat = F.pad(F.pad(w, (0, t - 1)).view(b, h, -1), (t, 0))
    return flat.view(b, h, t, 2 * t)[..., 1:]


def skewed_the_other_way(w):
    """Column c of row i is the key i - c + T - 1."""
    return skewed(w.flip(-1).flip(-2)).flip(-2)


def by_matmul(skew, w, table):
    return skew(w) @ table


def by_einsum(skew, w, table):
    return torch.einsum("bhic,ce->bhie", skew(w), table[0, 0])


@pytest.mark.parametrize("product", [by_matmul, by_einsum])
def test_the_weights_and_their_diagonals_are_not_materialized(product, shapes_left):
    def fn(q, k, v, table, keep):
        w = (q @ k.mT * 0.3).masked_fill(~keep[:, None, None], -1e4).softmax(-1)
        return w @ v + product(skewed, w, table)

    keep = torch.arange(T)[None] < torch.tensor([T, 17])[:, None]
    args = *qkv(t=T), rand(1, 1, 2 * T - 1, 8), keep
    check(fn, *args, sites=2)
    assert not [s for s in shapes_left if len(s) > 2 and s[-2:] in ((T, T), (T, 2 * T - 1), (T, 2 * T))]


def test_the_product_with_the_table_keeps_its_strides():
    def fn(q, k, table):
        return skewed((q @ k.mT * 0.3).softmax(-1)) @ table

    args = rand(2, 3, T, 8), rand(2, 3, T, 8), rand(2 * T - 1, 8)
    assert compiled(fn, inner="eager")(*args).stride() == fn(*args).stride()


def test_diagonals_that_run_the_other_way_are_as_in_eager():
    def fn(q, k, v, table):
        w = (q @ k.mT * 0.3).softmax(-1)
        return w @ v + skewed_the_other_way(w) @ table

    assert_right(fn, *qkv(t=T), rand(1, 1, 2 * T - 1, 8))


def test_part_of_the_diagonals_is_as_in_eager():
    """Columns that not every key reaches: the product stays."""

    def fn(q, k, v, table):
        w = (q @ k.mT * 0.3).softmax(-1)
        return w @ v + skewed(w)[..., T - 4 : T + 3] @ table

    assert_right(fn, *qkv(t=T), rand(1, 1, 7, 8))


def test_symbolic_sizes_are_as_in_eager():
    def fn(q, k, v, table):
        w = (q @ k.mT * 0.3).softmax(-1)
        return w @ v + skewed(w) @ table[..., : 2 * q.shape[2] - 1, :]

    assert_right(fn, *qkv(t=T), rand(1, 1, 4 * T, 8), dynamic=True)
