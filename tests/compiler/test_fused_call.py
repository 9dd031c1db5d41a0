"""PyTorch's fused operator as a rewrite on a GPU: the call itself stands in the graph. Here it runs on a CPU, where the
operator is the same and its kernel another."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from attnfx import Target
from attnfx.compiler import choose as deciding
from attnfx.compiler import pipeline
from attnfx.cost import Question, select
from attnfx.ir import algebra as A
from attnfx.kernels.library import cuda as call
from attnfx.kernels.operators.attention import refusals
from attnfx.memory.workspace import Operand, Use, workspace
from attnfx.options import Options
from attnfx.passes.joint.read_graph import attention_workspace
from attnfx.spec import AttentionSpec, Capture, H, I, J
from attnfx.targets import sdpa_dispatch as fused
from tests.support import check, compiled, qkv, rand

SCORE = A.mul(A.const(0.125), A.DOT)
PLAIN = AttentionSpec(score=SCORE, out_dtype="bfloat16")
CAUSAL = replace(PLAIN, score=A.where(A.ge(I, J), SCORE, A.const(-math.inf)))
GPU = torch.device("cuda")


@pytest.fixture
def graphs(monkeypatch):
    """As on a GPU, the library tier is a call of PyTorch's operator; the graphs that it is written into."""
    made = []

    def written(match, tier):
        found = call.call_of(match.spec)
        return found if tier == "library" and isinstance(found, call.Fused) else None

    def run(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    original = pipeline.run
    monkeypatch.setattr(deciding, "fused_call", written)
    monkeypatch.setattr(pipeline, "run", run)
    return made


def calls(graphs):
    """Operands and settings of each call of the operator; no operator of attnfx's own is left."""
    nodes = [n for made in graphs for n in made.gm.graph.nodes]
    assert not any("attnfx" in str(n.target) for n in nodes)
    return [n for n in nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]


def plain(q, k, v):
    return torch.softmax(q @ k.mT / 8, -1) @ v


def causal(q, k, v):
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax((q @ k.mT * 0.3).masked_fill(hidden, -math.inf), -1) @ v


def causal_by_a_finite_fill(q, k, v):
    i = torch.arange(q.shape[2])
    mask = torch.where(i[:, None] >= i, 0.0, torch.finfo(torch.float32).min).to(q.dtype)
    return torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 4 + mask, -1) @ v


def grouped(q, k, v):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return causal(q, k, v)


def heads_last(q, k, v):
    """Operands as a model's projection leaves them, and the output as the next one wants it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return causal(q, k, v).transpose(1, 2).flatten(2)


def keys_stored_transposed(q, k, v):
    return torch.softmax(q @ k / 8, -1) @ v.mT


FORMS = [
    (plain, lambda: qkv(), False),
    (plain, lambda: qkv(t=5, s=33), False),
    (plain, lambda: (rand(2, 4, 40, 8), rand(2, 4, 40, 8), rand(2, 4, 40, 24)), False),
    (causal, lambda: qkv(t=33), True),
    (causal_by_a_finite_fill, lambda: qkv(), True),
    (grouped, lambda: qkv(h=6, g=2), True),
    (heads_last, lambda: qkv(), True),
    (keys_stored_transposed, lambda: (rand(2, 4, 40, 8), rand(2, 4, 8, 40), rand(2, 4, 8, 40)), False),
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("fn", "args", "is_causal"), FORMS, ids=[fn.__name__ + str(n) for n, (fn, *_) in enumerate(FORMS)]
)
def test_the_call_gives_what_eager_gives(graphs, fn, args, is_causal, train):
    check(fn, *args(), train=train, tiers=("library",))
    (made,) = calls(graphs)
    assert made.args[3:] == (None, 0.0, is_causal) and made.kwargs["enable_gqa"] == (fn is grouped)
    assert all(x.meta["val"].stride(-1) == 1 for x in made.args[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_inductor(graphs, dtype):
    check(causal, *(x.to(dtype) for x in qkv(t=64, d=16)), tiers=("library",), inner="inductor")
    assert calls(graphs)


def test_sizes_may_be_symbolic(graphs):
    fn = compiled(causal, dynamic=True, tiers=("library",))
    for t in (40, 56):
        args = qkv(t=t)
        torch.testing.assert_close(fn(*args), causal(*args), rtol=1e-4, atol=1e-5)
    assert calls(graphs) and len(graphs) == 1


@pytest.mark.parametrize("sizes", [dict(t=0, s=5), dict(t=5, s=0)], ids=str)
def test_sizes_may_be_zero(graphs, sizes):
    check(plain, *qkv(**sizes), train=False, tiers=("library",))


def test_it_is_compared_with_the_original_on_request(graphs, tmp_path):
    check(causal, *qkv(), tiers=("library",), verify="first", dump_dir=str(tmp_path))
    assert len(calls(graphs[-1:])) == 1


def test_autocast_and_checkpoints_keep_their_meaning(graphs):
    def cast(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.softmax(q @ k.mT / 8, -1).to(v.dtype) @ v

    check(cast, *qkv(), train=False, exact=False, tolerance=3e-2, tiers=("library",))
    check(lambda *x: checkpoint(causal, *x, use_reentrant=False), *qkv(), tiers=("library",))


def test_a_site_that_shares_its_weights_stays_an_operator_of_ours(graphs):
    """The sum over heads is made from the log-sum-exp, which PyTorch's operator does not give."""

    def fn(q, k, v):
        w = torch.softmax(q @ k.mT / 8, -1)
        return w @ v, w.mean(1)

    check(fn, *qkv(), train=False)
    assert not [n for n in graphs[0].gm.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]


