"""Predict time and bytes of PyTorch's fused operator, as a rewrite and as a model's own call."""

import math
from dataclasses import replace

import pytest
import torch

from attnfx import Target
from attnfx.cost import Question, activation, select
from attnfx.ir import algebra as A
from attnfx.memory.workspace import Operand, Use, workspace
from attnfx.options import Options
from attnfx.spec import AttentionSpec, I, J
from attnfx.targets import sdpa_dispatch as fused

SCORE = A.mul(A.const(0.125), A.DOT)


PLAIN = AttentionSpec(score=SCORE, out_dtype="bfloat16")


CAUSAL = replace(PLAIN, score=A.where(A.ge(I, J), SCORE, A.const(-math.inf)))


GPU = torch.device("cuda")


def masked(keep, fill=-math.inf):
    return replace(PLAIN, score=A.where(keep, SCORE, A.const(fill)))


def library(target="h100-sxm", spec=CAUSAL, groups=16, **fields):
    dims = dict(B=1, H=16, G=groups, T=4096, S=4096, D=128, Dv=128)
    decision = select(Question(spec, dims, "bfloat16", "cuda", **fields), Options(), device=Target.by_name(target))
    return next((c for c in (decision, *decision.alternatives) if c.tier == "library"), None)


def test_it_costs_what_the_same_call_of_a_model_costs():
    for training in (False, True):
        ask = Question(CAUSAL, dict(B=1, H=16, G=16, T=4096, S=4096, D=128, Dv=128), "bfloat16", "cuda",
                       training=training, native=True)  # fmt: skip
        kept = select(ask, Options(), device=Target.by_name("a100-80gb"))
        kept = next(c for c in (kept, *kept.alternatives) if c.tier == "kept")
        found = library("a100-80gb", training=training)
        assert (found.predicted_ms, found.predicted_bytes, found.saved_bytes) == (
            kept.predicted_ms, kept.predicted_bytes, kept.saved_bytes)  # fmt: skip
        assert library("a100-80gb", training=training, native=True) is None


def test_a_call_of_a_model_with_a_mask_goes_past_flash_attention():
    dims = dict(B=1, H=16, G=16, T=4096, S=4096, D=64, Dv=64)
    window = masked(A.and_(A.ge(I, J), A.lt(A.sub(I, J), A.const(4096))))
    times = {}
    for device in ("a100-80gb", "h100-sxm"):
        for spec in (CAUSAL, window):
            ask = Question(spec, dims, "bfloat16", "cuda", native=True)
            found = select(ask, Options(), device=Target.by_name(device))
            kept = next(c for c in (found, *found.alternatives) if c.tier == "kept")
            times.setdefault(device, []).append(kept.predicted_ms)
    assert times["a100-80gb"][1] > 1.5 * times["a100-80gb"][0]
    assert times["h100-sxm"][1] == pytest.approx(times["h100-sxm"][0], rel=0.05)  # cuDNN's kernel supports masks


@pytest.mark.parametrize("width", [100, 512])
def test_a_call_of_a_model_holds_no_scores_whatever_its_kernel(width):
    dims = dict(B=1, H=16, G=16, T=4096, S=4096, D=width, Dv=width)
    ask = Question(PLAIN, dims, "bfloat16", "cuda", native=True)
    decision = select(ask, Options(), device=Target.by_name("h100-sxm"))
    kept = next(c for c in (decision, *decision.alternatives) if c.tier == "kept")
    assert kept.kernel == "aten" and kept.predicted_bytes == 4 * 16 * 4096


def test_float32_is_fused_and_holds_no_scores():
    dims = dict(B=1, H=16, G=16, T=4096, S=4096, D=64, Dv=64)
    for device in ("v100", "t4", "a100-80gb"):
        gpu = Target.by_name(device)
        refused = {} if gpu.capability >= 80 else {"flash": "8.0", "decode": "8.0"}
        ask = Question(replace(CAUSAL, out_dtype="float32"), dims, "float32", "cuda", training=True, refused=refused)
        found = select(ask, Options(), device=gpu)
        assert (found.tier, found.kernel) == ("library", fused.EFFICIENT)
        assert found.saved_bytes == 4 * 16 * 4096 + 16
        kept = select(replace(ask, native=True), Options(), device=gpu)
        kept = next(c for c in (kept, *kept.alternatives) if c.tier == "kept")
        assert (kept.kernel, kept.predicted_ms) == ("aten", found.predicted_ms)


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "length", "width", "published"),
    [
        ("a100-80gb", "float16", 4096, 4096, 64, 189.4),
        ("a100-80gb", "float16", 320, 8192, 128, 121.7),
        ("a100-80gb", "float32", 4096, 4096, 64, 656.6),
        ("a100-80gb", "float32", 320, 8192, 128, 458.2),
        ("v100", "float16", 1024, 1024, 128, 15.2),
        ("v100", "float32", 1024, 1024, 64, 25.2),
    ],
)
def test_the_memory_efficient_kernel_takes_what_was_measured_of_it(device, dtype, heads, length, width, published):
    """Times are in milliseconds; their sources are in attnfx/cost/others.json."""
    dims = dict(B=1, H=heads, G=heads, T=length, S=length, D=width, Dv=width)
    gpu = Target.by_name(device)
    ask = Question(replace(PLAIN, out_dtype=dtype), dims, dtype, "cuda", native=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "FLASH_WIDTH", 0)  # as if FlashAttention rejects the call
        kept = select(ask, Options(), device=gpu)
    kept = next(c for c in (kept, *kept.alternatives) if c.tier == "kept")
    assert kept.predicted_ms == pytest.approx(published, rel=0.03)


