"""Read a mask that is put together from blocks as a function of the indices, without a T x S tensor."""

import pytest
import torch

from tests.support import check, qkv

T, PREFIX = 20, 4


def rest():
    return torch.ones(T - PREFIX, T - PREFIX, dtype=torch.bool).tril()


def by_cat():
    lower = torch.cat([torch.zeros(PREFIX, T - PREFIX, dtype=torch.bool), rest()])
    return torch.cat([torch.ones(T, PREFIX, dtype=torch.bool), lower], 1)


def by_hstack():
    return torch.hstack([torch.ones(T, PREFIX, dtype=torch.bool), torch.ones(T, T - PREFIX, dtype=torch.bool).tril()])


def by_vstack():
    return torch.vstack([torch.ones(PREFIX, T, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool).tril()[PREFIX:]])


def written_into_zeros():
    keep = torch.zeros(T, T)
    keep[:, :PREFIX] = 1
    keep[PREFIX:, PREFIX:] = rest()
    return keep > 0


@pytest.mark.parametrize("mask", [by_cat, by_hstack, by_vstack, written_into_zeros], ids=lambda f: f.__name__)
def test_a_mask_of_blocks_is_a_function_of_the_indices(mask):
    (site,) = check(lambda q, k, v: (q @ k.mT).masked_fill(~mask(), -1e30).softmax(-1) @ v, *qkv(t=T))
    assert site.spec.captures == ()
