"""Build the masks that the tests of the mask analysis share."""

import math

from attnfx.ir import algebra as A
from attnfx.spec import B, I, J

T, S = A.size("T"), A.size("S")


NO = A.const(-math.inf)


MIN = A.const(-3.4028234663852886e38)


def n(value):
    return A.const(value)


def minus(x, y):
    return A.sub(x, y)


def masked(keep, fill=NO):
    return A.where(keep, A.DOT, fill)


CAUSAL = A.le(J, I)


ALIGNED = A.le(minus(J, I), minus(S, T))


def window(width):
    return A.lt(minus(I, J), n(width))


def near(width):
    return A.le(A.unary("abs", minus(I, J)), n(width))


def same_block(size):
    return A.eq(A.floordiv(I, n(size)), A.floordiv(J, n(size)))


def dilated(step):
    return A.eq(A.mod(minus(I, J), n(step)), n(0))


def pad(slot=0):
    return A.load(slot, (B, J), "b")


def documents(slot=0):
    return A.eq(A.load(slot, (B, I), "i"), A.load(slot, (B, J), "i"))


def neighbourhood(width, reach):
    gaps = (A.unary("abs", minus(f(I, n(width)), f(J, n(width)))) for f in (A.floordiv, A.mod))
    return A.and_(*(A.le(gap, n(reach)) for gap in gaps))
