"""Build specs of every kind with their captures, and compute them from the whole matrix of scores."""

import math

import torch

from attnfx.ir import algebra as A
from attnfx.kernels.evaluate import Evaluator, block_axes
from attnfx.spec import B, Capture, H, I, J

DOUBLE = dict(compute="float64", out_dtype="float64")
DOT = A.mul(A.const(0.3), A.DOT)
INF = math.inf
FINITE = torch.finfo(torch.float32).min
CAUSAL = A.ge(I, J)
WINDOW = A.and_(CAUSAL, A.lt(A.sub(I, J), A.const(7)))


def masked(keep, fill=-INF, score=DOT):
    return A.where(keep, score, A.const(fill))


def tensors(T=37, S=41, D=8, Dv=6, size_b=2, heads=4, groups=2, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (size_b, heads, T, D), (size_b, groups, S, D), (size_b, groups, S, Dv)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def whole_weights(spec, query, key, captures=(), sizes=()):
    """Compute the whole matrix of weights before dropout as eager does, differentiable by autograd."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    size_b, heads, T, S = *query.shape[:3], key.shape[2]
    dot = query @ key.mT
    axes = block_axes((0, size_b), (0, heads), (0, T), (0, S))
    named = dict(B=size_b, H=heads, T=T, S=S) | dict(zip(spec.sizes, sizes))
    values = Evaluator(captures, named, axes, dot.dtype, dot.device, {A.DOT: dot})
    prob = values.tensor(spec.score).expand(dot.shape)
    if spec.normaliser == "softmax":
        extra = [values.tensor(e).expand(size_b, heads, T, 1) for e in spec.extra]
        score = torch.cat([prob, *extra], -1)
        prob = score.softmax(-1)[..., :S]
        if spec.safe:
            prob = prob.masked_fill((score == -INF).all(-1, keepdim=True), 0.0)
    values.bind(A.PROB, prob)
    return values.tensor(spec.weight).expand(dot.shape)


def whole(spec, query, key, value, captures=(), sizes=()):
    weights = whole_weights(spec, query, key, captures, sizes)
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)


def f64(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


G1, G2, G3 = (Capture("f", n, True) for n in (1, 2, 3))
slope = A.load(0, [H], "f")
clipped = A.minimum(A.maximum(A.sub(J, I), A.const(-5)), A.const(5))


def common(draw, heads):
    """Build cases for `heads` heads, 37 queries and 41 keys; `draw` samples their captures."""
    by_position = A.load(0, [A.mod(A.mul(I, J), A.const(5)), H], "f")
    sigmoid = A.unary("sigmoid", A.PROB)
    return {
        "plain": (dict(score=DOT), ()),
        "unscaled": (dict(score=A.DOT), ()),
        "causal": (dict(score=masked(CAUSAL)), ()),
        "window": (dict(score=masked(WINDOW)), ()),
        "softcap": (
            dict(score=masked(CAUSAL, score=A.mul(A.const(5.0), A.unary("tanh", A.mul(A.const(0.1), A.DOT))))), (),
        ),
        "learned bias": (dict(score=A.add(DOT, A.load(0, [H, I, J], "f")), captures=(G3,)), (draw(heads, 37, 41),)),
        "learned table": (
            dict(score=A.add(DOT, A.load(0, [A.add(clipped, A.const(5)), H], "f")), captures=(G2,)),
            (draw(11, heads),),
        ),
        "gathered by position": (
            dict(score=masked(CAUSAL, score=A.add(DOT, by_position)), captures=(G2,)), (draw(5, heads),),
        ),
        "alibi": (
            dict(score=masked(CAUSAL, score=A.add(DOT, A.mul(slope, A.to_float(A.sub(J, I))))), captures=(G1,)),
            (draw(heads).abs(),),
        ),
        "sinks": (dict(score=masked(WINDOW), extra=(slope,), captures=(G1,)), (draw(heads),)),
        "sink by row": (dict(score=DOT, extra=(A.load(0, [H, I], "f"),), captures=(G2,)), (draw(heads, 37),)),
        "off by one": (dict(score=DOT, extra=(A.const(0.0),)), ()),
        "head mask": (dict(score=DOT, weight=A.mul(slope, A.PROB), captures=(G1,)), (draw(heads),)),
        "mask after softmax": (dict(score=DOT, weight=A.where(CAUSAL, A.PROB, A.const(0.0))), ()),
        "sigmoid": (dict(score=DOT, normaliser="none", weight=sigmoid), ()),
        "sigmoid with bias": (
            dict(score=A.add(DOT, slope), normaliser="none", captures=(G1,),
                 weight=A.where(CAUSAL, sigmoid, A.const(0.0))),
            (draw(heads),),
        ),
        "relu squared": (dict(score=DOT, normaliser="none", weight=A.mul(*[A.maximum(A.PROB, A.const(0.0))] * 2)), ()),
        "two terms": (dict(score=A.add(DOT, A.mul(A.DOT, A.DOT, A.const(0.01)))), ()),
        "named size": (dict(score=masked(A.lt(A.sub(J, I), A.size("n0"))), sizes=("n0",)), ()),
    }  # fmt: skip


CASES = common(f64, 4) | {
    "cosine temperature": (
        dict(score=A.mul(A.DOT, A.unary("exp", A.minimum(slope, A.const(2.0)))), captures=(G1,)),
        (f64(4),),
    ),
    "offset after softmax": (dict(score=masked(CAUSAL), weight=A.add(A.PROB, A.const(0.01))), ()),
    "bias after softmax": (
        dict(score=masked(WINDOW), weight=A.add(A.PROB, A.where(A.ge(J, I), slope, A.const(0.0))), captures=(G1,)),
        (f64(4),),
    ),
}

padding = torch.ones(2, 41, dtype=torch.bool)
padding[0, :21] = False
padding[1, 20:] = False
PAD = A.load(0, [B, J], "b")
