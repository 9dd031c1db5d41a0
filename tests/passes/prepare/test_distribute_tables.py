"""Look up relative positions in a small product instead of multiplying a vector for each score."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import check, rand

REACH = 4


def places(q, k):
    gap = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return gap.clamp(-REACH, REACH) + REACH


def shared(q, k, table):
    return torch.einsum("bhid,ijd->bhij", q, table[places(q, k)])


def by_embedding(q, k, table):
    return torch.einsum("bhid,ijd->bhij", q, F.embedding(places(q, k), table))


def of_keys(q, k, table):
    return torch.einsum("bhjd,ijd->bhij", k, F.embedding(places(q, k), table))


def by_matmul(q, k, table):
    b, h, t, d = q.shape
    rows = q.permute(2, 0, 1, 3).reshape(t, b * h, d)
    return (rows @ table[places(q, k)].transpose(1, 2)).view(t, b, h, k.shape[2]).permute(1, 2, 0, 3)


def by_columns(q, k, table):
    return torch.einsum("bhid,dij->bhij", q, table.T[:, places(q, k)])


PRODUCTS = [shared, by_embedding, of_keys, by_matmul, by_columns]


def inputs(queries=24, keys=20):
    return rand(2, 3, queries, 8), rand(2, 3, keys, 8), rand(2, 3, keys, 8), rand(2 * REACH + 1, 8)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_no_tensor_of_a_vector_for_each_score_is_left(product, dynamic):
    def fn(q, k, v, table):
        return ((q @ k.mT + product(q, k, table)) * 0.3).softmax(-1) @ v

    (site,) = check(fn, *inputs(), dynamic=dynamic)
    assert len(site.spec.captures) == 1 and "min" in str(site.spec)  # the index is computed for each score


def test_both_sides_and_two_tables():
    def fn(q, k, v, table, other):
        s = q @ k.mT + shared(q, k, table) + of_keys(q, k, other)
        return (s * 0.3).masked_fill(places(q, k) > REACH, -1e9).softmax(-1) @ v

    check(fn, *inputs(), rand(2 * REACH + 1, 8))


def test_a_table_as_large_as_the_keys_stays():
    def fn(q, k, v, table):
        at = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] + q.shape[2] - 1
        return ((q @ k.mT + torch.einsum("bhid,ijd->bhij", q, table[at])) * 0.3).softmax(-1) @ v

    check(fn, *inputs(24, 20)[:3], rand(43, 8))


def test_places_that_a_tensor_gives_for_each_batch_element():
    at = torch.randint(0, 5, (2, 24, 20))

    def fn(q, k, v, table):
        s = q @ k.mT + torch.einsum("bhid,bijd->bhij", q, F.embedding(at, table))
        return (s * 0.3).softmax(-1) @ v

    check(fn, *inputs()[:3], rand(5, 8))


def test_low_precision():
    def fn(q, k, v, table):
        with torch.autocast("cpu", torch.bfloat16):
            return ((q @ k.mT + shared(q, k, table)) * 0.3).softmax(-1) @ v

    check(fn, *inputs(), exact=False, tolerance=0.05)
