"""Dimensions of the same size are told apart by where they come from."""

import torch

from tests.support import check, rand

N = 16  # queries, keys, heads' width


def test_heads_that_talk_with_as_many_keys_as_a_head_is_wide():
    def fn(x, before, after):
        q, k, v = x.chunk(3, dim=-1)
        s = torch.einsum("bhij,hg->bgij", torch.einsum("bhid,bhjd->bhij", q, k) * 0.25, before)
        return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhij,hg->bgij", s.softmax(-1), after), v)

    (site,) = check(fn, rand(2, 4, N, 3 * N), rand(4, 4), rand(4, 4))
    assert site.dims == {"T": N, "S": N}


def test_queries_that_are_the_output_of_an_attention_with_as_many_keys_as_a_head_is_wide():
    def fn(q, k, v, before):
        for _ in range(2):
            s = torch.einsum("bhij,hg->bgij", q @ k.mT * 0.25, before)
            q = s.softmax(-1) @ v
        return q

    check(fn, rand(2, 4, N, N), rand(2, 4, N, N), rand(2, 4, N, N), rand(4, 4), sites=2)


def test_a_bias_that_is_a_sum_of_gathered_curves_is_computed_before():
    def fn(q, k, v, curves, distance):
        bias = curves.gather(-1, distance.expand(2, 2, 4, N, N)).sum(0)
        return ((q @ k.mT) * 0.25 + bias).softmax(-1) @ v

    (site,) = check(fn, *(rand(2, 4, N, 8) for _ in range(3)), rand(2, 2, 4, N, 40), torch.randint(40, (2, 1, 1, N, N)))
    assert site.decision is not None and site.decision.kernel != "rows"
