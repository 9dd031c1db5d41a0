"""Compute sums and means of the weights without materializing the weights, and reject other uses of them."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import check, compiled, new_reports, qkv, rand

T, S = 40, 56


def inputs(**sizes):
    return qkv(**{"t": T, "s": S, **sizes})


def weights_of(q, k):
    return ((q @ k.mT) * 0.25).softmax(-1)


def mean_over_heads(q, k, v):
    w = weights_of(q, k)
    return w @ v, w.mean(dim=1).sum(1)


def received(q, k, v):
    w = weights_of(q, k)
    return w @ v, w.sum(dim=(1, 2))


def before_the_product(q, k, v):
    w = weights_of(q, k)
    seen = w.sum(2, keepdim=True)
    return w @ v, seen * 2.0


def by_batches_of_heads(q, k, v):
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    w = torch.bmm(q * 0.25, k.mT).softmax(-1)
    return torch.bmm(w, v).view(b, h, t, d), w.view(b, h, t, -1).mean(1).mean(1)


def by_hand(q, k, v):
    s = torch.einsum("bhid,bhjd->bhij", q, k) * 0.25
    e = (s - s.amax(-1, keepdim=True)).exp()
    w = e / e.sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bihd", w, v), w.sum((0, 2))


def entropy(q, k, v):
    w = weights_of(q, k)
    return w @ v, -(w * (w + 1e-6).log()).sum(-1)


def concentration(q, k, v):
    w = weights_of(q, k)
    return w @ v, w.square().sum(dim=-1).mean(-1), w[..., :].sum((2, 3))


def masked(q, k, v):
    keep = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2]) >= torch.arange(k.shape[2])
    w = ((q @ k.mT) * 0.25).masked_fill(~keep, float("-inf")).softmax(-1)
    return w @ v, w.sum((1, 2))


def everything(q, k, v):
    w = weights_of(q, k)
    return w @ v, w.square().sum()


FORMS = [mean_over_heads, received, before_the_product, by_batches_of_heads, by_hand, entropy, concentration, masked,
         everything]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", FORMS, ids=[fn.__name__ for fn in FORMS])
def test_a_sum_of_the_weights_is_computed_without_them(fn, dynamic, shapes_left):
    (site,) = check(fn, *inputs(), dynamic=dynamic)
    assert "sums of its weights are computed without storing the weights (test_weight_reductions.py:" in site.notes[-1]
    large = {s for s in shapes_left if s[-2:] == (T, S)}
    if fn in (mean_over_heads, by_batches_of_heads):  # the result itself has a value for each pair
        large.remove((2, T, S))
    assert not large


def test_pytorchs_own_module_with_weights_averaged_over_heads():
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = rand(2, T, 32)
    (site,) = check(module, x, x, x, kwargs=dict(need_weights=True))
    assert "sums of its weights" in site.notes[-1]


def test_grouped_heads():
    def fn(q, k, v):
        b, h, t, d = q.shape
        w = torch.einsum("bgrid,bgjd->bgrij", q.view(b, 2, h // 2, t, d), k).mul(0.25).softmax(-1)
        return torch.einsum("bgrij,bgjd->bgrid", w, v), w.mean((1, 2)).amax(1)

    (site,) = check(fn, *inputs(g=2))
    assert "sums of its weights" in site.notes[-1]


def test_dropped_weights_are_of_the_same_draw_as_the_output():
    def fn(q, k, v):
        w = F.dropout(weights_of(q, k), 0.4, True)
        return w @ v, w.sum(2)

    q, k, v = inputs()
    out, sums = compiled(fn)(q, k, v)
    torch.testing.assert_close(sums.unsqueeze(2) @ v, out.sum(2, keepdim=True), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sums.sum(-1), torch.full_like(sums.sum(-1), T))


def test_weights_before_dropout_are_added_up_whole():
    def fn(q, k, v):
        w = weights_of(q, k)
        return F.dropout(w, 0.4, True) @ v, w.sum((1, 3))

    _, sums = compiled(fn)(*inputs())
    torch.testing.assert_close(sums, torch.full_like(sums, 4.0))


def test_two_draws_are_not_taken_for_one():
    """The sum has other dropout than the output, so it is kept."""

    def fn(q, k, v):
        w = weights_of(q, k)
        return F.dropout(w, 0.4, True) @ v, F.dropout(w, 0.4, True).sum(2)

    with new_reports() as filed:
        compiled(fn)(*inputs())
    assert not any("sums" in note for site in filed[0].sites for note in site.notes)


def test_no_gradient_flows_through_detached_weights():
    def fn(q, k, v):
        w = weights_of(q, k)
        return w @ v, w.detach().square().sum((1, 2)) * v.sum()

    check(fn, *inputs())


def test_sums_of_other_weights_than_the_attentions_are_left_alone():
    def fn(q, k, v):
        w, other = weights_of(q, k), ((q @ k.mT) * (0.5)).softmax(-1)
        over_queries = ((q @ k.mT) * 0.25).softmax(-2)
        return w @ v, other.square().sum((1, 2)), over_queries.square().sum((1, 2))

    with new_reports() as filed:
        check(fn, *inputs())
    assert not any("sums" in note for site in filed[0].sites for note in site.notes)
    assert [softmax.code for softmax in filed[0].others] == ["no_values"] * 2


def test_a_sum_that_the_values_need_is_left_as_it_was():
    def fn(q, k, v):
        w = weights_of(q, k)
        return w @ (v * w.sum(2).unsqueeze(-1))

    (site,) = check(fn, *inputs())
    assert not site.notes


def causal(q, k):
    keep = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2]) >= torch.arange(k.shape[2])
    return ((q @ k.mT) * 0.25).masked_fill(~keep, float("-inf")).softmax(-1)


def of_the_class_token(q, k, v):
    w = weights_of(q, k)
    return w @ v, w[:, :, 0, 1:].mean(1)


def of_the_last_rows(q, k, v):
    w = causal(q, k)
    return w @ v, w[:, :, -1], w[:, :, 30:34]


def best_key(q, k, v):
    w = causal(q, k)
    return w @ v, w.argmax(-1).double(), w.argmax(dim=3, keepdim=True).double()


def largest(q, k, v):
    w = weights_of(q, k)
    most, at = w.max(dim=-1)
    return w @ v, most, at.double()


def of_each_key(q, k, v):
    w = causal(q, k)
    most, at = w.max(2)
    return w @ v, most, at.double(), w.argmax(-2, keepdim=True).double()


def of_rows_without_a_key(q, k, v):
    dead = torch.arange(q.shape[2])[:, None] < 3
    w = ((q @ k.mT) * 0.25).masked_fill(dead, float("-inf")).softmax(-1)
    return (w @ v)[:, :, 3:], w.argmax(-1).double(), w.max(-1).values[:, :, 3:], w[:, :, 3]


PARTS = [of_the_class_token, of_the_last_rows, best_key, largest, of_each_key, of_rows_without_a_key]


@pytest.mark.parametrize("fn", PARTS, ids=[fn.__name__ for fn in PARTS])
def test_rows_of_the_weights_and_their_largest_are_computed_without_them(fn, shapes_left):
    (site,) = check(fn, *inputs(), dynamic=False, train=fn is not of_rows_without_a_key)
    assert "parts of its weights are computed without storing the weights" in site.notes[-1]
    assert not {s for s in shapes_left if s[-2:] == (T, S)}


def test_the_largest_of_each_key_without_its_row_is_computed_where_it_has_no_gradient(shapes_left):
    def fn(q, k, v):
        w = causal(q, k)
        return w @ v, w.amax(-2), w.amax((2,), keepdim=True)

    (site,) = check(fn, *inputs(), dynamic=False, train=False)
    assert "parts of its weights are computed without storing the weights" in site.notes[-1]
    assert not {s for s in shapes_left if s[-2:] == (T, S)}
    (site,) = check(fn, *inputs())
    assert not site.notes


def smallest_key(q, k, v):
    w = weights_of(q, k)
    return w @ v, w.amin(-1), w.amax(-1, keepdim=True)


def best_keys(q, k, v):
    w = weights_of(q, k)
    most, at = w.topk(3, dim=-1)
    return w @ v, most, at.double()


def some_columns(q, k, v):
    w = weights_of(q, k)
    return w @ v, w[..., 0], w[..., 2:5]


def spread(q, k, v):
    w = weights_of(q, k)
    return w @ v, w.std(-1), w.norm(dim=-1), torch.special.entr(w).sum(-1), w.cumsum(-1)[..., 9]


def of_dead_rows(q, k, v):
    dead = torch.arange(q.shape[2])[:, None] < 3
    w = ((q @ k.mT) * 0.25).masked_fill(dead, float("-inf")).softmax(-1)
    return (w @ v)[:, :, 3:], w.amax(-1)[:, :, 3:], w[..., 0]


def for_a_log(q, k, v):
    w = weights_of(q, k)
    return w @ v, w.detach().amax(-1).mean()


BY_ROW = [smallest_key, best_keys, some_columns, spread, of_dead_rows, for_a_log]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", BY_ROW, ids=[fn.__name__ for fn in BY_ROW])
def test_what_is_made_of_each_row_of_the_weights_is_computed_with_it(fn, dynamic, shapes_left):
    (site,) = check(fn, *inputs(), dynamic=dynamic, train=fn is not of_dead_rows)
    assert "parts of its weights are computed row by row together with it (test_weight_reductions.py:" in site.notes[-1]
    assert not {s for s in shapes_left if s[-2:] == (T, S)}


def test_what_mixes_rows_is_read_off_the_weights():
    def fn(q, k, v):
        w = weights_of(q, k)
        return w @ v, w.std(-1), w.std(2), w.diagonal(dim1=-2, dim2=-1)

    (site,) = check(fn, *inputs())
    assert not site.notes


def agrees(fn, read, **options):
    """Return whether a compiled function's second result matches the dropped weights of its output."""
    q, k, _ = inputs()
    weights, said = compiled(fn, **options)(q, k, torch.eye(S).expand(2, 4, S, S))
    return torch.allclose(read(weights), said, atol=1e-5)


