"""Merge a sum of products into one product over all widths, but not a table that is indexed by i - j."""

import pytest
import torch

from tests.support import check, compiled, new_reports, qkv, rand

T, D = 24, 16


def given():
    """Create query, key and value, and query and key for positions."""
    return rand(2, 4, T, D), rand(2, 4, T, D), rand(2, 4, T, D), rand(2, 4, T, 8), rand(2, 4, T, 8)


def added(q, k, v, p, r):
    return ((q @ k.mT + p @ r.mT) * 0.25).softmax(-1) @ v


def scaled_apart(q, k, v, p, r):
    return ((q @ k.mT) / 4 + (p @ r.mT) * 0.3).softmax(-1) @ v


def subtracted_in_place(q, k, v, p, r):
    s = torch.einsum("bhid,bhjd->bhij", q, k)
    s -= torch.einsum("bhid,bhjd->bhij", p, r) * 0.5
    return (s * 0.25).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf")).softmax(-1) @ v


def positions_without_a_batch(q, k, v, p, r):
    return ((q @ k.mT + (p[0] @ r[0].mT)[None]) * 0.25).softmax(-1) @ v


def keys_of_all_heads(q, k, v, p, r):
    s = torch.einsum("bhid,bjd->bhij", q, k[:, 0]) + torch.einsum("bhid,bjd->bhij", p, r[:, 0])
    return (s * 0.25).softmax(-1) @ v[:, :1]


def one_set_of_keys_for_all_heads(q, k, v, p, r):
    return ((torch.einsum("bhjd,bhid->bhij", k, q) + torch.einsum("bhid,bjd->bhij", p, r[:, 0])) * 0.25).softmax(-1) @ v


def in_one_call(q, k, v, p, r):
    q, k, v, p, r = (x.flatten(0, 1) for x in (q, k, v, p, r))
    return torch.baddbmm(torch.bmm(p, r.mT), q, k.mT, beta=0.5, alpha=0.25).softmax(-1) @ v


def three(q, k, v, p, r):
    return ((q @ k.mT + p @ r.mT + r @ p.mT) * 0.25).softmax(-1) @ v


ONE = [added, scaled_apart, subtracted_in_place, positions_without_a_batch, keys_of_all_heads,
       one_set_of_keys_for_all_heads, in_one_call, three]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", ONE, ids=[fn.__name__ for fn in ONE])
def test_one_product(fn, dynamic):
    sites = check(fn, *given(), dynamic=dynamic)
    assert not [c for c in sites[0].spec.captures if c[1].rank > 2], sites[0].spec


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    check(three, *(x.to(dtype) for x in given()))


def test_a_table_read_at_a_distance_stays_a_bias():
    def fn(q, k, v, table):
        i = torch.arange(T)
        looked_up = torch.gather(q @ table.mT, -1, (i[:, None] - i + T - 1).expand(2, 4, T, T))
        return ((q @ k.mT + looked_up) * 0.25).softmax(-1) @ v

    check(fn, *given()[:3], rand(2 * T - 1, D))


def test_heads_between_rows_and_keys_do_not_hide_the_mask():
    """Queries have the layout (batch, row, head); the mask decides which of the two dims is the row."""

    def fn(q, k, v):
        s = torch.einsum("bihd,bjd->bihj", q, k) * 0.25
        s = s + torch.full((T, T), float("-inf")).triu(1)[:, None]
        return torch.einsum("bihj,bjd->bihd", s.softmax(-1), v)

    with new_reports() as filed:
        compiled(fn)(rand(2, T, 4, D), rand(2, T, D), rand(2, T, D))
    assert filed[0].sites[0].mask == "causal"
    check(fn, rand(2, T, 4, D), rand(2, T, D), rand(2, T, D))


def test_a_dimension_of_one_that_no_operand_names():
    def fn(q, k, v):
        s = torch.einsum("bhid,bhjd->bijh", q, k).permute(0, 3, 1, 2)
        return ((s + s.mT) * 0.25).softmax(-1) @ v

    check(fn, *(rand(2, 1, T, D) for _ in range(3)))


def test_tables_of_rows_and_columns_stay_biases():
    """Each row of an image has its own table of keys: a merged key would be copied for each row."""
    side = 6

    def fn(q, k, v, rows, columns):
        near = torch.arange(side)[:, None] - torch.arange(side) + side - 1
        grid = q.unflatten(2, (side, side))
        s = (q @ k.mT).unflatten(2, (side, side)).unflatten(4, (side, side))
        s = s + torch.einsum("nhrwc,rkc->nhrwk", grid, rows[near])[..., None]
        s = s + torch.einsum("nhrwc,wkc->nhrwk", grid, columns[near])[..., None, :]
        return s.flatten(4).flatten(2, 3).softmax(-1) @ v

    check(fn, *qkv(t=side * side), rand(2 * side - 1, 8), rand(2 * side - 1, 8))
