"""Join several sets of keys and values into one attention."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import assert_kept, assert_right, check, compiled, new_reports, qkv, rand

M, S = 8, 24  # keys of the two sets


def given():
    """Create query, and key and value of both sets."""
    return rand(2, 4, S, 16), rand(2, 4, M, 16), rand(2, 4, S, 16), rand(2, 4, M, 16), rand(2, 4, S, 16)


def scores_joined(q, k1, k2, v1, v2):
    s = torch.cat([q @ k1.mT, q @ k2.mT], -1) * 0.25
    return s.softmax(-1) @ torch.cat([v1, v2], -2)


def weights_split(q, k1, k2, v1, v2):
    w = (torch.cat([q @ k1.mT, q @ k2.mT], -1) * 0.25).softmax(-1)
    return w[..., :M] @ v1 + w[..., M:] @ v2


def the_second_part_first(q, k1, k2, v1, v2):
    w = (torch.cat([q @ k1.mT, q @ k2.mT], -1) * 0.25).softmax(-1)
    return w[..., M:] @ v2 + w[..., :M] @ v1


def a_mask_for_one_set(q, k1, k2, v1, v2):
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    s2 = ((q @ k2.mT) * 0.25).masked_fill(future, float("-inf"))
    a, b = torch.cat([q @ k1.mT * 0.25, s2], -1).softmax(-1).split([M, S], -1)
    return a @ v1 + b @ v2


def memories_of_all_batches(q, k1, k2, v1, v2):
    """Compute attention whose first set of keys is shared by all batch elements."""
    s = torch.cat([torch.einsum("bhid,hjd->bhij", q, k1[0]), q @ k2.mT], -1) * 0.25
    w = s.softmax(-1)
    return torch.einsum("bhij,hjd->bhid", w[..., :M], v1[0]) + w[..., M:] @ v2


def three_sets(q, k1, k2, v1, v2):
    w = (torch.cat([q @ k1.mT, q @ k2.mT, q @ k1.flip(-1).mT], -1) * 0.25).softmax(-1)
    return w[..., :M] @ v1 + w[..., M : M + S] @ v2 + w[..., M + S :] @ v1.flip(0)


def a_sink_between(q, k1, k2, v1, v2):
    sink = torch.zeros(2, 4, S, 1)
    w = (torch.cat([sink, q @ k1.mT, q @ k2.mT], -1) * 0.25).softmax(-1)[..., 1:]
    return w[..., :M] @ v1 + w[..., M:] @ v2


def blocks_beside_memories(q, k1, k2, v1, v2):
    """Compute attention in which each block of queries reads its own keys and the whole first set."""
    blocks = [x.unflatten(2, (3, 8)) for x in (q, k2, v2)]
    near = torch.einsum("bhnid,bhnjd->bhnij", blocks[0], blocks[1])
    far = torch.einsum("bhnid,bhjd->bhnij", blocks[0], k1)
    w = (torch.cat([far, near], -1) * 0.25).softmax(-1)
    out = torch.einsum("bhnij,bhjd->bhnid", w[..., :M], v1) + torch.einsum("bhnij,bhnjd->bhnid", w[..., M:], blocks[2])
    return out.flatten(2, 3)


def one_block_beside_memories(q, k1, k2, v1, v2):
    near = torch.einsum("bhnid,bhnjd->bhnij", q[:, :, None], k2[:, :, None])
    far = torch.einsum("bhnid,bhjd->bhnij", q[:, :, None], k1)
    w = (torch.cat([far, near], -1) * 0.25).softmax(-1)
    out = torch.einsum("bhnij,bhjd->bhnid", w[..., :M], v1)
    return (out + torch.einsum("bhnij,bhnjd->bhnid", w[..., M:], v2[:, :, None]))[:, :, 0]


ONE = [scores_joined, weights_split, the_second_part_first, a_mask_for_one_set, memories_of_all_batches, three_sets,
       a_sink_between, blocks_beside_memories, one_block_beside_memories]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", ONE, ids=[fn.__name__ for fn in ONE])
def test_several_sets_of_keys_are_one_site(fn, dynamic):
    check(fn, *given(), dynamic=dynamic)


def test_dropout_over_all_sets_drops_at_its_rate():
    def fn(q, k1, k2):
        w = F.dropout(torch.cat([q @ k1.mT, q @ k2.mT], -1).mul(0.25).softmax(-1), 0.25)
        return w[..., :M] @ torch.ones(2, 4, M, 8) + w[..., M:] @ torch.ones(2, 4, S, 8)

    with new_reports() as filed:
        sums = compiled(fn)(*given()[:3])
    assert [s.rewritten for s in filed[-1].sites] == [True]
    assert 0.9 < sums.mean().item() < 1.1 and sums.std().item() > 0.01


def of_other_queries(q, k1, k2, v1, v2):
    w = (torch.cat([q.flip(0) @ k1.mT, q @ k2.mT], -1) * 0.25).softmax(-1)
    return w[..., :M] @ v1 + w[..., M:] @ v2


def with_a_gap(q, k1, k2, v1, v2):
    w = (torch.cat([q @ k1.mT, q @ k2.mT], -1) * 0.25).softmax(-1)
    return w[..., : M - 1] @ v1[:, :, 1:] + w[..., M:] @ v2


def overlapping(q, k1, k2, v1, v2):
    w = (torch.cat([q @ k1.mT, q @ k2.mT], -1) * 0.25).softmax(-1)
    return w[..., : M + 1] @ v2[:, :, : M + 1] + w[..., M:] @ v2


def written_in_between(q, k1, k2, v1, v2):
    q = q.clone()
    first = q @ k1.mT
    q.mul_(2.0)
    w = (torch.cat([first, q @ k2.mT], -1) * 0.25).softmax(-1)
    return w[..., :M] @ v1 + w[..., M:] @ v2


def test_sets_that_are_written_in_between_are_kept():
    assert_kept(written_in_between, *given(), code="rows_mixed", train=False)


@pytest.mark.parametrize(("fn", "sites"), [(of_other_queries, 1), (with_a_gap, 2), (overlapping, 2)])
def test_sets_that_are_not_one_attention_are_whole_rows(fn, sites):
    check(fn, *given(), sites=sites)


def test_keys_along_the_rows_and_along_the_columns_are_not_expanded():
    """The keys of a row lack the columns, those of a column lack the rows: together they would have all queries."""

    def fn(q, k, v):
        rows, columns = torch.einsum("byxd,byzd->byxz", q, k), torch.einsum("byxd,bzxd->byxz", q, k)
        w = torch.cat([rows, columns], -1).softmax(-1)
        out = torch.einsum("byxz,byzd->byxd", w[..., :9], v)
        return out + torch.einsum("byxz,bzxd->byxd", w[..., 9:], v)

    check(fn, *(rand(2, 7, 9, 8) for _ in range(3)), sites=2)


def test_a_single_key_beside_the_others_is_a_set():
    def fn(q, k, v):
        pooled, u = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
        w = torch.cat([q @ pooled.mT, q @ k.mT], -1).softmax(-1)
        return w[..., :1] @ u + w[..., 1:] @ v

    for t in (20, 1):
        (site,) = check(fn, *qkv(t=t, s=20))
        assert site.spec is not None and site.dims["S"] == 21


def test_a_product_with_an_added_tensor_keeps_it():
    def fn(q, k1, k2, v1, v2):
        q, k1, k2, v1, v2 = (x.flatten(0, 1) for x in (q, k1, k2, v1, v2))
        w = (torch.cat([q @ k1.mT, q @ k2.mT], -1) * 0.25).softmax(-1)
        return torch.bmm(w[..., :M], v1) + torch.baddbmm(q, w[..., M:], v2)

    assert_right(fn, *given())


def test_weights_that_are_cast_up_stay_apart():
    def fn(q, k1, k2, v1, v2):
        w = (torch.cat([q.half() @ k1.half().mT, q.half() @ k2.half().mT], -1) * 0.25).softmax(-1)
        return w[..., :M].float() @ v1 + w[..., M:].float() @ v2

    assert_right(fn, *given(), train=False, exact=False, tolerance=2e-3)
