"""Express a spec as a call of PyTorch's fused operator only if the two compute the same."""

import math
from dataclasses import replace

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.library import cuda as call
from attnfx.kernels.operators.attention import refusals
from attnfx.spec import AttentionSpec, Capture, H, I, J

SCORE = A.mul(A.const(0.125), A.DOT)


PLAIN = AttentionSpec(score=SCORE, out_dtype="bfloat16")


CAUSAL = replace(PLAIN, score=A.where(A.ge(I, J), SCORE, A.const(-math.inf)))


GPU = torch.device("cuda")


def why(spec, dtype=torch.bfloat16, widths=(128, 128), capability=90):
    return refusals(spec, dtype, GPU, *widths, capability).get("library")


def masked(keep, fill=-math.inf):
    return replace(PLAIN, score=A.where(keep, SCORE, A.const(fill)))


@pytest.mark.parametrize("spec", [PLAIN, CAUSAL, masked(A.ge(I, J), -3e38)], ids=["plain", "causal", "finite fill"])
def test_plain_and_causal_attention_are_expressed(spec):
    assert why(spec) is None and why(spec, capability=80) is None and why(spec, capability=120) is None


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(PLAIN, dropout=0.1), "the attention has dropout"),
        (replace(PLAIN, extra=(A.const(0.0),)), "the softmax has columns beside the keys"),
        (replace(PLAIN, score=A.mul(A.const(-0.125), A.DOT)), "the scale is -0.125, and"),
        (replace(PLAIN, score=A.unary("tanh", A.DOT)), "not a multiple of the dot product"),
        (
            replace(PLAIN, score=A.add(SCORE, A.load(0, [H], "f")), captures=(Capture("f", 1),)),
            "attention adds a bias",
        ),
        (masked(A.and_(A.ge(I, J), A.lt(A.sub(I, J), A.const(64)))), "the mask is not plain causality"),
        (masked(A.ge(J, I)), "the mask is not plain causality"),
        (masked(A.lt(J, I)), "the mask is not plain causality"),
        (replace(masked(A.load(0, [J], "b")), captures=(Capture("b", 1),)), "the mask is not plain causality"),
        (replace(PLAIN, out_dtype="float32"), "returns bfloat16, and the attention needs float32 and float32"),
        (replace(PLAIN, compute="float64"), "the attention needs float64"),
    ],
)
def test_what_it_would_compute_otherwise_is_refused(spec, reason):
    """A mask in a tensor may leave a row without keys: the kernels return zeros for it, eager returns NaN."""
    assert reason in why(spec)


def test_a_gpu_that_is_not_there_has_none_unless_it_is_named():
    assert call.expresses(PLAIN, torch.bfloat16, GPU, 64, 64) == "PyTorch's kernels need an NVIDIA GPU"
    why = call.expresses(PLAIN, torch.bfloat16, GPU, 64, 64, 75)
    assert why == "PyTorch lacks a kernel for bfloat16 of width 64 on compute capability 7.5"


def test_float32_has_a_kernel_on_every_gpu_where_no_heads_share_keys():
    single = replace(CAUSAL, out_dtype="float32")

    def why(capability, **shape):
        return call.expresses(single, torch.float32, GPU, 64, 64, capability, **shape)

    assert all(why(c) is None and why(c, square=False) is None for c in (70, 75, 80, 89, 90, 100, 120))
    here = "heads that share keys on compute capability 7.5"
    assert why(75, grouped=True) == f"PyTorch lacks a kernel for float32 of width 64 with {here}"


def test_oblong_causality_is_left_to_the_kernel_that_counts_from_the_first_key():
    half = torch.bfloat16
    why = call.expresses(CAUSAL, half, GPU, 64, 64, 90, square=False)
    assert why == "cuDNN's causal kernel needs as many queries as keys"
    assert call.expresses(CAUSAL, half, GPU, 64, 64, 80, square=False) is None
    assert call.expresses(PLAIN, half, GPU, 64, 64, 90, square=False) is None
