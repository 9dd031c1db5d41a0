"""Canonicalize expressions: expressions with one meaning are one object."""

import math
from itertools import pairwise

import pytest

from attnfx.ir import algebra as A
from attnfx.ir.expr import show
from attnfx.ir.gradient import gradient
from attnfx.ir.serialize import dump, parse
from attnfx.spec import B, H, I, J

T, S, N = A.size("T"), A.size("S"), A.size("n0")
DOT, NEG, LOW = A.DOT, A.const(-math.inf), A.const(-3.4028234663852886e38)
PAD = A.load(0, (B, J), "b")
MASK = A.load(1, (B, J), "f")
BIAS = A.load(2, (H, I, J), "f")


def n(x):
    return A.const(x)


def minus(x, y):
    return A.sub(x, y)


def f(x):
    return A.to_float(x)


SAME = {
    "causal, by any comparison": [
        A.le(J, I),
        A.ge(I, J),
        A.not_(A.gt(J, I)),
        A.not_(A.lt(I, J)),
        A.lt(J, A.add(I, n(1))),
        A.le(minus(J, I), n(0)),
        A.ge(minus(I, J), n(0)),
        A.gt(minus(I, J), n(-1)),
        A.le(A.mul(n(2), J), A.mul(n(2), I)),
        A.le(A.mul(n(2), J), A.add(A.mul(n(2), I), n(1))),
        A.le(f(J), f(I)),
        A.lt(f(minus(J, I)), n(0.5)),
        A.ge(f(minus(I, J)), n(-0.5)),
        A.and_(A.le(J, I), A.TRUE),
        A.or_(A.le(J, I), A.FALSE),
        A.and_(A.le(J, I), A.ge(I, J)),
    ],
    "a window, by any comparison": [
        A.lt(minus(I, J), n(7)),
        A.le(minus(I, J), n(6)),
        A.not_(A.ge(minus(I, J), n(7))),
        A.gt(J, minus(I, n(7))),
        A.ge(J, minus(I, n(6))),
        A.gt(A.add(J, n(7)), I),
        A.lt(minus(f(I), f(J)), n(6.5)),
        A.ge(minus(J, I), n(-6)),
    ],
    "causal and window, in any order": [
        A.and_(A.le(J, I), A.lt(minus(I, J), n(7))),
        A.and_(A.lt(minus(I, J), n(7)), A.ge(I, J)),
        A.not_(A.or_(A.gt(J, I), A.ge(minus(I, J), n(7)))),
        A.where(A.le(J, I), A.lt(minus(I, J), n(7)), A.FALSE),
        A.minimum(A.le(J, I), A.lt(minus(I, J), n(7))),
    ],
    "aligned at the bottom, with symbolic sizes": [
        A.le(J, A.add(I, minus(S, T))),
        A.le(minus(J, S), minus(I, T)),
        A.ge(minus(A.add(I, S), T), J),
        A.not_(A.lt(A.add(I, S), A.add(J, T))),
    ],
    "masked by a choice, a fill or an addition": [
        A.where(A.le(J, I), DOT, NEG),
        A.where(A.gt(J, I), NEG, DOT),
        A.where(A.not_(A.gt(J, I)), DOT, NEG),
        A.add(DOT, A.where(A.le(J, I), n(0.0), NEG)),
        A.add(A.where(A.gt(J, I), NEG, n(0.0)), DOT),
        A.where(A.le(J, I), A.where(A.le(J, I), DOT, n(3.0)), NEG),
        A.where(A.le(J, I), DOT, A.where(A.le(J, I), n(3.0), NEG)),
    ],
    "a triangle of ones, compared with zero": [
        A.where(A.eq(A.where(A.le(minus(J, I), n(0)), n(1.0), n(0.0)), n(0.0)), NEG, DOT),
        A.where(A.le(J, I), DOT, NEG),
        A.where(A.to_bool(A.where(A.le(J, I), n(1.0), n(0.0))), DOT, NEG),
        A.where(A.gt(A.where(A.le(J, I), n(1), n(0)), n(0)), DOT, NEG),
        A.where(A.lt(A.where(A.le(J, I), n(1.0), n(0.0)), n(0.5)), NEG, DOT),
    ],
    "(1 - mask) * min": [
        A.add(DOT, A.mul(minus(n(1.0), f(PAD)), LOW)),
        A.add(DOT, A.mul(LOW, f(A.not_(PAD)))),
        A.add(DOT, A.where(PAD, n(0.0), LOW)),
        A.where(PAD, DOT, LOW),
        A.where(A.not_(PAD), LOW, DOT),
    ],
    "two masks with one fill": [
        A.where(A.le(J, I), A.where(PAD, DOT, NEG), NEG),
        A.where(PAD, A.where(A.le(J, I), DOT, NEG), NEG),
        A.where(A.and_(PAD, A.le(J, I)), DOT, NEG),
        A.add(DOT, A.where(PAD, n(0.0), NEG), A.where(A.le(J, I), n(0.0), NEG)),
        A.where(A.or_(A.not_(PAD), A.gt(J, I)), NEG, DOT),
    ],
    "a scale and a bias, in any order": [
        A.add(A.mul(n(0.25), DOT), BIAS),
        A.add(BIAS, A.div(DOT, n(4.0))),
        minus(A.div(DOT, n(4)), A.neg(BIAS)),
        A.mul(n(0.25), A.add(DOT, A.mul(n(4.0), BIAS))),
        A.add(A.mul(n(0.5), DOT, n(0.5)), BIAS),
        A.div(A.add(DOT, A.mul(BIAS, n(4.0))), n(4.0)),
    ],
    "alibi": [
        A.mul(A.load(3, (H,), "f"), f(minus(J, I))),
        A.mul(f(minus(J, I)), A.load(3, (H,), "f")),
        A.neg(A.mul(A.load(3, (H,), "f"), f(minus(I, J)))),
        A.mul(minus(f(J), f(I)), A.load(3, (H,), "f")),
    ],
    "a soft cap": [
        A.mul(n(30.0), A.unary("tanh", A.div(DOT, n(30.0)))),
        A.mul(A.unary("tanh", A.mul(n(1 / 30.0), DOT)), n(30.0)),
    ],
    "splitting and joining an index": [
        I,
        A.add(A.mul(n(4), A.floordiv(I, n(4))), A.mod(I, n(4))),
        A.floordiv(A.add(A.mul(n(5), I), n(3)), n(5)),
        A.mod(I, T),
        A.floordiv(A.add(A.mul(I, S), J), S),
        A.minimum(I, A.add(T, n(3))),
        A.maximum(I, n(0)),
        A.unary("abs", I),
        A.add(A.mul(A.floordiv(I, N), N), A.mod(I, N)),
    ],
    "what an index is below": [
        J,
        A.mod(A.add(A.mul(I, S), J), S),
        A.mod(A.add(A.mul(n(8), S, I), J), S),
        A.minimum(J, minus(S, n(1))),
        A.mod(J, S),
    ],
    "nested divisions": [
        A.floordiv(I, n(12)),
        A.floordiv(A.floordiv(I, n(3)), n(4)),
        A.floordiv(A.floordiv(I, n(4)), n(3)),
    ],
    "true": [
        A.TRUE,
        A.ge(I, n(0)),
        A.lt(I, T),
        A.lt(A.add(I, J), A.add(T, S)),
        A.le(A.floordiv(I, n(2)), T),
        A.not_(A.lt(J, n(0))),
    ],
    "false": [
        A.FALSE,
        A.lt(I, n(0)),
        A.eq(A.mul(n(2), I), A.add(A.mul(n(2), J), n(1))),
        A.eq(I, T),
        A.and_(PAD, A.not_(PAD)),
    ],
    "equality": [
        A.eq(I, J),
        A.eq(J, I),
        A.eq(minus(I, J), n(0)),
        A.eq(A.mul(n(3), I), A.mul(n(3), J)),
        A.eq(f(I), f(J)),
    ],
    "the distance, either way round": [
        A.unary("abs", minus(I, J)),
        A.unary("abs", minus(J, I)),
        A.to_int(A.unary("abs", f(minus(I, J)))),
    ],
    "reciprocals": [A.unary("recip", A.unary("sqrt", DOT)), A.power(DOT, n(-0.5)), A.div(n(1.0), A.power(DOT, n(0.5)))],
    "powers": [A.power(DOT, n(2)), A.mul(DOT, DOT), A.power(DOT, n(2.0))],
}


