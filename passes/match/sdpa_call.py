"""Read a call of PyTorch's own attention operator as the parts of an attention: it is a site like any other."""

from __future__ import annotations

from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.passes.fx.nodes import arguments, dims
from attnfx.passes.lift.lifter import Lifter, broadcast
from attnfx.passes.match import softmax as N
from attnfx.passes.match.spec_builder import ROLES, Parts, Refused


def library_call(lifter: Lifter, at: Node) -> Parts:
    """Return the parts of the attention that the call computes. Raises Refused."""
    given = arguments(at)
    nodes = [given[name] for name in ROLES]
    p, mask, scale = given["dropout_p"], given["attn_mask"], given["scale"]
    if not isinstance(p, int | float) or not 0 <= p < 1:
        raise Refused("dropout", f"dropout_p is {p}, not a Python number in [0, 1)", [at], p=p)
    out = tuple(A.var(f"o{d}", n) for d, n in enumerate(dims(at)))
    *heads, row, e = out
    j, d = (A.var(name, n) for name, n in zip(("k_j", "k_d"), dims(nodes[1])[-2:], strict=True))
    pairs = []
    for x, last in zip(nodes, ((row, d), (j, d), (j, e)), strict=True):
        inner = list(heads)
        if given["enable_gqa"] and dims(x)[-3] is not dims(nodes[0])[-3]:
            inner[-1] = A.floordiv(heads[-1], A.floordiv(dims(nodes[0])[-3], dims(x)[-3]))
        pairs.append((x, broadcast(x, (*inner, *last))))
    if scale is None:
        factor = A.unary("recip", A.unary("sqrt", A.to_float(d.args[0])))
    else:
        factor = A.to_float(lifter.operand(scale, ()))
    score = A.mul(factor, A.DOT)
    if given["is_causal"]:
        score = A.where(A.le(j, row), score, A.const(float("-inf")))
    if mask is not None:
        m = lifter.lift(mask, broadcast(mask, (*heads, row, j)))
        score = A.where(m, score, A.const(float("-inf"))) if m.kind == "b" else A.add(score, m)
    found = N.Normalised(score, A.PROB, dropout=float(p), safe=True)
    return Parts(at, out, row, j, d, e, tuple(pairs), found)
