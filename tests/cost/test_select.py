"""Order candidates correctly by sizes and by device."""

from dataclasses import replace

import pytest

from attnfx.cost import Question, select, select_rows
from attnfx.cost import row_chunks as rows
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
    decision = select(question, Options(), device=device)
    return next(c.predicted_ms for c in (decision, *decision.alternatives) if c.tier == tier)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spec", [PLAIN, CAUSAL, WINDOW], ids=["plain", "causal", "window"])
def test_a_gpu_gets_the_flash_kernel(spec, training):
    decision = select(ask(spec, training=training), Options(), device=H100)
    assert decision.tier == "flash" and "x the original's time" in decision.reason


def test_what_is_masked_costs_nothing():
    plain, causal, window = (predicted(ask(spec, 16384), H100, "flash") for spec in (PLAIN, CAUSAL, WINDOW))
    assert causal == pytest.approx(plain / 2, rel=0.05)
    assert window < 0.2 * causal


def test_a_faster_device_is_predicted_to_be_faster():
    assert predicted(ask(), H100, "flash") < predicted(ask(), A100, "flash")
    assert predicted(ask(), H100, "kept") < predicted(ask(), A100, "kept")


def test_the_predicted_rate_is_that_of_published_kernels():
    """FlashAttention-2 reaches about 70% of an A100's 312 TFLOP/s; here it is the original, PyTorch's own operator."""
    flops = 4 * 16 * 16384**2 * 128
    assert flops / predicted(ask(T=16384, native=True), A100, "kept") / 1e9 == pytest.approx(0.7 * 312, rel=0.15)


def test_few_queries_against_many_keys_get_the_decode_kernel():
    assert select(ask(T=1, S=32768), Options(), device=H100).tier == "decode"
    assert select(ask(T=4096, S=32768), Options(), device=H100).tier == "flash"


def test_a_device_without_known_rates_keeps_the_original_unless_told():
    assert "has no compute rates for xpu" in select(ask(device="xpu"), Options()).reason
    assert select(ask(device="xpu"), Options(rewrite="always")).tier in ("library", "chunked")


def test_a_cpu_gets_the_library_for_long_causal_rows_and_keeps_short_ones():
    assert select(ask(CAUSAL, device="cpu"), Options()).tier == "library"
    assert select(ask(PLAIN, T=64, device="cpu"), Options()).tier == "kept"


def test_repeating_keys_for_grouped_heads_costs_the_original_their_copies():
    """Measured on a CPU, one query of 32 heads on 4096 keys of 8 heads, width 128: Inductor took 73 ms on repeated keys
    and values, the rewrites 8 to 12 ms. Under a mask it computes sums, which read through the repetition: 6 to 9 ms,
    the rewrites 3 to 7. PyTorch's own call took 7 ms."""

    def step(heads, queries, **fields):
        question = ask(device="cpu", **fields)
        return replace(question, dims=dict(B=1, H=heads, G=8, T=queries, S=4096, D=128, Dv=128))

    assert select(step(32, 1), Options()).tier == "chunked"
    assert select(step(32, 4), Options()).tier in ("chunked", "library")
    assert select(step(8, 4), Options()).tier == "kept"
    assert select(step(32, 1, native=True), Options()).tier == "kept"


def test_sums_of_the_weights_count():
    one, none = (predicted(ask(CAUSAL, device="cpu", sums=n), None, "library") for n in (1, 0))
    assert one > none


def test_no_allowed_tier_says_why_each_cannot():
    decision = select(ask(), Options(tiers=("library",)), device=H100)
    assert decision.tier == "kept"
    assert decision.reason == "no allowed tier can run this attention (library: it runs on the CPU)"


TALKING = {"product": 2, "mix": 2, "mul": 1, "softmax": 1}
BEST = {"product": 2, "mul": 1, "topk": 1, "lt": 1, "masked_fill": 1, "softmax": 1}


@pytest.mark.parametrize(
    ("work", "training", "measured"),
    [
        (TALKING, False, (1690, 1390, 1350)),
        (TALKING, True, (5860, 5790, 5200)),
        (BEST, False, (2770, 2495, 1800)),
        (BEST, True, (5590, 7495, 5200)),
    ],
)
def test_whole_rows_are_predicted_as_they_were_measured(work, training, measured):
    """Measured in ms under Inductor, in chunks call by call, and in chunks with a compiled body. The shape is 12 heads
    x 4096 x 64, float32, on one thread of an AMD EPYC."""
    kept, ways = rows.candidates(rows.Rows(work, 12 * 4096 * 4096, 4, 64, training))
    assert [c.kernel for c in (kept, *ways)] == ["inductor", rows.CALLS, rows.COMPILED]
    for candidate, ms in zip((kept, *ways), measured):
        assert 0.75 < candidate.predicted_ms / ms < 1.25


def whole_rows(n=4096, **of):
    return rows.Rows(**{"work": BEST, "values": 12 * n * n, "element": 2, "width": 64, "training": True, **of})


def test_whole_rows_on_a_gpu_are_predicted_from_its_rates():
    for training in (False, True):
        decision = select_rows(whole_rows(training=training, device="cuda"), Options(), False, device=H100)
        kept, *_ = [c for c in (decision, *decision.alternatives) if c.tier == "kept"]
        assert kept.predicted_ms > 0 and "estimated from the device's rates and not measured" in decision.reason
    assert "has no compute rates for xpu" in select_rows(whole_rows(device="xpu"), Options(), False).reason


def test_small_whole_rows_are_kept_with_the_size_from_which_chunks_pay_off():
    decision = select_rows(whole_rows(512, values=512 * 512, training=False), Options(), False)
    assert decision.tier == "kept" and decision.code == "slower"
    assert "usually pay off only from 64 MiB of scores, and these take 0.5 MiB" in decision.reason


def test_whole_rows_whose_scores_are_larger_than_memory_run_in_chunks():
    """2 * 12 * n^2 elements of 2 bytes do not fit in 80 GB at 65536 rows, but do at 16384."""
    chosen = [select_rows(whole_rows(n, device="cuda"), Options(), False, device=H100) for n in (16384, 65536)]
    assert [d.tier for d in chosen] == ["kept", "chunked"] and "the original exceeds the memory of" in chosen[1].reason