READ = {
    "whole": lambda w: w,
    "row": lambda w: w[:, :, 0],
    "column": lambda w: w[..., 0],
    "sum": lambda w: w.sum(2),
    "largest": lambda w: w.max(-1).values,
    "product": lambda w: w @ (w.mT @ w),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_what_is_read_of_dropped_weights_is_of_the_draw_of_the_output(read):
    def fn(q, k, v):
        w = F.dropout(weights_of(q, k), 0.4, True)
        return w @ v, read(w)

    assert agrees(fn, read)


def test_two_products_of_dropped_weights_are_of_one_draw():
    def fn(q, k, v):
        w = F.dropout(weights_of(q, k), 0.4, True)
        return w @ v, torch.einsum("bhij,bhjd->bhid", w, v)

    with new_reports() as filed:
        assert agrees(fn, lambda w: w)
    assert [site.refusal.code for site in filed[-1].sites] == ["one_draw"] * 2


def test_chunks_whose_dropped_weights_are_returned_are_of_one_draw():
    def fn(q, k, v):
        parts = [F.dropout(weights_of(x, k), 0.4, True) for x in q.split(20, 2)]
        return torch.cat([w @ v for w in parts], 2), torch.cat(parts, 2)

    assert agrees(fn, lambda w: w)


def test_rows_of_dropped_weights_and_parts_along_other_dims_are_read_off_the_weights():
    def fn(q, k, v):
        w = weights_of(q, k)
        return w @ v, F.dropout(w, 0.4, True)[:, :, 0].sum() * 0, w[:, 1], w[..., 0], w.max(1).values, w.max()

    (site,) = check(fn, *inputs(), dynamic=False)
    assert not site.notes


def weights_too(q, k, v):
    w = weights_of(q, k)
    return w @ v, w.mean(1), w


def test_weights_that_are_returned_are_kept_as_they_are_by_the_cost_rule():
    """The weights are materialized anyway, so computing the attention separately would be wasted work."""
    q, k, v = inputs(t=512, s=512)
    with new_reports() as filed:
        compiled(weights_too, rewrite="cost")(q, k, v)
    (site,) = filed[0].sites
    assert (
        not site.rewritten and "the weights themselves are read at test_weight_reductions.py:" in site.decision.reason
    )
    (site,) = check(weights_too, q, k, v)
    assert not site.notes
