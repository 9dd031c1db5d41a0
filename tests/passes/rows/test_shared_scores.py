"""Compute everything that reads the scores or weights of one attention together, in chunks of rows."""

import torch
import torch.nn.functional as F

from attnfx.passes.rows import find_region
from tests.support import assert_kept, check, compare, qkv, rand

T, S = 40, 56


def large(shapes):
    return [s for s in shapes if T in s and S in s]


def several_products(q, k, v, points, pairs):
    """Weights of scalars, points and pairs, as in AlphaFold's structure module (Jumper et al. 2021)."""
    w = (q @ k.mT * 0.3).softmax(-1)
    scalars = (w @ v).transpose(1, 2).flatten(2)
    near = (w[:, :, None, :, :, None] * points.permute(0, 2, 4, 1, 3)[:, :, :, None]).sum(-2).permute(0, 3, 1, 4, 2)
    return scalars, near, w.transpose(1, 2) @ pairs


def test_products_of_one_set_of_weights_are_one_region(shapes_left):
    """The operands of the later products come after the first product's result is read."""
    args = *qkv(t=T, s=S), rand(2, S, 4, 3, 5), rand(2, T, S, 6)
    sites = check(several_products, *args, sites=3)
    assert {s.decision.kernel for s in sites} == {"rows"}
    assert not [s for s in large(shapes_left) if len(s) == 4 and s != (2, T, S, 6)]


def test_the_region_of_several_products_is_searched_for_once(monkeypatch):
    searches = []
    search = find_region._Walk.region
    monkeypatch.setattr(find_region._Walk, "region", lambda walk: searches.append(walk) or search(walk))
    check(several_products, *qkv(t=T, s=S), rand(2, S, 4, 3, 5), rand(2, T, S, 6), sites=3)
    assert len({walk.final for walk in searches}) == 1


def test_results_with_as_many_rows_as_keys_are_not_scores():
    check(several_products, *qkv(t=T), rand(2, T, 4, 3, 5), rand(2, T, T, 6), sites=3)


def test_a_second_product_that_takes_its_sizes_from_the_weights():
    """The padded weights leave the region, and the first tensor with one key more is among its own values."""

    def fn(q, k, v, e):
        w = (q @ k.mT * 0.3).softmax(-1)
        b, h, t, s = w.shape
        skewed = F.pad(w, (1, 0)).reshape(b, h, s + 1, t)[:, :, 1:].reshape(b, h, t, s)
        return w @ v, skewed @ e

    (site,) = check(fn, *qkv(t=T, s=S), rand(S, 8), dynamic=True)
    assert site.decision.kernel == "rows"


def test_a_maximum_of_each_row_of_scores_is_computed_beside(shapes_left):
    """Both directions from one product of scores (Seo et al. 2017): the second softmax runs over the rows' maxima."""

    def fn(h, u, keep):
        s = (h @ u.mT).masked_fill(~keep[:, None], -1e32)
        return s.softmax(-1) @ u, s.max(-1).values.softmax(-1)[:, None] @ h

    keep = torch.arange(S)[None] < torch.tensor([S, 31])[:, None]
    (site,) = check(fn, rand(2, T, 16), rand(2, S, 16), keep)
    assert site.decision.kernel == "rows"
    assert not large(shapes_left)


def test_a_tensor_that_the_last_product_adds_is_kept():
    def fn(q, k, v, r):
        return torch.baddbmm(r, (torch.bmm(q, k.mT) * 0.3).softmax(-1), v, beta=0.5, alpha=2.0)

    (site,) = check(fn, rand(2, T, 8), rand(2, S, 8), rand(2, S, 8), rand(2, T, 8))
    assert site.decision.kernel == "rows"


def test_scores_that_are_returned_leave_the_attention_as_it_is():
    def fn(q, k, v):
        s = q @ k.mT * 0.3
        return s.softmax(-1) @ v, s

    (site,) = check(fn, *qkv(t=T, s=S))
    assert site.decision.kernel != "rows"


# -- weights without a normalizer ------------------------------------------------------------------------
def by_a_triangular_product(s, masked):
    z, rest = F.logsigmoid(s).masked_fill(masked, -1e5), F.logsigmoid(-s).masked_fill(masked, 0)
    later = torch.ones(S, S, dtype=s.dtype).tril(-1)
    return (z + torch.einsum("bhij,jk->bhik", rest, later)).exp()


def by_cumulative_sums(s, masked):
    rest = F.logsigmoid(-s).masked_fill(masked, 0)
    return (F.logsigmoid(s).masked_fill(masked, -1e5) + rest.flip(-1).cumsum(-1).flip(-1) - rest).exp()


def test_stick_breaking_runs_by_whole_rows(shapes_left):
    """Each weight is a sigmoid times what later keys leave over (Tan et al. 2025); the rest of a row is returned."""
    for weights in (by_a_triangular_product, by_cumulative_sums):

        def fn(q, k, v, weights=weights):
            masked = torch.arange(q.shape[2])[:, None] < torch.arange(k.shape[2])
            a = weights(q @ k.mT * 0.3, masked)
            return a @ v, 1 - a.sum(-1)

        (site,) = check(fn, *qkv(t=T, s=S))
        assert site.decision.kernel == "rows"
        assert not [s for s in large(shapes_left) if len(s) == 4]


def test_experts_are_not_attention():
    """A layer for each expert is a batched product, and a gate lies between two of them."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (torch.nn.Parameter(rand(4, 8, 8, seed=n)) for n in range(2))

        def forward(self, x):
            return (torch.exp(x @ self.up).cumsum(-1) @ self.down).softmax(-1)

    assert not [s for r in compare(Experts(), rand(4, 16, 8)) for s in r.sites]


def test_a_softmax_over_row_maxima_alone_is_not_attention():
    def fn(q, k):
        return (q @ k.mT).amax(-1).softmax(-1)[:, None] @ q

    assert_kept(fn, rand(2, T, 16), rand(2, S, 16), code="not_attention")
