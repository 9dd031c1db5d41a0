"""Compare the predicted workspace of an attention operator with the allocator's."""

import gc

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.chunked import attention as chunked
from attnfx.kernels.library import cpu as library
from attnfx.memory.workspace import Operand, Use, workspace
from attnfx.passes.joint.read_graph import operand
from attnfx.spec import AttentionSpec, B, Capture, H, I, J
from tests.memory.test_liveness import measured

CAUSAL, DOT = A.ge(I, J), A.mul(A.const(0.125), A.DOT)
PAD = A.load(0, [B, J], "b")
distance = A.minimum(A.maximum(A.sub(J, I), A.const(-64)), A.const(64))
BIAS = A.add(DOT, A.load(0, [A.add(distance, A.const(64)), H], "f"))


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Freeze existing objects, so that each garbage collection of these tests does not traverse them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def masked(keep, score=DOT):
    return A.where(keep, score, A.const(-float("inf")))


SPECS = {
    "plain": (dict(score=DOT), ()),
    "causal": (dict(score=masked(CAUSAL)), ()),
    "padded": (dict(score=masked(PAD), captures=(Capture("b", 2),)), (torch.ones(2, 512, dtype=torch.bool),)),
    "causal, padded": (
        dict(score=masked(A.and_(CAUSAL, PAD)), captures=(Capture("b", 2),)), (torch.ones(2, 512, dtype=torch.bool),),
    ),
    "biased": (dict(score=BIAS, captures=(Capture("f", 2),)), (torch.randn(129, 4),)),
    "window": (dict(score=masked(A.and_(CAUSAL, A.lt(A.sub(I, J), A.const(100))))), ()),
}  # fmt: skip


def case(name, groups=4, dropout=0.0, merged=False):
    """Return the call's arguments, and its description for the model."""
    program, captures = SPECS[name]
    spec = AttentionSpec(**program, dropout=dropout)
    torch.manual_seed(0)
    shapes = ((2, 512, 4, 64), (2, 512, groups, 64), (2, 512, groups, 64))
    tensors = [torch.randn(s).transpose(1, 2) for s in shapes]
    if merged:
        tensors = [x.contiguous() for x in tensors]
    seed = torch.tensor(5) if dropout else None
    operands = [Operand(tuple(x.shape), x.stride(), x.element_size()) for x in tensors]
    use = Use(spec, *operands, threads=torch.get_num_threads())
    return Call(spec, *tensors, captures, (), seed), use


def held(results):
    tensors = [r for r in results if isinstance(r, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


WAYS = [(name, dict()) for name in SPECS] + [("plain", dict(groups=2)), ("causal", dict(merged=True))]


@pytest.mark.parametrize("name, how", WAYS)
def test_the_library_tier(name, how):
    compare(library, "library", *case(name, **how), 0.03)


@pytest.mark.parametrize("name, how", [*WAYS, ("causal, padded", dict(dropout=0.1)), ("plain", dict(dropout=0.1))])
def test_the_chunked_tier(name, how):
    compare(chunked, "chunked", *case(name, **how), 0.05)


def compare(tier, name, call, use, tolerance):
    made = tier.forward(call)  # fills caches, which must not be counted
    grad = torch.randn_like(made[0])
    gradients = tier.backward(call, grad, *made)
    gc.collect()  # frees cycles of earlier calls before the measurement
    forward = measured(lambda: tier.forward(call))
    assert held(made) + workspace(use, name) == pytest.approx(forward, rel=tolerance)
    gc.collect()
    backward = measured(lambda: tier.backward(call, grad, *made))
    use = Use(
        use.spec, use.query, use.key, use.value, Operand(tuple(grad.shape), grad.stride(), 4), threads=use.threads
    )
    assert held(gradients) + workspace(use, name) == pytest.approx(backward, rel=tolerance)


@pytest.mark.parametrize(
    "made",
    [
        lambda b, t: torch.empty(b, t, 3 * 2 * 8).view(b, t, 3, 2, 8).permute(2, 0, 3, 1, 4)[1],
        lambda b, t: torch.empty(b, 2, t, 8).mT,
        lambda b, t: torch.empty(b, 1, t, 8).expand(b, 4, t, 8),
        lambda b, t: torch.empty(b, t, 8).unsqueeze(1),
    ],
    ids=["packed", "transposed", "expanded", "one head"],
)
def test_an_operand_of_another_shape_lies_in_memory_as_it_did(made):
    there = made(5, 14)
    assert operand(made(2, 6), tuple(there.shape)) == operand(there)
