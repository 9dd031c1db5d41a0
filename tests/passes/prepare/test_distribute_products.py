"""Multiply before rows are spread, in sums and einsums, and read other names of products."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import assert_right, check, compiled, qkv, rand

INF = float("inf")


def causal(q, k):
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


# -- products written as a sum ------------------------------------------------------------------------
@pytest.mark.parametrize("keepdim", [False, True])
def test_products_by_broadcasting(keepdim):
    def fn(q, k, v):
        s = (q[:, :, :, None] * k[:, :, None]).sum(-1, keepdim=keepdim) * 0.3
        return ((s[..., 0] if keepdim else s).softmax(-1)[..., None] * v[:, :, None]).sum(dim=-2)

    check(fn, *qkv())


def test_products_of_expanded_operands():
    def fn(q, k, v):
        t, s = q.shape[2], k.shape[2]
        wide, other = q[:, :, :, None].expand(-1, -1, -1, s, -1), k[:, :, None].expand(-1, -1, t, -1, -1)
        return ((wide * other).sum(-1) * 0.3).softmax(-1) @ v

    check(fn, *qkv())


def test_an_operand_that_changes_before_the_sum_was_read_before():
    def fn(q, k, v):
        product = q[:, :, :, None] * k[:, :, None]
        k.mul_(2.0)
        return (product.sum(-1) * 0.3).softmax(-1) @ v

    args = qkv()
    want = fn(*(x.clone() for x in args))
    torch.testing.assert_close(compiled(fn)(*args), want)


def test_a_sum_in_an_autocast_region_keeps_its_precision():
    def fn(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return (q[:, :, :, None] * k[:, :, None]).sum(-1)

    q, k, _ = qkv()
    torch.testing.assert_close(compiled(fn)(q, k, None), fn(q, k, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "equation, order",
    [("bqhk,bkhd,hde->bqe", (0, 1, 2)), ("hde,bkhd,bqhk->bqe", (2, 1, 0)), ("...qhk,...khd,hde->...qe", (0, 1, 2))],
)
def test_the_output_projection_stands_in_the_same_einsum(equation, order):
    def fn(q, k, v, o):
        weights = (torch.einsum("bqhd,bkhd->bqhk", q, k) * 0.3).softmax(-1)
        given = (weights, v, o)
        return torch.einsum(equation, *(given[n] for n in order))

    check(fn, rand(2, 24, 3, 8), rand(2, 20, 3, 8), rand(2, 20, 3, 8), rand(3, 8, 5))


# -- a maximum of all scores --------------------------------------------------------------------------
@pytest.mark.parametrize("most", [lambda s: s.max(), lambda s: s.amax((1, 2, 3), keepdim=True), lambda s: s.amax()])
def test_the_largest_of_all_scores_is_subtracted(most):
    def fn(q, k, v):
        s = (q @ k.mT) * 0.3
        e = (s - most(s)).exp()
        return (e / e.sum(-1, keepdim=True)) @ v, (s - most(s)).softmax(-1) @ v

    check(fn, *qkv(), sites=2)


@pytest.mark.parametrize("pick", [lambda b: b.max(), lambda b: b.min(), lambda b: b.amin((0, 1)), lambda b: b.sum()])
def test_a_number_made_of_other_numbers_stays(pick):
    def fn(q, k, v, b):
        return ((q @ k.mT) * pick(b) + b[0, 0]).softmax(-1) @ v

    (site,) = check(fn, *qkv(), rand(3, 4))
    assert str(site.spec) == "score   (dot * c1[]) + c0[0, 0]"  # c1 is the selected scalar


# -- other names of products ----------------------------------------------------------------------
def by_tensordot(q, k, v):
    heads = [torch.tensordot(x, y, dims=([1], [1])) for x, y in zip(q.flatten(0, 1), k.flatten(0, 1))]
    return torch.stack([torch.tensordot((s * 0.3).softmax(-1), z, dims=1) for s, z in zip(heads, v.flatten(0, 1))])


def by_inner(q, k, v):
    heads = [torch.inner(x, y) for x, y in zip(q.flatten(0, 1), k.flatten(0, 1))]
    return torch.stack([(s * 0.3).softmax(-1) @ z for s, z in zip(heads, v.flatten(0, 1))])


def by_linalg(q, k, v):
    return torch.linalg.matmul((torch.linalg.matmul(q, k.mT) * 0.3).softmax(-1), v)


def by_vecdot(q, k, v):
    scores = torch.linalg.vecdot(q.unsqueeze(3), k.unsqueeze(2)) * 0.3
    return torch.linalg.vecdot(scores.softmax(-1).unsqueeze(-2), v.mT.unsqueeze(2))


def by_cosine_similarity(q, k, v):
    q = torch.cat([q[:, :, :1] * 0, q[:, :, 1:2] * 1e-9, q[:, :, 2:]], 2)  # a norm of zero, and one below eps
    return (F.cosine_similarity(q.unsqueeze(3), k.unsqueeze(2), dim=-1) * 9).softmax(-1) @ v


def by_pairwise_distance(q, k, v):
    return (-F.pairwise_distance(q.unsqueeze(3), k.unsqueeze(2))).softmax(-1) @ v


def by_exponentials_of_distances(q, k, v):
    w = torch.exp(-(torch.cdist(q, k) ** 2))
    return (w / w.sum(-1, keepdim=True)) @ v


SPELLINGS = [by_tensordot, by_inner, by_linalg, by_vecdot, by_cosine_similarity, by_pairwise_distance,
             by_exponentials_of_distances]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", SPELLINGS)
def test_other_names_of_products(fn, dynamic):
    check(fn, *qkv(h=2, t=13, s=11), dynamic=dynamic)


def test_a_chain_of_matrices():
    def fn(q, w, k):
        return torch.linalg.multi_dot([q, w, k.T]).softmax(-1) @ k

    check(fn, rand(13, 8), rand(8, 8), rand(11, 8))


def test_a_sum_of_products_is_not_rounded_by_the_callers_autocast():
    """Autocast keeps a sum in float32, but would round the equivalent matrix product."""

    def fn(q, k, v):
        s = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1).masked_fill(~causal(q, k), torch.finfo(torch.float32).min)
        return s, s.softmax(-1) @ v

    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (scores, out), (want, want_out) = compiled(fn)(q, k, v), fn(q, k, v)
    torch.testing.assert_close(scores, want)
    torch.testing.assert_close(out, want_out, atol=1e-2, rtol=1e-2)


def test_an_operand_that_is_expanded_under_no_grad_gets_no_gradient():
    def fn(q, k, v):
        wide = k.unsqueeze(2)
        with torch.no_grad():
            wide = wide.expand(-1, -1, q.shape[2], -1, -1)
        return ((q.unsqueeze(3) * wide).sum(-1) * 0.3).softmax(-1) @ v

    assert_right(fn, *qkv(), inner="eager")


def test_a_sum_over_a_dimension_that_both_operands_repeat():
    def fn(q, k, v):
        wide, other = q[:, :, :, None, :1].expand(-1, -1, -1, -1, 5), k[:, :, None, :, :1].expand(-1, -1, -1, -1, 5)
        scores = (wide * other).sum(-1)
        return scores.softmax(-1) @ v

    assert_right(fn, *qkv())


def test_operands_that_are_read_along_their_diagonal():
    def fn(q, k, v):
        scores = (q.diagonal(dim1=0, dim2=1)[:, None] * k.diagonal(dim1=0, dim2=1)[None]).sum(-2)
        return scores.permute(2, 0, 1).softmax(-1) @ v[0, 0]

    assert_right(fn, *qkv(b=4, h=4))


# -- rows, keys or sums over several dimensions -------------------------------------------------------
def keys_of_a_grid(q, k, v):
    s = torch.einsum("bijhc,bxyhc->bhijxy", q, k) * 0.3
    w = s.flatten(2, 3).flatten(3).softmax(-1).view(s.shape)
    return torch.einsum("bhijxy,bxyhc->bijhc", w, v)


def with_decomposed_positions(q, k, v):
    rows, columns = torch.linspace(-1, 1, 24).view(4, 1, 6, 1), torch.linspace(-1, 1, 15).view(3, 1, 5)
    s = torch.einsum("bijhc,bxyhc->bhijxy", q, k) * 0.3 + rows + columns
    return torch.einsum("bhijxy,bxyhc->bijhc", s.flatten(4).softmax(-1).view(s.size()), v)


def causal_grid(q, k, v):
    s = torch.einsum("bijhc,bxyhc->bhijxy", q, q).reshape(2, 3, 12, 12)
    s = s.masked_fill(~causal(s, s), -INF)
    return torch.einsum("bhijxy,bxyhc->bijhc", s.softmax(-1).view(2, 3, 4, 3, 4, 3), q)


def points_of_several_numbers(q, k, v):
    w = torch.einsum("bihc,bjhc->bhij", q.flatten(1, 2), k.flatten(1, 2)).softmax(-1)
    return torch.einsum("bhij,bjhpc->bihpc", w, v.flatten(1, 2).unflatten(-1, (4, 2)))


def along_one_side_of_the_grid(q, k, v):
    return torch.einsum("bhijxy,bxyhc->bijxhc", torch.einsum("bijhc,bxyhc->bhijxy", q, k).softmax(-1), v)


def grid():
    return rand(2, 4, 3, 3, 8), rand(2, 6, 5, 3, 8), rand(2, 6, 5, 3, 8)


ON_GRIDS = [keys_of_a_grid, points_of_several_numbers, along_one_side_of_the_grid]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", ON_GRIDS)
def test_dimensions_that_follow_one_another_are_one(fn, dynamic):
    check(fn, *grid(), dynamic=dynamic)


@pytest.mark.parametrize("fn", [with_decomposed_positions, causal_grid])
def test_scores_of_a_grid_with_positions_and_masks(fn):
    check(fn, *grid())


def summed_over_both_sides(q, k, v):
    """The weights of each side sum to one: together, they are not a softmax."""
    return torch.einsum("bhijxy,bxyhc->bijhc", torch.einsum("bijhc,bxyhc->bhijxy", q, k).softmax(-1), v)


def flattened_in_another_order(q, k, v):
    w = torch.einsum("bijhc,bxyhc->bhijyx", q, k).flatten(4).softmax(-1).view(2, 3, 4, 3, 5, 6)
    return torch.einsum("bhijyx,bxyhc->bijhc", w, v)


def a_dimension_of_size_one_is_broadcast(q, k, v):
    w = torch.einsum("bihc,bxyhc->bhixy", q[:, :, 0], k[:, :1]).flatten(3).softmax(-1)
    return torch.einsum("bhixy,bxyhc->bihc", w.view(2, 3, 4, 1, 5), v)


@pytest.mark.parametrize(
    "fn", [summed_over_both_sides, flattened_in_another_order, a_dimension_of_size_one_is_broadcast]
)
def test_dimensions_that_are_not_one_stay_apart(fn):
    assert_right(fn, *grid())


@pytest.mark.parametrize("train", [False, True])
def test_pairs_of_rows_from_one_table_are_multiplied_as_they_are(train):
    """Two lookups in one product: neither is left out."""

    def fn(queries, keys, table):
        q, k = F.embedding(queries, table), F.embedding(keys, table)
        return (q[:, :, None] * k[:, None]).sum(-1).softmax(-1) @ k

    def chosen(queries, keys, table):
        q, k = table[queries], table.index_select(0, keys.flatten()).view(2, 21, 8)
        return (q[:, :, None] * k[:, None] * 0.5).sum(-1).softmax(-1) @ k

    queries, keys = torch.randint(0, 31, (2, 7)), torch.randint(0, 31, (2, 21))
    for one in (fn, chosen):
        check(one, queries, keys, rand(31, 8), train=train)


# -- products without a sum ------------------------------------------------------------------------
def mask_after_the_softmax(q, k, v, m):
    w = torch.einsum("bhid,bhjd->bijh", q, k).softmax(2)
    return torch.einsum("bijh,bhjd->bihd", torch.einsum("bijh,bij->bijh", w, m), v)


def mask_of_whole_rows(q, k, v, m):
    s = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
    w = (s - s.cumsum(-1)).softmax(-1)
    return torch.einsum("bij,bhij->bhij", m, w) @ v


def scores_scaled_for_each_pair(q, k, v, m):
    s = torch.einsum("bhij,bij->bijh", q @ k.mT * 0.3, m)
    return s.softmax(2).permute(0, 3, 1, 2) @ v


def one_batch_element(q, k, v, m):
    return torch.einsum("bhij,bij->bhij", (q @ k.mT * 0.3).softmax(-1), m[:1]) @ v


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fn", [mask_after_the_softmax, mask_of_whole_rows, scores_scaled_for_each_pair, one_batch_element]
)
def test_an_einsum_without_a_sum_is_a_multiplication(fn, dynamic):
    check(fn, *qkv(t=9, s=11), rand(2, 9, 11), dynamic=dynamic)