@pytest.mark.parametrize("spellings", SAME.values(), ids=SAME)
def test_spellings_of_one_function_are_one_object(spellings):
    # except for the gradient that an added fill passes
    assert len({id(A.in_place(e)) for e in spellings}) == 1, "\n".join(sorted({show(e) for e in spellings}))


def test_an_added_fill_is_the_number_that_it_is_and_lets_the_gradient_through():
    put = A.where(PAD, DOT, LOW)
    added = A.add(DOT, A.where(PAD, n(0.0), LOW))
    assert added is not put and show(added) == show(put) and A.in_place(added) is put
    assert parse(dump([added, put])) == [added, put]
    assert gradient(added, [DOT]) == [n(1.0)] and gradient(put, [DOT]) == [A.where(PAD, n(1.0), n(0.0))]
    assert gradient(A.mul(n(0.5), added), [DOT]) == [n(0.5)] and gradient(A.add(n(1.0), added), [DOT]) == [n(1.0)]
    assert A.add(DOT, A.where(PAD, n(0.0), NEG)) is A.where(PAD, DOT, NEG)  # -inf plus any finite value is -inf


DIFFERENT = {
    "widths": [A.lt(minus(I, J), n(7)), A.le(minus(I, J), n(7)), A.lt(minus(I, J), n(6))],
    "alignments": [A.le(J, I), A.le(J, A.add(I, minus(S, T)))],
    "directions": [A.le(J, I), A.le(I, J), A.lt(J, I)],
    "fills": [
        A.where(PAD, DOT, NEG),
        A.where(PAD, DOT, LOW),
        A.where(PAD, DOT, n(-1e4)),
        A.where(A.not_(PAD), DOT, NEG),
    ],
    "a bias is no fill": [A.add(DOT, A.where(PAD, n(0.0), n(-1e4))), A.where(PAD, DOT, n(-1e4))],
    "scales": [A.mul(n(0.25), DOT), A.mul(n(-0.25), DOT), DOT, A.mul(n(0.0), DOT)],
    "a product with zero is no zero": [A.mul(n(0.0), DOT), n(0.0)],
    "a rounding stays": [A.half(A.mul(n(2.0), DOT)), A.mul(n(2.0), A.half(DOT)), A.mul(n(2.0), DOT)],
    "a detached value stays": [A.detach(DOT), DOT],
    "truncation is no floor": [A.to_int(DOT), A.to_int(A.unary("floor", DOT))],
    "a truth value that is loaded": [f(PAD), MASK],
    "slots": [A.load(0, (B, J), "b"), A.load(1, (B, J), "b"), A.load(0, (B, I), "b")],
    "a sum inside and outside a function": [A.unary("tanh", A.add(DOT, n(1.0))), A.add(A.unary("tanh", DOT), n(1.0))],
    "remainders": [A.mod(I, n(3)), A.mod(I, n(4)), A.floordiv(I, n(3)), A.mod(A.neg(I), n(3))],
    "truth values and numbers": [A.const(True), A.const(1), A.const(1.0)],
}


