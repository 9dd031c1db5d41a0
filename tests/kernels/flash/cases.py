"""Build the programs and tensors of the flash kernels' tests, and compare with the whole matrix of scores."""

import torch

from attnfx.ir import algebra as A
from attnfx.ir.expr import node
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host.backward import backward
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.spec import B, Capture, H, I, J
from tests.kernels.cases import CAUSAL, DOT, WINDOW, clipped, common, masked, whole_weights

TILE = Tile(16, 16, 1, 1)


def tensors(T=37, S=41, D=16, Dv=16, size_b=2, heads=2, groups=1, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (size_b, heads, T, D), (size_b, groups, S, D), (size_b, groups, S, Dv)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def whole(spec, query, key, value, captures=(), sizes=(), kept=None):
    """Compute the attention from the whole matrix as eager does, differentiable by autograd."""
    weights = whole_weights(spec, query, key, captures, sizes)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (weights if kept is None else weights * kept) @ value


def compare(spec, captures=(), sizes=(), tolerance=2e-5, inputs=None, tile=TILE, kept=None, seed=None, **shape):
    """Compare output, logsumexp and all gradients of a float32 call with float64."""
    inputs = inputs or tensors(**shape)
    call = Call(spec, *inputs, captures, sizes, seed)
    assert launch.supports(call) is None
    leaves = [x.double().requires_grad_() for x in inputs]
    doubles = [x.double() if x.is_floating_point() else x for x in captures]
    doubles = [x.requires_grad_() if c.grad else x for x, c in zip(doubles, spec.captures)]
    want = whole(spec, *leaves, doubles, sizes, kept)
    grad = torch.randn(want.shape).to(inputs[0].dtype)
    close = dict(rtol=tolerance, atol=tolerance, equal_nan=True)
    out, logsumexp = launch.forward(call, tile)
    torch.testing.assert_close(out.double(), want.detach(), **close)
    assert out.transpose(1, 2).is_contiguous() and logsumexp.shape == inputs[0].shape[:3]
    wanted = [*leaves, *(x for x, c in zip(doubles, spec.captures) if c.grad)]
    want_grads = torch.autograd.grad(want, wanted, grad.double())
    *grads, of_captures = backward(call, grad, out, logsumexp, (tile, tile))
    for got, expected in zip([*grads, *of_captures], want_grads):
        torch.testing.assert_close(got.double(), expected, **close)
        assert got.is_contiguous()
    return out, logsumexp


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


G0, G1, G2 = (Capture("f", n, True) for n in range(3))
log_of_distance = node(
    "aten", "f", (node("aten", "f", (A.add(A.unary("abs", A.sub(J, I)), A.ONE),), "to:float32"),), "log:float32"
)
CASES = common(rand, 2) | {
    "negative scale": (dict(score=A.mul(A.const(-0.2), A.DOT)), ()),
    "temperature": (
        dict(score=A.mul(A.DOT, A.unary("exp", A.minimum(A.load(0, [H], "f"), A.const(0.2)))), captures=(G1,)),
        (rand(2),),
    ),
    "scalar": (dict(score=A.mul(A.DOT, A.load(0, [], "f")), captures=(G0,)), (torch.tensor(0.3),)),
    "bias": (dict(score=A.add(DOT, A.load(0, [H, I, J], "f")), captures=(Capture("f", 3),)), (rand(2, 37, 41),)),
    "bias by key": (dict(score=A.add(DOT, A.load(0, [B, J], "f")), captures=(G2,)), (rand(2, 41),)),
    "bias by row, weighed": (
        dict(score=A.add(DOT, A.mul(A.DOT, A.load(0, [H, I], "f"))), captures=(G2,)), (0.1 * rand(2, 37),),
    ),
    "table": (
        dict(score=A.add(DOT, A.load(0, [A.add(clipped, A.const(5)), H], "f")), captures=(Capture("f", 2),)),
        (rand(11, 2),),
    ),
    "buckets of a logarithm": (
        dict(score=A.add(DOT, A.load(0, [A.to_int(log_of_distance), H], "f")), captures=(Capture("f", 2),)),
        (rand(5, 2),),
    ),
    "learned bias for all": (
        dict(score=masked(WINDOW, score=A.add(DOT, A.load(0, [I, J], "f"))), captures=(G2,)), (rand(37, 41),),
    ),
    "learned table, causal": (
        dict(score=masked(CAUSAL, score=A.add(DOT, A.load(0, [A.minimum(A.sub(I, J), A.const(8))], "f"))),
             captures=(G1,)),
        (rand(9),),
    ),
    "learned buckets": (
        dict(score=A.add(DOT, A.load(0, [A.to_int(log_of_distance), H], "f")), captures=(G2,)), (rand(5, 2),),
    ),
    "documents": (
        dict(score=masked(A.and_(CAUSAL, A.eq(A.load(0, [I], "i"), A.load(0, [J], "i")))), captures=(Capture("i", 1),)),
        (torch.arange(41) // 9,),
    ),
}  # fmt: skip