def test_an_older_cudnn_is_not_taken_first():
    new, old = library(), library(backends=fused.Backends(cudnn=0))
    assert (new.kernel, old.kernel) == (fused.CUDNN, fused.FLASH) and new.predicted_ms < 0.75 * old.predicted_ms


def test_bytes_are_logsumexp_and_the_float32_gradient_of_the_query():
    rows = 16 * 4096
    assert (library().predicted_bytes, library().saved_bytes) == (4 * rows, 0)
    trained = library(training=True)
    assert trained.saved_bytes == 4 * rows + 16
    assert trained.predicted_bytes == trained.saved_bytes + 4 * rows * 129
    shared = library(training=True, groups=4)
    assert shared.predicted_bytes - trained.predicted_bytes == 2 * rows * 128 * 2


def test_a_plan_for_a_gpu_counts_the_same_workspace():
    query = Operand((1, 16, 4096, 128), (1 << 23, 1 << 19, 128, 1), 2)
    use = Use(CAUSAL, query, query, query, cpu=False)
    assert workspace(use, "library") == 0
    assert workspace(replace(use, grad_out=query), "library") == 4 * 16 * 4096 * 129


def kernels(target="h100-sxm", flash="FA2", **fields):
    """Return the predicted ms of each kernel of PyTorch's operator that is a candidate, in order."""
    dims = dict(B=1, H=16, G=16, T=8192, S=8192, D=128, Dv=128)
    ask = Question(CAUSAL, dims, "bfloat16", "cuda", backends=fused.Backends(flash=flash), **fields)
    decision = select(ask, Options(), device=Target.by_name(target))
    return {c.kernel: c.predicted_ms for c in (decision, *decision.alternatives) if c.tier == "library"}


def test_training_is_predicted_with_the_kernel_that_may_compute_its_gradients(monkeypatch):
    assert list(kernels()) == [fused.CUDNN] and list(kernels(training=True)) == [fused.FLASH]
    kept = select(
        Question(CAUSAL, dict(B=1, H=16, G=16, T=4096, S=4096, D=128, Dv=128), "bfloat16", "cuda", training=True,
                 native=True), Options(), device=Target.by_name("h100-sxm"))  # fmt: skip
    assert kept.original.predicted_ms < library(training=True).predicted_ms  # a model's own call stays with cuDNN
    monkeypatch.setattr(fused, "CUDNN_BACKWARD", {fused.ASSUMED: "a test"})
    assert list(kernels(training=True)) == [fused.CUDNN]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("target", "flash", "name"), [
    ("h100-sxm", "FA3", fused.FLASH3), ("h100-sxm", "FA4", fused.FLASH4), ("b200", "FA4", fused.FLASH4),
])  # fmt: skip
def test_an_activated_flash_attention_is_a_candidate_of_its_own(target, flash, name, training):
    before, after = kernels(target, training=training), kernels(target, flash, training=training)
    assert name not in before and name in after
    assert after[name] < next(iter(before.values()))
    assert set(after) == ({name} if training else {fused.CUDNN, name})


@pytest.mark.parametrize(("target", "training", "name"), [
    ("h100-sxm", True, fused.FLASH3), ("b200", False, fused.FLASH4), ("h100-sxm", False, ""), ("a100-80gb", True, ""),
])  # fmt: skip
def test_a_faster_flash_attention_that_is_not_active_is_named(target, training, name):
    dims = dict(B=1, H=16, G=16, T=8192, S=8192, D=128, Dv=128)
    ask, gpu = Question(CAUSAL, dims, "bfloat16", "cuda", training=training), Target.by_name(target)
    chosen = select(ask, Options(tiers=("library",)), device=gpu)
    told = activation(ask, gpu, chosen)
    assert told.startswith(f"{name} is predicted to take 0.") if name else told == ""
    for other in (replace(ask, native=True), replace(ask, refused={"library": "dropout"})):
        assert activation(other, gpu, chosen) == ""
    assert activation(replace(ask, backends=fused.Backends(flash="FA4")), gpu, chosen) == ""


def test_kernels_on_a_b200_take_what_was_published_of_them():
    """The sources are in attnfx/cost/others.json: 1613 TFLOP/s, and 1.3 times as fast as cuDNN."""
    dims = dict(B=1, H=16, G=16, T=16384, S=16384, D=128, Dv=128)
    ask = Question(PLAIN, dims, "bfloat16", "cuda", backends=fused.Backends(flash="FA4"))
    found = select(ask, Options(), device=Target.by_name("b200"))
    ms = {c.kernel: c.predicted_ms for c in (found, *found.alternatives) if c.tier == "library"}
    assert 4 * 16 * 16384**2 * 128 / ms[fused.FLASH4] / 1e9 == pytest.approx(1613, rel=0.03)
    assert ms[fused.CUDNN] / ms[fused.FLASH4] == pytest.approx(1.3, rel=0.02)


def test_flash_attention_3_has_every_width_of_version_2():
    dims = dict(B=1, H=16, G=16, T=4096, S=4096, D=256, Dv=256)
    ask = Question(PLAIN, dims, "bfloat16", "cuda", training=True, backends=fused.Backends(flash="FA3"))
    found = select(ask, Options(), device=Target.by_name("h100-sxm"))
    assert (found.tier, found.kernel) == ("library", fused.FLASH3)
