"""What the cost models say: the right order among candidates, by sizes and by device."""

import pytest

from attnfx.cost import Question, decide
from attnfx.ir import algebra as A
from attnfx.options import Options
from attnfx.spec import AttentionSpec, I, J
from attnfx.targets import Target

H100, A100 = Target.by_name("h100-sxm"), Target.by_name("a100-80gb")
PLAIN = AttentionSpec(score=A.mul(A.const(0.125), A.DOT))
CAUSAL = AttentionSpec(score=A.where(A.ge(I, J), PLAIN.score, A.const(float("-inf"))))
WINDOW = AttentionSpec(
    score=A.where(A.and_(A.ge(I, J), A.lt(A.sub(I, J), A.const(1024))), PLAIN.score, A.const(float("-inf")))
)


def ask(spec=PLAIN, T=4096, S=None, device="cuda", **fields):
    dims = dict(B=1, H=16, G=16, T=T, S=T if S is None else S, D=128, Dv=128)
    refused = {"library": "it runs on the CPU"} if device == "cuda" else {"flash": "no GPU", "decode": "no GPU"}
    return Question(spec, dims, "bfloat16" if device == "cuda" else "float32", device, refused=refused, **fields)


def predicted(question, device, tier):
    decision = decide(question, Options(), device=device)
    return next(c.predicted_ms for c in (decision, *decision.alternatives) if c.tier == tier)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spec", [PLAIN, CAUSAL, WINDOW], ids=["plain", "causal", "window"])
def test_a_gpu_gets_the_flash_kernel(spec, training):
    decision = decide(ask(spec, training=training), Options(), device=H100)
    assert decision.tier == "flash" and "x the original's time" in decision.reason


def test_what_is_masked_costs_nothing():
    plain, causal, window = (predicted(ask(spec, 16384), H100, "flash") for spec in (PLAIN, CAUSAL, WINDOW))
    assert causal == pytest.approx(plain / 2, rel=0.05)
    assert window < 0.2 * causal


def test_a_faster_device_is_predicted_to_be_faster():
    assert predicted(ask(), H100, "flash") < predicted(ask(), A100, "flash")
    assert predicted(ask(), H100, "kept") < predicted(ask(), A100, "kept")


def test_the_predicted_rate_is_that_of_published_kernels():
    """FlashAttention-2 reaches about 70% of an A100's 312 TFLOP/s; the original of a graph that calls PyTorch's."""
    flops = 4 * 16 * 16384**2 * 128
    assert flops / predicted(ask(T=16384, native=True), A100, "kept") / 1e9 == pytest.approx(0.7 * 312, rel=0.15)


def test_few_queries_against_many_keys_get_the_decode_kernel():
    assert decide(ask(T=1, S=32768), Options(), device=H100).tier == "decode"
    assert decide(ask(T=4096, S=32768), Options(), device=H100).tier == "flash"


def test_a_device_without_known_rates_keeps_the_original_unless_told():
    assert "knows no rates of xpu" in decide(ask(device="xpu"), Options()).reason
    assert decide(ask(device="xpu"), Options(rewrite="always")).tier in ("library", "chunked")


def test_a_cpu_gets_the_library_for_long_causal_rows_and_keeps_short_ones():
    assert decide(ask(CAUSAL, device="cpu"), Options()).tier == "library"
    assert decide(ask(PLAIN, T=64, device="cpu"), Options()).tier == "kept"


def test_sums_of_the_weights_count():
    one, none = (predicted(ask(CAUSAL, device="cpu", sums=n), None, "library") for n in (1, 0))
    assert one > none


def test_no_allowed_tier_says_why_each_cannot():
    decision = decide(ask(), Options(tiers=("library",)), device=H100)
    assert decision.tier == "kept" and decision.reason == "no allowed tier can run it (library: it runs on the CPU)"
