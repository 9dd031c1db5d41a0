"""Distinguish masks from biases: fills far below every score, fills that overflow, and values that are not fills."""

import math
from itertools import product

import pytest

from attnfx.ir import algebra as A
from attnfx.ir.interpret import evaluate
from attnfx.mask import live, mask_of
from attnfx.spec import AttentionSpec, H, I, J
from tests.mask.masks import CAUSAL, MIN, NO, masked, minus, n, near, pad


def test_the_mask_of_a_sum_is_the_conjunction_over_its_terms():
    finite = n(-1e9)
    score = A.add(A.DOT, A.where(CAUSAL, n(0.0), finite), A.where(pad(), n(0.0), finite))
    mask = mask_of(score)
    assert mask is not None
    assert mask.keep is A.and_(CAUSAL, pad())
    assert mask.fill == -1e9
    assert mask.assumption == "scores stay below 1e8 in magnitude, so that the fill -1e+09 masks"


@pytest.mark.parametrize("fill", [NO, MIN, n(-3.3895313892515355e38)])
def test_a_drowning_fill_needs_no_assumption(fill):
    mask = mask_of(masked(CAUSAL, fill))
    assert mask is not None
    assert (mask.keep, mask.fill, mask.assumption) == (CAUSAL, fill.value, None)


@pytest.mark.parametrize("score", [
    A.DOT,
    masked(CAUSAL, n(-10000.0)),
    masked(CAUSAL, n(-65504.0)),
    masked(CAUSAL, n(0.0)),
    A.add(A.DOT, A.where(CAUSAL, n(0.0), n(-65504.0))),
    A.add(A.DOT, n(-1e9)),
    A.maximum(masked(CAUSAL), n(-50.0)),
    A.mul(n(0.01), A.where(CAUSAL, A.DOT, n(-1e9))),
    A.unary("tanh", masked(CAUSAL)),
    A.mul(A.load(0, (H,), "f"), A.add(A.DOT, A.where(CAUSAL, n(0.0), n(-1e9)))),
])  # fmt: skip
def test_what_does_not_drown_is_no_mask(score):
    assert mask_of(score) is None


def test_the_least_float16_masks_under_a_rounding_to_float16():
    for score in (A.half(masked(CAUSAL, n(-65504.0))), A.half(A.add(A.DOT, A.where(CAUSAL, n(0.0), n(-65504.0))))):
        mask = mask_of(score)
        assert mask is not None
        assert (mask.keep, mask.fill) == (CAUSAL, -65504.0)
        assert mask.assumption == "scores stay below 6550.4 in magnitude, so that the fill -65504 masks"


def test_a_fill_that_float16_cannot_hold_is_minus_infinity_there():
    mask = mask_of(A.half(A.add(A.DOT, A.where(CAUSAL, n(0.0), n(-1e9)))))
    assert mask is not None
    assert mask.fill == -math.inf
    assert mask.assumption == "scores stay below 1e8 in magnitude, so that the fill -1e+09 masks"


def test_nested_fills_of_both_sides():
    score = A.where(pad(), A.where(CAUSAL, A.DOT, n(-1e9)), A.where(near(2), A.mul(n(2.0), A.DOT), NO))
    mask = mask_of(score)
    assert mask is not None
    assert mask.fill == -1e9
    for bit, i, j in product((True, False), range(8), range(8)):
        env, read = {"b": 0, "h": 0, "i": i, "j": j, "dot": 1.0}, lambda slot, index, bit=bit: bit
        assert evaluate(mask.keep, env, read) == (evaluate(score, env, read) > -1e8)


def test_without_a_normalizer_what_lives_is_what_is_not_zero():
    decay = A.unary("exp", A.to_float(minus(J, I)))
    linear = AttentionSpec(normaliser="none", weight=A.mul(A.where(CAUSAL, decay, n(0.0)), A.PROB))
    assert live(linear) is CAUSAL
    sigmoid = AttentionSpec(score=masked(CAUSAL), normaliser="none", weight=A.unary("sigmoid", A.PROB))
    assert live(sigmoid) is CAUSAL
    assert live(AttentionSpec(score=masked(CAUSAL), normaliser="none", weight=A.unary("tanh", A.PROB))) is A.TRUE
    assert live(AttentionSpec(weight=A.where(CAUSAL, A.PROB, n(0.0)))) is A.TRUE  # it still counts in the softmax
