"""Describe many spellings of one mask with the same words."""

import pytest

from attnfx.ir import algebra as A
from attnfx.mask import describe
from attnfx.spec import B, H, I, J
from tests.mask.masks import (
    ALIGNED,
    CAUSAL,
    S,
    T,
    documents,
    masked,
    minus,
    n,
    near,
    neighbourhood,
    pad,
    same_block,
    window,
)

SQUARE = {"B": 2, "H": 4, "T": 64, "S": 64}


LONGER = {"B": 2, "H": 4, "T": 24, "S": 64}


TOKEN = {"B": 2, "H": 4, "T": 1, "S": 64}


@pytest.mark.parametrize(("keep", "sizes", "words"), [
    (A.TRUE, SQUARE, "none"),
    (A.lt(J, n(64)), SQUARE, "none"),
    (CAUSAL, SQUARE, "causal"),
    (CAUSAL, LONGER, "causal"),
    (ALIGNED, SQUARE, "causal"),
    (ALIGNED, LONGER, "causal (aligned to the last key)"),
    (ALIGNED, TOKEN, "none"),
    (A.not_(A.gt(J, I)), SQUARE, "causal"),
    (A.ge(A.mul(n(3), I), A.mul(n(3), J)), SQUARE, "causal"),
    (A.eq(A.minimum(I, J), J), SQUARE, "causal"),
    (A.lt(J, I), SQUARE, "strictly causal"),
    (A.and_(CAUSAL, window(8)), SQUARE, "sliding window of 8 keys, causal"),
    (A.and_(CAUSAL, A.le(minus(I, J), n(8))), SQUARE, "sliding window of 9 keys, causal"),
    (A.and_(CAUSAL, A.gt(J, minus(I, n(8)))), SQUARE, "sliding window of 8 keys, causal"),
    (A.not_(A.or_(A.lt(I, J), A.ge(minus(I, J), n(8)))), SQUARE, "sliding window of 8 keys, causal"),
    (A.and_(CAUSAL, window(64)), SQUARE, "causal"),
    (A.and_(ALIGNED, A.lt(minus(A.add(I, minus(S, T)), J), n(8))), LONGER,
     "sliding window of 8 keys, causal (aligned to the last key)"),
    (A.and_(ALIGNED, A.lt(minus(A.add(I, minus(S, T)), J), n(8))), TOKEN,
     "sliding window of 8 keys, causal (aligned to the last key)"),
    (near(4), SQUARE, "bidirectional window of 4"),
    (A.and_(A.le(minus(I, J), n(4)), A.le(minus(J, I), n(4))), SQUARE, "bidirectional window of 4"),
    (A.and_(A.le(minus(I, J), n(4)), A.le(minus(J, I), n(2))), SQUARE, "window of 4 keys back and 2 ahead"),
    (A.or_(CAUSAL, A.lt(J, n(16))), SQUARE, "prefix of 16 then causal"),
    (A.or_(CAUSAL, A.and_(A.lt(J, n(16)), A.lt(I, n(16)))), SQUARE, "prefix of 16 then causal"),
    (A.and_(CAUSAL, A.or_(window(8), A.lt(J, n(3)))), SQUARE,
     "sliding window of 8 keys, causal and sinks (first 3 keys always live)"),
    (A.or_(A.and_(CAUSAL, window(8)), A.and_(CAUSAL, A.le(J, n(2)))), SQUARE,
     "sliding window of 8 keys, causal and sinks (first 3 keys always live)"),
    (A.or_(near(4), A.lt(J, n(3)), A.lt(I, n(3))), SQUARE,
     "bidirectional window of 4 and sinks (first 3 keys always live) and first 3 queries see every key"),
    (same_block(16), SQUARE, "blocks of 16"),
    (A.and_(A.ge(J, minus(I, A.mod(I, n(16)))), A.lt(J, A.add(minus(I, A.mod(I, n(16))), n(16)))), SQUARE,
     "blocks of 16"),
    (A.and_(CAUSAL, same_block(16)), SQUARE, "causal and blocks of 16"),
    (A.le(A.floordiv(J, n(16)), A.floordiv(I, n(16))), SQUARE, "causal by blocks of 16"),
    (A.and_(A.le(A.floordiv(J, n(8)), A.floordiv(I, n(8))),
            A.le(A.floordiv(I, n(8)), A.add(A.floordiv(J, n(8)), n(2)))), SQUARE, "blocks of 8 with 2 before"),
    (A.and_(CAUSAL, A.eq(A.mod(minus(I, J), n(3)), n(0))), SQUARE, "causal and dilated by 3"),
    (A.and_(CAUSAL, A.eq(A.mod(I, n(4)), A.mod(J, n(4)))), SQUARE, "causal and dilated by 4"),
    (neighbourhood(8, 1), SQUARE, "fixed pattern"),
    (A.and_(A.lt(I, J), A.lt(J, I)), SQUARE, "nothing is live"),
    (A.and_(CAUSAL, A.or_(window(8), A.lt(H, n(2)))), SQUARE, "causal and different by head"),
    (A.and_(CAUSAL, pad(1)), SQUARE, "causal and padding (by c1)"),
    (A.and_(CAUSAL, A.lt(J, A.load(2, (B,), "i"))), SQUARE, "causal and padding (by c2)"),
    (A.and_(documents(0), CAUSAL, pad(1)), SQUARE, "causal and documents (by c0) and padding (by c1)"),
    (A.and_(pad(1), documents(0)), SQUARE, "documents (by c0) and padding (by c1)"),
    (A.load(0, (B, I, J), "b"), SQUARE, "dense mask (by c0)"),
    (A.load(1, (B, I), "b"), SQUARE, "query padding (by c1)"),
    (A.or_(CAUSAL, A.lt(J, A.load(0, (B,), "i"))), SQUARE, "prefix (by c0) then causal"),
    (A.gt(A.DOT, n(0.0)), SQUARE, "learned/opaque"),
    (A.lt(A.mul(I, J), n(99)), SQUARE, "learned/opaque"),
])  # fmt: skip
def test_words(keep, sizes, words):
    assert describe(masked(keep), sizes) == words
    assert describe(A.add(A.DOT, A.where(keep, n(0.0), n(-1e9))), sizes) == words


def test_a_documents_word_takes_one_capture_at_the_query_and_at_the_key():
    key = A.load(0, (B, J), "i")
    assert describe(masked(A.eq(A.load(1, (B, I), "i"), key)), SQUARE) == "learned/opaque"
    assert describe(masked(A.eq(A.load(0, (B, I), "f"), A.load(0, (B, J), "f"))), SQUARE) == "documents (by c0)"
    shifted = A.eq(A.load(0, (B, A.add(I, minus(S, T))), "i"), key)
    assert describe(masked(shifted), LONGER) == "documents (by c0)"


def test_a_bias_is_not_called_a_mask():
    slope = A.mul(A.load(0, (H,), "f"), A.to_float(minus(J, I)))
    assert describe(A.add(A.DOT, slope), SQUARE) == "none"
    assert describe(A.add(A.DOT, A.where(CAUSAL, n(0.0), n(-10000.0))), SQUARE) == "none"
