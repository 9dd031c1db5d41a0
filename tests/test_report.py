"""What a report says of a site: heads, sizes, mask, dropout, in words and for each spelling."""

import pytest
import torch

import attnfx
from tests.support import rand

SCALE = 0.25


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def said(fn, *args, **options):
    (site,) = attnfx.explain(fn, **options)(*args).sites
    return site.summary()


@pytest.mark.parametrize("batch, words", [(1, "batch 1"), (3, "batch 3")])
def test_heads_are_heads_whatever_the_batch(batch, words):
    shapes = [rand(batch, 6, 20, 8) for _ in range(3)]
    assert said(attend, *shapes) == f"6 heads, 20 x 20 x 8, {words}"


def test_heads_are_heads_where_the_output_is_transposed():
    def fn(q, k, v):
        return torch.einsum("bhij,bhjd->bihd", torch.einsum("bihd,bhjd->bhij", q, k).softmax(-1), v)

    assert said(fn, rand(1, 20, 6, 8), rand(1, 6, 30, 8), rand(1, 6, 30, 8)) == "6 heads, 20 x 30 x 8, batch 1"


def test_grouped_heads_and_widths_are_named():
    def fn(q, k, v):
        return attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))

    assert said(fn, rand(1, 6, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 20, 4)) == (
        "6 heads (2 for keys), 20 x 20 x 8/4, batch 1"
    )


def test_dropout_is_named():
    def fn(q, k, v):
        return torch.dropout(((q @ k.mT) * SCALE).softmax(-1), 0.125, True) @ v

    assert said(fn, *[rand(2, 6, 20, 8) for _ in range(3)]) == "6 heads, 20 x 20 x 8, batch 2, dropout 0.125"


def test_a_kept_site_says_why_and_a_rewritten_one_what_is_assumed():
    keep = torch.ones(20, 20, dtype=torch.bool).tril()

    def fn(q, k, v):
        return ((q @ k.mT) * SCALE).masked_fill(~keep, -1e9).softmax(-1) @ v

    operands = [rand(2, 6, 20, 8) for _ in range(3)]
    kept, always = (attnfx.explain(fn, rewrite=how)(*operands) for how in ("cost", "always"))
    assert "kept: a rewrite is predicted to take" in str(kept).replace("\n", " ") or "kept" in str(kept)
    assert "assumes that" in " ".join(always.sites[0].notes)