# -- what it computes ---------------------------------------------------------------------------
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
        (replace(PLAIN, dropout=0.1), "it has dropout"),
        (replace(PLAIN, extra=(A.const(0.0),)), "logits without keys"),
        (replace(PLAIN, score=A.mul(A.const(-0.125), A.DOT)), "its scale is -0.125"),
        (replace(PLAIN, score=A.unary("tanh", A.DOT)), "not a multiple of the dot product"),
        (replace(PLAIN, score=A.add(SCORE, A.load(0, [H], "f")), captures=(Capture("f", 1),)), "it adds a bias"),
        (masked(A.and_(A.ge(I, J), A.lt(A.sub(I, J), A.const(64)))), "another one than plain causality"),
        (masked(A.ge(J, I)), "another one than plain causality"),
        (masked(A.lt(J, I)), "another one than plain causality"),
        (replace(masked(A.load(0, [J], "b")), captures=(Capture("b", 1),)), "another one than plain causality"),
        (replace(PLAIN, out_dtype="float32"), "gives bfloat16, the spec asks for float32 and float32"),
        (replace(PLAIN, compute="float64"), "the spec asks for float64"),
    ],
)
def test_what_it_would_compute_otherwise_is_refused(spec, reason):
    """A mask in a tensor may empty a row, of which the kernels make zeros; a row without keys is NaN in eager."""
    assert reason in why(spec)


@pytest.mark.parametrize(
    ("dtype", "capability", "widths", "cudnn", "expected"),
    [
        ("bfloat16", 90, (128, 128), True, fused.CUDNN),
        ("bfloat16", 90, (128, 64), True, fused.CUDNN),
        ("bfloat16", 100, (64, 64), True, fused.CUDNN),
        ("bfloat16", 90, (128, 128), False, fused.FLASH),
        ("bfloat16", 90, (192, 192), True, fused.FLASH),
        ("float16", 80, (256, 256), True, fused.FLASH),
        ("bfloat16", 80, (128, 64), True, fused.EFFICIENT),
        ("bfloat16", 89, (192, 192), True, fused.FLASH),
        ("bfloat16", 89, (200, 200), True, fused.EFFICIENT),
        ("bfloat16", 80, (264, 264), True, fused.EFFICIENT),
        ("bfloat16", 90, (100, 100), True, None),
        ("bfloat16", 80, (100, 64), True, None),
        ("bfloat16", 75, (128, 128), True, None),
        ("bfloat16", 130, (128, 128), True, None),
        ("float32", 90, (128, 128), True, fused.EFFICIENT),
        ("float32", 80, (36, 12), True, fused.EFFICIENT),
        ("float32", 80, (34, 34), True, None),
        ("float32", 75, (33, 7), True, fused.EFFICIENT),
        ("float32", 61, (64, 64), True, None),
        ("float16", 75, (128, 128), True, fused.EFFICIENT),
        ("float16", 70, (100, 100), True, None),
        ("float64", 80, (64, 64), True, None),
    ],
)
def test_the_kernel_is_the_one_that_pytorch_takes(dtype, capability, widths, cudnn, expected):
    assert fused.kernel(dtype, capability, *widths, cudnn=cudnn) == expected


def test_masks_and_oblong_causality_go_past_flash_attention_and_shared_heads_past_the_last_kernel():
    assert fused.kernel("bfloat16", 80, 64, 64, plain=False) == fused.EFFICIENT
    assert fused.kernel("bfloat16", 80, 64, 64, grouped=True) == fused.FLASH
    assert fused.kernel("bfloat16", 80, 64, 64, grouped=True, plain=False) is None
    assert fused.kernel("float32", 80, 64, 64, grouped=True) is None


def test_a_gpu_that_is_not_there_has_none_unless_it_is_named():
    assert call.expresses(PLAIN, torch.bfloat16, GPU, 64, 64) == "its kernels are for NVIDIA GPUs"
    assert "take no bfloat16 of width 64 on 7.5" in call.expresses(PLAIN, torch.bfloat16, GPU, 64, 64, 75)


