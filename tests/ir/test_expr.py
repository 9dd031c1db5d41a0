"""Keep an expression's values through constructors, `rebuild`, `substitute` and serialization.

The reference evaluates naive trees of Python functions that never pass the constructors.
"""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnfx.ir import algebra as A
from attnfx.ir import poly
from attnfx.ir.algebra import rebuild, substitute
from attnfx.ir.expr import node, show, walk
from attnfx.ir.interpret import evaluate
from attnfx.ir.serialize import dump, parse
from attnfx.spec import B, H, I, J
from tests.ir.strategies import SIZES, anything, close, environment, floats, integers, load, truths

FEW = settings(max_examples=150, deadline=None, derandomize=True)


# -- naive trees: (operation, operands), evaluated without the algebra and built with it ---------------
def trees(depth: int):
    leaf = st.one_of(st.sampled_from(["b", "h", "i", "j", "T", "S", "n0"]), st.integers(-4, 6))
    if not depth:
        return leaf
    x, c = trees(depth - 1), conditions(depth - 1)
    divisor = st.one_of(st.integers(1, 6), st.sampled_from(["n0", "S"]))
    return st.one_of(
        leaf,
        st.tuples(st.sampled_from(["add", "sub", "mul", "min", "max"]), x, x),
        st.tuples(st.sampled_from(["floordiv", "mod"]), x, divisor),
        st.tuples(st.sampled_from(["abs", "neg"]), x),
        st.tuples(st.just("where"), c, x, x),
    )


def conditions(depth: int):
    x = trees(max(depth - 1, 0))
    compare = st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq"]), x, x)
    if not depth:
        return compare
    c = conditions(depth - 1)
    return st.one_of(compare, st.tuples(st.sampled_from(["and", "or"]), c, c), st.tuples(st.just("not"), c))


NAIVE = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "min": min,
    "max": max,
    "floordiv": lambda x, y: x // y,
    "mod": lambda x, y: x % y,
    "abs": abs,
    "neg": lambda x: -x,
    "where": lambda c, x, y: x if c else y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "not": lambda x: not x,
}
BUILD = {
    "add": A.add,
    "sub": A.sub,
    "mul": A.mul,
    "min": A.minimum,
    "max": A.maximum,
    "floordiv": A.floordiv,
    "mod": A.mod,
    "abs": lambda x: A.unary("abs", x),
    "neg": A.neg,
    "where": A.where,
    "lt": A.lt,
    "le": A.le,
    "gt": A.gt,
    "ge": A.ge,
    "eq": A.eq,
    "and": A.and_,
    "or": A.or_,
    "not": A.not_,
}
LEAVES = {"b": B, "h": H, "i": I, "j": J, **{name: A.size(name) for name in ("T", "S", "n0")}}


def naive(tree, env):
    if isinstance(tree, tuple):
        return NAIVE[tree[0]](*(naive(t, env) for t in tree[1:]))
    return env[tree] if isinstance(tree, str) else tree


def built(tree):
    if isinstance(tree, tuple):
        return BUILD[tree[0]](*(built(t) for t in tree[1:]))
    return LEAVES[tree] if isinstance(tree, str) else A.const(tree)


def everywhere():
    """Yield all (i, j) of three sets of sizes, each with some b and h."""
    for sizes in (SIZES, dict(B=1, H=1, T=1, S=1, n0=1), dict(B=1, H=2, T=9, S=4, n0=2)):
        for i in range(sizes["T"]):
            for j in range(sizes["S"]):
                yield {**sizes, "b": (i + j) % sizes["B"], "h": (i + 2 * j) % sizes["H"], "i": i, "j": j}


@pytest.mark.parametrize("kind", [trees, conditions])
@FEW
@given(st.data())
def test_integer_arithmetic_comparisons_and_logic_keep_their_values(kind, data):
    tree = data.draw(kind(3))
    e = built(tree)
    for env in everywhere():
        assert evaluate(e, env) == naive(tree, env), show(e)


@FEW
@given(trees(3))
def test_conversion_to_float_and_back_keeps_an_integer(tree):
    e = built(tree)
    for env in list(everywhere())[::5]:
        assert evaluate(A.to_float(e), env) == naive(tree, env)
        assert evaluate(A.to_int(A.to_float(e)), env) == naive(tree, env)


# -- bounds ---------------------------------------------------------------------------------------------
def at_sizes(p, env):
    return sum(c * math.prod(env[a.value] for a in m) for m, c in p.items())


@FEW
@given(trees(3))
def test_bounds_hold_for_every_index_and_size(tree):
    e = built(tree)
    low, high = poly.bounds(e)
    for env in everywhere():
        value = naive(tree, env)
        assert low is None or at_sizes(low, env) <= value, show(e)
        assert high is None or value <= at_sizes(high, env), show(e)


@FEW
@given(trees(2))
def test_what_is_proved_to_be_nonnegative_is(tree):
    p = poly.of(built(tree))
    if poly.nonnegative(p):
        assert all(naive(tree, env) >= 0 for env in everywhere())


