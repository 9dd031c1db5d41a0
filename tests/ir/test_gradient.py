"""Compare the symbolic derivative with finite differences, and with autograd's rules at ties."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnfx.ir import algebra as A
from attnfx.ir.gradient import gradient
from attnfx.ir.interpret import evaluate
from attnfx.spec import I, J
from tests.ir.strategies import ROW, TABLE, environment, floats, load

STEP = 1e-5


def value(e, env, leaf, shift):
    """Evaluate `e` with one leaf (dot or a load) shifted by `shift`."""
    moved = {**env, "dot": env["dot"] + shift} if leaf is A.DOT else env
    return evaluate(
        e, moved, lambda slot, index: load(slot, index) + (shift if leaf.op == "load" and slot == leaf.value else 0)
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(floats(3, smooth=True), st.sampled_from([A.DOT, ROW, TABLE]), st.integers(0, 11))
def test_the_derivative_is_the_limit_of_differences(e, leaf, seed):
    env = environment(seed)
    slope = evaluate(gradient(e, [leaf])[0], env, load)
    numeric = (value(e, env, leaf, STEP) - value(e, env, leaf, -STEP)) / (2 * STEP)
    assert math.isclose(slope, numeric, rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.parametrize(
    "op", "recip exp exp2 expm1 log log2 log1p tanh sigmoid sqrt sin cos erf atan softplus".split()
)
@pytest.mark.parametrize("at", [0.3, 1.7])
def test_each_function_has_its_derivative(op, at):
    env = environment(0, dot=at)
    e = A.unary(op, A.DOT)
    numeric = (value(e, env, A.DOT, STEP) - value(e, env, A.DOT, -STEP)) / (2 * STEP)
    assert math.isclose(evaluate(gradient(e, [A.DOT])[0], env), numeric, rel_tol=1e-4)


@pytest.mark.parametrize("op", ["floor", "ceil", "round", "trunc"])
def test_steps_have_no_slope(op):
    assert gradient(A.unary(op, A.DOT), [A.DOT]) == [A.const(0.0)]


def test_a_detached_value_has_no_slope_and_a_rounded_one_keeps_its():
    assert gradient(A.mul(A.DOT, A.detach(A.DOT)), [A.DOT])[0] is A.detach(A.DOT)
    assert gradient(A.half(A.mul(A.const(3.0), A.DOT)), [A.DOT])[0] is A.const(3.0)


def test_a_masked_score_has_no_slope():
    slope = gradient(A.where(A.le(J, I), A.mul(A.const(2.0), A.DOT), A.const(-math.inf)), [A.DOT])[0]
    assert evaluate(slope, environment(0, i=3, j=2)) == 2.0
    assert evaluate(slope, environment(0, i=2, j=3)) == 0.0


def test_distinct_loads_of_one_capture_are_distinct_leaves():
    row, column = A.load(0, (I,), "f"), A.load(0, (J,), "f")
    assert gradient(A.add(A.mul(A.const(2.0), row), column), [row, column]) == [A.const(2.0), A.const(1.0)]


def test_what_does_not_occur_has_slope_zero():
    assert gradient(A.DOT, [ROW, A.PROB]) == [A.const(0.0), A.const(0.0)]


def test_a_masked_score_has_no_slope_even_if_a_factor_of_it_is_infinite():
    kept = A.le(J, I)
    filled = A.where(kept, A.DOT, A.const(-math.inf))
    squared = A.where(kept, A.mul(filled, filled), A.const(-1.0))
    for root in (squared, A.unary("sigmoid", squared), A.mul(A.unary("sigmoid", filled), squared)):
        slope = gradient(root, [A.DOT])[0]
        assert evaluate(slope, environment(0, i=2, j=3)) == 0.0
        assert math.isfinite(evaluate(slope, environment(0, i=3, j=2)))
