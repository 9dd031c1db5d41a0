"""Compare the gradient through the logsumexp, on every tier, with the whole matrix in float64."""

import math

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.evaluate import Evaluator, block_axes
from attnfx.kernels.operators import attention as operator  # noqa: F401  (registers the operators)
from attnfx.spec import AttentionSpec, Capture, H, I, J
from tests.kernels.cases import whole

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DOT = A.mul(A.const(0.3), A.DOT)
CAUSAL = A.ge(I, J)
FINITE = torch.finfo(torch.float32).min
SPECS = {
    "plain": AttentionSpec(score=DOT),
    "causal": AttentionSpec(score=A.where(CAUSAL, DOT, A.const(-math.inf))),
    "rows without a key": AttentionSpec(score=A.where(A.ge(I, A.add(J, A.const(5))), DOT, A.const(FINITE))),
    "soft cap": AttentionSpec(score=A.mul(A.const(4.0), A.unary("tanh", A.mul(A.const(0.25), DOT)))),
    "sink": AttentionSpec(score=DOT, extra=(A.load(0, [H], "f"),), captures=(Capture("f", 1, True),)),
    "weights changed": AttentionSpec(score=DOT, weight=A.mul(A.PROB, A.PROB)),
}


def logsumexp_of(spec, query, key, captures):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    (size_b, heads, size_t, _), size_s = query.shape, key.shape[2]
    axes = block_axes((0, size_b), (0, heads), (0, size_t), (0, size_s))
    dot = query @ key.mT
    values = Evaluator(captures, dict(B=size_b, H=heads, T=size_t, S=size_s), axes, dot.dtype, dot.device, {A.DOT: dot})
    extra = [values.tensor(e).expand(size_b, heads, size_t, 1) for e in spec.extra]
    return torch.cat([values.tensor(spec.score).expand(dot.shape), *extra], -1).logsumexp(-1)


@pytest.mark.parametrize("tier", ["library", "chunked", "flash", "decode"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", [(2, 4, 2, 37, 41, 16, 16), (1, 2, 2, 3, 50, 24, 8)], ids=str)
def test_the_logsumexp_is_differentiated(name, tier, shape):
    size_b, heads, groups, size_t, size_s, width, value_width = shape
    spec = SPECS[name]
    torch.manual_seed(0)
    of = (size_b, heads, size_t, width), (size_b, groups, size_s, width), (size_b, groups, size_s, value_width)
    inputs = [torch.randn(s) for s in of]
    captures = [torch.randn(heads) for _ in spec.captures]

    def gradients(fn, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (*inputs, *captures)]
        out, logsumexp = fn(leaves[:3], leaves[3:])
        torch.manual_seed(1)
        slopes = [torch.randn(x.shape, dtype=torch.float64) for x in (out, logsumexp)]
        both = (out.double() * slopes[0]).sum() + (logsumexp.double() * slopes[1]).sum()
        alone = (logsumexp.double() * slopes[1]).sum()
        used = [leaves[n] for n in (0, 1, *range(3, len(leaves)))]
        found = [*torch.autograd.grad(both, leaves, retain_graph=True), *torch.autograd.grad(alone, used)]
        return [out.detach(), logsumexp.detach(), *found]

    def ours(operands, captures):
        tiers = f"{tier},chunked"
        return torch.ops.attnfx.attention(*operands, captures, [], None, spec.to_json(), tiers, None)

    def eager(operands, captures):
        return whole(spec, *operands, captures), logsumexp_of(spec, *operands[:2], captures)

    for found, want in zip(gradients(ours, torch.float32), gradients(eager, torch.float64), strict=True):
        torch.testing.assert_close(found.double(), want, rtol=3e-5, atol=3e-5)


def test_what_does_not_fit_is_refused():
    query = torch.randn(1, 1, 4, 8)
    out, logsumexp = torch.ops.attnfx.attention(query, query, query, [], [], None, SPECS["plain"].to_json(), "chunked")
    given = (out, query, query, query, out, logsumexp, [], [], None, SPECS["plain"].to_json(), "chunked", None)
    with pytest.raises(ValueError, match="grad_logsumexp has shape"):
        torch.ops.attnfx.attention_backward(*given, logsumexp[..., :2])