def test_bounds_of_plain_indices_are_found():
    assert poly.bounds(I) == ({}, {(A.size("T"),): 1, (): -1})
    assert poly.bounds(A.mod(A.load(0, (I,), "i"), A.const(7))) == ({}, {(): 6})
    low, high = poly.bounds(A.sub(I, J))
    assert at_sizes(low, SIZES) == -6
    assert at_sizes(high, SIZES) == 4


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=4), st.lists(st.integers(-4, 4), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_product_divides_exactly(a, b):
    def powers(coefficients):
        out = {}
        for n, c in enumerate(coefficients):
            out = poly.plus(out, poly.times({(): c}, {(I,) * n: 1})) if c else out
        return out

    x, y = powers(a), powers(b)
    if y:
        assert poly.divide(poly.times(x, y), y) == x


# -- rebuilding -------------------------------------------------------------------------------------------
@FEW
@given(anything(3), st.integers(0, 11))
def test_rebuilding_through_the_constructors_keeps_the_value(e, seed):
    fresh = rebuild(e, lambda old, args: A.make(old.op, old.kind, args, old.value) if args else None)
    env = environment(seed)
    assert close(evaluate(fresh, env, load), evaluate(e, env, load)), (show(e), show(fresh))


@FEW
@given(anything(3))
def test_rebuilding_with_no_change_gives_the_very_same_object(e):
    assert rebuild(e, lambda old, args: None) is e


@FEW
@given(floats(3), integers(1), st.integers(0, 11))
def test_substituting_an_index_is_evaluating_at_its_value(e, by, seed):
    env = environment(seed)
    moved = substitute(e, {J: A.mod(by, A.size("S"))})
    inner = {**env, "j": evaluate(by, env, load) % env["S"]}
    assert close(evaluate(moved, env, load), evaluate(e, inner, load)), (show(e), show(moved))


@FEW
@given(floats(2), floats(1), st.integers(0, 11))
def test_substituting_dot_is_evaluating_at_its_value(e, by, seed):
    env = environment(seed)
    value = evaluate(by, env, load)
    assert close(evaluate(substitute(e, {A.DOT: by}), env, load), evaluate(e, {**env, "dot": value}, load))


@FEW
@given(truths(3), floats(2), floats(2), st.integers(0, 11))
def test_a_choice_takes_the_side_that_its_condition_says(c, x, y, seed):
    env = environment(seed)
    want = evaluate(x if evaluate(c, env, load) else y, env, load)
    assert close(evaluate(A.where(c, x, y), env, load), want)
    assert close(evaluate(A.where(A.not_(c), y, x), env, load), want)


@FEW
@given(floats(2), floats(2), floats(2), st.integers(0, 11))
def test_sums_and_products_keep_their_values_in_any_order(x, y, z, seed):
    env = environment(seed)
    a, b, c = (evaluate(e, env, load) for e in (x, y, z))
    assert A.add(x, y, z) is A.add(z, A.add(y, x)) or close(
        evaluate(A.add(x, y, z), env, load), evaluate(A.add(z, A.add(y, x)), env, load)
    )
    assert close(evaluate(A.add(x, y, z), env, load), a + b + c)
    assert close(evaluate(A.mul(x, y, z), env, load), a * b * c)
    assert close(evaluate(A.sub(x, y), env, load), a - b)
    assert close(evaluate(A.minimum(x, y), env, load), min(a, b))
    assert close(evaluate(A.maximum(x, y, z), env, load), max(a, b, c))


# -- text and JSON ------------------------------------------------------------------------------------------
@FEW
@given(st.lists(anything(2), min_size=1, max_size=3))
def test_json_gives_back_the_very_same_objects(roots):
    again = parse(json.loads(json.dumps(dump(roots))))
    assert all(a is b for a, b in zip(again, roots, strict=True))


def test_json_keeps_infinities_and_the_kind_of_numbers():
    roots = [
        A.const(-math.inf),
        A.const(math.inf),
        A.const(1.0),
        A.const(1),
        A.const(True),
        A.const(3.4028234663852886e38),
    ]
    text = json.dumps(dump(roots), allow_nan=False)
    assert [e.kind for e in parse(json.loads(text))] == ["f", "f", "f", "i", "b", "f"]
    assert all(a is b for a, b in zip(parse(json.loads(text)), roots))


@FEW
@given(anything(3))
def test_the_walk_visits_operands_before_users_and_each_node_once(e):
    seen = set()
    for at in walk(e):
        assert at not in seen
        assert all(a in seen for a in at.args)
        seen.add(at)
    assert at is e


@FEW
@given(anything(3))
def test_free_variables_are_those_that_matter(e):
    used = {str(at.value) for at in walk(e) if at.op == "var"}
    assert e.free == used  # none of these expressions binds a variable


def test_a_reduction_binds_its_variable():
    k = A.var("k", A.size("S"))
    body = A.add(A.DOT, A.to_float(A.add(k, I)))
    total = A.reduction("rsum", "k", A.size("S"), body)
    assert total.free == {"i"}
    assert evaluate(total, environment(0)) == sum(evaluate(body, environment(0, k=n)) for n in range(7))


def test_node_of_another_kind_of_constant_is_another_object():
    assert node("const", "i", (), 1) is not node("const", "f", (), 1.0)
