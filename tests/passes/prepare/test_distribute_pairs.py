"""Split linear layers over query-key pairs into layers over the rows, and find the attention."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import check, compiled, new_reports, rand

T, S, D = 24, 20, 16


def given():
    """Create queries, keys, the weight and bias of a layer over both, and the vector applied to its result."""
    return rand(2, T, D), rand(2, S, D), rand(D, 2 * D), rand(D), rand(D)


def pair(q, k):
    return q[:, :, None].expand(-1, -1, k.shape[1], -1), k[:, None].expand(-1, q.shape[1], -1, -1)


def concatenated(q, k, w, b, v):
    return (torch.tanh(F.linear(torch.cat(pair(q, k), -1), w, b)) @ v).softmax(-1) @ k


def repeated(q, k, w, b, v):
    pairs = [q.unsqueeze(2).repeat(1, 1, k.shape[1], 1), k.unsqueeze(1).repeat_interleave(q.shape[1], 1)]
    return (torch.tanh(F.linear(torch.cat(pairs, dim=3), w, b)) @ v).softmax(-1) @ k


def as_a_product_of_matrices(q, k, w, b, v):
    return F.leaky_relu(torch.cat(pair(q, k), -1) @ w[0][:, None]).squeeze(-1).softmax(-1) @ k


def with_a_vector(q, k, w, b, v):
    return F.leaky_relu(torch.cat(pair(q, k), -1) @ w[0]).softmax(-1) @ k


def of_products(q, k, w, b, v):
    return F.linear(q[:, :, None] * k[:, None], w[:1, :D]).squeeze(-1).softmax(-1) @ k


def all_three(q, k, w, b, v):
    x, y = pair(q, k)
    w = torch.cat([w, w[:, :D]], 1)[:1]
    return F.linear(torch.cat([x, y, x * y], -1), w).squeeze(-1).softmax(-1) @ k


ONE = [concatenated, repeated, as_a_product_of_matrices, with_a_vector, of_products, all_three]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", ONE, ids=[fn.__name__ for fn in ONE])
def test_pairs(fn, dynamic):
    check(fn, *given(), dynamic=dynamic)


@pytest.mark.parametrize("fn", [concatenated, all_three], ids=["concatenated", "all three"])
def test_narrow_types(fn):
    check(fn, *(x.bfloat16() for x in given()))


def test_a_product_with_a_weight_is_found_as_one():
    with new_reports() as filed:
        compiled(all_three)(*given())
    assert "dot" in str(filed[0].sites[0].spec)


def test_pairs_under_autocast_stay(shapes_left):
    def fn(q, k, w, b, v):
        with torch.autocast("cpu", torch.bfloat16):
            return concatenated(q, k, w, b, v), (q @ k.mT).softmax(-1) @ k

    (_,) = check(fn, *given(), exact=False, tolerance=2e-2)  # the other attention: the graph is rewritten
    assert (2, T, S, 2 * D) in shapes_left


def test_pairs_that_meet_no_softmax_stay(shapes_left):
    def fn(q, k, w, b, v):
        return F.linear(torch.cat(pair(q, k), -1), w, b).relu(), (q @ k.mT).softmax(-1) @ k

    check(fn, *given())
    assert (2, T, S, 2 * D) in shapes_left


def test_no_tensor_of_pairs_is_left(shapes_left):
    check(concatenated, *given())
    assert shapes_left and (2, T, S, 2 * D) not in shapes_left
