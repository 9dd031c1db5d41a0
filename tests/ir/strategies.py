"""Random expressions for hypothesis, and environments with a value for every leaf."""

import math

from hypothesis import strategies as st

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.spec import B, H, I, J

SIZES = {"B": 2, "H": 3, "T": 5, "S": 7, "n0": 4}
N = A.size("n0")
ROW = A.load(0, (B, J), "f")
TABLE = A.load(1, (A.size("n0"), H), "f")
PAD = A.load(2, (B, J), "b")
DOC = A.load(3, (B, I), "i")


def integers(depth: int = 3):
    leaf = st.one_of(st.sampled_from([B, H, I, J, A.size("T"), A.size("S"), N, DOC]), st.integers(-5, 9).map(A.const))
    if not depth:
        return leaf
    x = integers(depth - 1)
    positive = st.one_of(st.integers(1, 6).map(A.const), st.just(N), st.just(A.size("S")))
    return st.one_of(
        leaf,
        st.builds(A.add, x, x),
        st.builds(A.sub, x, x),
        st.builds(A.mul, st.integers(-3, 4).map(A.const), x),
        st.builds(A.floordiv, x, positive),
        st.builds(A.mod, x, positive),
        st.builds(A.minimum, x, x),
        st.builds(A.maximum, x, x),
        x.map(lambda e: A.unary("abs", e)),
        st.builds(A.where, truths(depth - 1), x, x),
    )


def truths(depth: int = 3):
    x = integers(max(depth - 1, 0))
    compare = st.sampled_from([A.lt, A.le, A.gt, A.ge, A.eq])
    leaf = st.one_of(st.just(PAD), st.builds(lambda op, a, b: op(a, b), compare, x, x))
    if not depth:
        return leaf
    c = truths(depth - 1)
    return st.one_of(
        leaf,
        c.map(A.not_),
        st.builds(A.and_, c, c),
        st.builds(A.or_, c, c),
        st.builds(A.eq, c, c),
        st.builds(
            lambda op, a, b: op(a, b), compare, floats(0), st.sampled_from([A.const(0.5), A.const(-1.5), A.const(2.0)])
        ),
    )


def floats(depth: int = 3, smooth: bool = False):
    """Return a strategy for float expressions; with `smooth`, finite differences approximate their derivatives."""
    number = st.sampled_from([-2.0, -0.5, 0.25, 1.0, 3.0]).map(A.const)
    leaf = st.one_of(st.sampled_from([A.DOT, ROW, TABLE]), number)
    if not depth:
        return leaf
    x = floats(depth - 1, smooth)
    functions = ["tanh", "sigmoid", "sin", "cos", "erf", "softplus", "atan"] + (
        [] if smooth else ["abs", "floor", "round"]
    )
    options = [
        leaf,
        st.builds(A.add, x, x),
        st.builds(A.sub, x, x),
        st.builds(A.mul, x, x),
        st.builds(A.where, truths(1), x, x) if not smooth else st.builds(A.where, st.just(A.le(J, I)), x, x),
        st.builds(lambda op, e: A.unary(op, e), st.sampled_from(functions), x),
        st.builds(lambda e: A.unary("exp", A.unary("tanh", e)), x),
        st.builds(lambda e: A.unary("recip", A.add(A.const(2.0), A.unary("tanh", e))), x),
        st.builds(lambda e: A.unary("sqrt", A.add(A.const(2.0), A.unary("tanh", e))), x),
        st.builds(lambda e: A.unary("log", A.add(A.const(2.0), A.unary("tanh", e))), x),
        st.builds(lambda e: A.power(e, A.const(2.0)), x),
    ]
    if not smooth:
        options += [st.builds(A.minimum, x, x), st.builds(A.maximum, x, x), integers(1).map(A.to_float), x.map(A.half)]
    return st.one_of(options)


def anything(depth: int = 3):
    return st.one_of(integers(depth), truths(depth), floats(depth))


def environment(seed: int = 0, **changed) -> dict:
    """Return values of the sizes, of dot and prob, and of one index tuple chosen by `seed`."""
    at = dict(b=seed % 2, h=seed % 3, i=(seed * 7 + 3) % 5, j=(seed * 5 + 2) % 7)
    return {**SIZES, **at, "dot": 0.37 - 0.61 * (seed % 4), "prob": 0.2, **changed}


def load(slot, index):
    """Return a capture's element, a fixed function of slot and index."""
    mix = math.sin(1.7 * slot + sum((n + 1) * 0.83 * i for n, i in enumerate(index)))
    return mix > 0 if slot == 2 else int(3 * mix) if slot == 3 else mix


def close(a: object, b: object) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) or a == b or (a != a and b != b)
    return a == b


__all__ = ["Expr", "anything", "close", "environment", "floats", "integers", "load", "truths"]