@pytest.mark.parametrize("expressions", DIFFERENT.values(), ids=DIFFERENT)
def test_different_functions_are_different_objects(expressions):
    assert len({id(e) for e in expressions}) == len(expressions)
    assert len({e.digest for e in expressions}) == len(expressions)
    assert all(show(a) != show(b) for a, b in pairwise(expressions) if a.kind == b.kind == "b")


def test_a_moderate_fill_is_not_pulled_out_of_a_sum():
    """x + where(c, 0, -1e4) is not where(c, x, -1e4)."""
    assert A.add(DOT, A.where(PAD, n(0.0), n(-1e4))).op == "add"


def test_adding_an_infinite_constant_outside_a_mask_is_kept():
    assert A.add(DOT, NEG).op == "add"


def test_zero_times_a_load_is_not_dropped_for_it_may_be_infinite():
    assert A.mul(n(0.0), BIAS) is not n(0.0)
    assert minus(BIAS, BIAS) is not n(0.0)


def test_the_exponential_of_a_logarithm_is_folded_if_the_operand_cannot_be_negative():
    """exp(log(x)) is NaN for x < 0."""
    assert A.unary("exp", A.unary("log", A.PROB)) is A.PROB
    assert A.unary("exp", A.unary("log", A.unary("exp", A.DOT))) is A.unary("exp", A.DOT)
    assert A.unary("exp", A.unary("log", A.DOT)).op == "exp"
