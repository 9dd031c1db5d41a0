"""Lift writes of a number under a mask."""

import pytest
import torch

from tests.support import assert_kept, check, compiled, qkv, rand

INF = float("inf")


def causal(q, k):
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def written(index, fill=-INF):
    def fn(q, k, v):
        s = (q @ k.mT) * 0.3
        s[index(s, causal(q, k))] = fill
        return s.softmax(-1) @ v

    return fn


MASKS = {
    "after two dimensions": lambda s, keep: (slice(None), slice(None), ~keep),
    "as large as the scores": lambda s, keep: (~keep).expand_as(s),
    "after an ellipsis": lambda s, keep: (..., ~keep),
}


@pytest.mark.parametrize("fill", [-INF, -1e9])
@pytest.mark.parametrize("index", MASKS.values(), ids=MASKS)
def test_scores_written_under_a_mask(index, fill):
    check(written(index, fill), *qkv())


def test_whole_rows_of_keys_are_written():
    dead = torch.tensor([[False, True, False], [True, False, False]])  # batch, head

    def fn(q, k, v):
        s = (q @ k.mT) * 0.3
        s[dead] = 0.5
        return s.softmax(-1) @ v

    q, k, v = (rand(2, 3, 24, 8) for _ in range(3))
    check(fn, q, k, v)


def test_numbers_of_many_are_no_fill():
    mask = torch.ones(24, 24, dtype=torch.bool).tril()

    def fn(q, k, v, numbers):
        s = (q @ k.mT) * 0.3
        s[:, :, mask] = numbers
        return s.softmax(-1) @ v

    q, k, v = (rand(2, 3, 24, 8) for _ in range(3))
    assert_kept(fn, q, k, v, rand(int(mask.sum())), code="rows_mixed")


def test_a_tensor_of_one_number_is_a_fill_with_a_gradient():
    mask = torch.ones(24, 24, dtype=torch.bool).tril()

    def fn(q, k, v, number):
        s = (q @ k.mT) * 0.3
        s[:, :, ~mask] = number
        return s.softmax(-1) @ v

    q, k, v = (rand(2, 3, 24, 8) for _ in range(3))
    (site,) = check(fn, q, k, v, rand(1))  # including the gradient of the fill
    assert str(site.spec) == "score   where(c0[i, j], 0.3 * dot, c1[0])"


def test_integers_as_an_index_are_no_mask():
    def fn(q, k, v):
        s = (q @ k.mT) * 0.3
        s[..., torch.tensor([1, 4])] = -INF
        return s.softmax(-1) @ v

    assert_kept(fn, *qkv(), code="rows_mixed")


def test_a_masked_write_keeps_the_strides():
    def fn(q, k, v, mask):
        x = (q * torch.sigmoid(q)).transpose(0, 1)
        x[:, mask] = 0.0
        return (q @ k.mT).softmax(-1) @ v, x

    args = (*qkv(), torch.arange(2) > 0)
    assert compiled(fn, inner="eager")(*args)[1].stride() == fn(*args)[1].stride()


def test_rows_that_are_written_under_a_mask_stay_apart():
    def fn(q, k, v):
        s = (q @ k.mT) * 0.3
        s[:, :, ~causal(q, k)] = -INF
        kept = s.topk(4, -1).values[..., -1:]
        return s.masked_fill(s < kept, -INF).softmax(-1) @ v

    (site,) = check(fn, *qkv())
    assert site.spec is None  # run as whole rows