def test_float32_has_a_kernel_on_every_gpu_where_no_heads_share_keys():
    single = replace(CAUSAL, out_dtype="float32")

    def why(capability, **shape):
        return call.expresses(single, torch.float32, GPU, 64, 64, capability, **shape)

    assert all(why(c) is None and why(c, square=False) is None for c in (70, 75, 80, 89, 90, 100, 120))
    assert why(75, grouped=True) == "its kernels take no float32 of width 64, with heads that share keys, on 7.5"


def test_oblong_causality_is_left_to_the_kernel_that_counts_from_the_first_key():
    half = torch.bfloat16
    assert "causal where there are as many" in call.expresses(CAUSAL, half, GPU, 64, 64, 90, square=False)
    assert call.expresses(CAUSAL, half, GPU, 64, 64, 80, square=False) is None
    assert call.expresses(PLAIN, half, GPU, 64, 64, 90, square=False) is None


def test_rows_that_start_at_odd_places_are_copied_first(graphs):
    """The kernels load 16 bytes at once, and one of them raises where it cannot."""

    def parts(x):
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in x[..., :96].split(32, -1))
        return plain(q, k, v)

    check(parts, rand(2, 40, 99), tiers=("library",))
    (made,) = calls(graphs)
    assert all(x.target is torch.ops.aten.contiguous.default for x in made.args[:3])
    check(lambda x: parts(torch.nn.functional.pad(x, (0, 1))), rand(2, 40, 99), tiers=("library",))
    made = calls(graphs)[-1]
    assert all(x.target is not torch.ops.aten.contiguous.default for x in made.args[:3])


# -- what it costs ------------------------------------------------------------------------------
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
    assert times["h100-sxm"][1] == pytest.approx(times["h100-sxm"][0], rel=0.05)  # cuDNN's kernel takes masks


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
    """Milliseconds; sources in attnfx/cost/others.json."""
    dims = dict(B=1, H=heads, G=heads, T=length, S=length, D=width, Dv=width)
    gpu = Target.by_name(device)
    ask = Question(replace(PLAIN, out_dtype=dtype), dims, dtype, "cuda", native=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "FLASH_WIDTH", 0)  # as where FlashAttention takes no such call
        kept = select(ask, Options(), device=gpu)
    kept = next(c for c in (kept, *kept.alternatives) if c.tier == "kept")
    assert kept.predicted_ms == pytest.approx(published, rel=0.03)


def test_an_older_cudnn_is_not_taken_first():
    new, old = library(), library(cudnn=False)
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


def test_on_a_gpu_the_decision_writes_the_call(monkeypatch):
    """With fake tensors, which stand on a device that is not there."""
    monkeypatch.setattr(call, "expresses", lambda *of, **shape: None)
    options, made = Options.make({"target": "h100-sxm"}), []

    def backend(gm, _):
        made.append(pipeline.run(gm, options))
        return gm.forward

    with FakeTensorMode(), torch.no_grad():
        q, k = (torch.empty(4, h, 4096, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2))
        torch.compile(lambda q, k, v: grouped(q, k, v), backend=backend)(q, k, k)
    (site,) = made[0].report.sites
    assert (site.decision.tier, site.decision.kernel) == ("library", fused.CUDNN) and not site.notes
    (written,) = calls(made)
    assert written.args[1].meta["val"].shape == (4, 2, 4096, 128) and written.kwargs == {
        "scale": 0.3,
        "enable_gqa": True,
    }


@pytest.mark.parametrize("groups", [16, 4])
def test_the_models_own_call_counts_it_too(groups):
    """Captured on a CPU, or with a kernel for GPUs: the query's gradient in float32, and each head's of shared keys."""
    query, key = torch.empty(2, 16, 200, 64, device="meta"), torch.empty(2, groups, 300, 64, device="meta")
    expected = fused.workspace(query.shape, key.shape, 64, 4)
    assert expected >= 4 * 2 * 16 * 256 * 65
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        for suffix in ("", "_backward"):
            graph = torch.fx.Graph()
            operands = [graph.placeholder(n) for n in "gqkv"]
            for x, held in zip(operands, (query, query, key, key), strict=True):
                x.meta["val"] = held
            target = getattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}").default
            node = graph.call_function(target, tuple(operands[not suffix :]))
            assert attention_workspace(node, cpu=False) == (expected if suffix else 0)
            shorter = attention_workspace(node, cpu=False, shape=lambda x: [*x.meta["val"].shape[:2], 128, 64])
            assert shorter == (fused.workspace((2, 16, 128), (2, groups, 128, 64), 64, 4) if suffix else 0)
