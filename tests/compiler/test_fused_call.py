"""Rewrite a graph with PyTorch's fused operator as on a GPU. Here it runs on a CPU, with another kernel."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from attnfx.compiler import choose as deciding
from attnfx.compiler import pipeline
from attnfx.ir import algebra as A
from attnfx.kernels.library import cuda as call
from attnfx.options import Options
from attnfx.spec import AttentionSpec, I, J
from attnfx.targets import Target
from attnfx.targets import sdpa_dispatch as fused
from tests.support import check, compiled, qkv, rand

SCORE = A.mul(A.const(0.125), A.DOT)


PLAIN = AttentionSpec(score=SCORE, out_dtype="bfloat16")


CAUSAL = replace(PLAIN, score=A.where(A.ge(I, J), SCORE, A.const(-math.inf)))


GPU = torch.device("cuda")


@pytest.fixture
def graphs(monkeypatch):
    """Make the library tier a call of PyTorch's operator, as on a GPU, and collect the rewritten graphs."""
    made = []

    def written(match, sizes, tier, kernel):
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
    """Return each call of PyTorch's operator, and check that operators of attnfx are absent."""
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
    """Compute attention with operands and output in the layout of a model's projections."""
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
    """The mean over heads needs the logsumexp, which PyTorch's operator does not return."""

    def fn(q, k, v):
        w = torch.softmax(q @ k.mT / 8, -1)
        return w @ v, w.mean(1)

    check(fn, *qkv(), train=False)
    assert not [n for n in graphs[0].gm.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]


def test_rows_that_start_at_odd_places_are_copied_first(graphs):
    """The kernels load 16 bytes at once, and one of them raises an error for misaligned rows."""

    def parts(x):
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in x[..., :96].split(32, -1))
        return plain(q, k, v)

    check(parts, rand(2, 40, 99), tiers=("library",))
    (made,) = calls(graphs)
    assert all(x.target is torch.ops.aten.contiguous.default for x in made.args[:3])
    check(lambda x: parts(torch.nn.functional.pad(x, (0, 1))), rand(2, 40, 99), tiers=("library",))
    made = calls(graphs)[-1]
    assert all(x.target is not torch.ops.aten.contiguous.default for x in made.args[:3])


@pytest.fixture
def flash_on_a_cpu():
    """Let the operator of FlashAttention run on a CPU, for which PyTorch lacks a kernel."""
    aten = torch.ops.aten

    def forward(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale)
        lengths, seed = [torch.empty(0, dtype=torch.int32)] * 2, torch.zeros(2, dtype=torch.uint64)
        return out, logsumexp, *lengths, q.shape[2], k.shape[2], seed, seed[0], torch.empty(0)

    def backward(grad, q, k, v, out, logsumexp, _q, _k, _t, _s, dropout, causal, _seed, _offset, *, scale=None):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        given = grad, q, k, v, out, logsumexp, dropout, causal
        dq, *rest = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, scale=scale)
        return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in rest)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("fn", "args"), [
    (plain, dict(t=5, s=33)), (causal, dict(t=33)), (grouped, dict(h=6, g=2)), (heads_last, {}),
], ids=["plain", "causal", "grouped", "heads last"])  # fmt: skip
def test_the_operator_of_flash_attention_gives_what_eager_gives(monkeypatch, graphs, flash_on_a_cpu, fn, args, train):
    monkeypatch.setattr(deciding, "fused_call", lambda match, *_: call.call_of(match.spec)._replace(flash=True))
    check(fn, *qkv(**args), train=train, tiers=("library",))
    named = torch.ops.aten._scaled_dot_product_flash_attention.default
    (made,) = [n for made in graphs for n in made.gm.graph.nodes if n.target is named]
    assert made.args[3:] == (0.0, fn is not plain, False) and not calls(graphs)


def on_an_h100(monkeypatch, options, fn, *shapes, backends=fused.USUAL, training=False):
    """Return the rewritten graph for a GPU that is not present, and its site; fake tensors have its device."""
    kernels, made = call.kernels, []

    def as_present(spec, dtype, device, *widths_and_target, **shape):
        widths, target = widths_and_target[:2], widths_and_target[2:]
        known = target if target and target[0] is not None else (90, backends)
        return kernels(spec, dtype, device, *widths, *known, **{**shape, "training": training})

    def backend(gm, _):
        made.append(pipeline.run(gm, Options.make(options)))
        return gm.forward

    monkeypatch.setattr(call, "kernels", as_present)
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        some = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        torch.compile(lambda *x: fn(*x), backend=backend)(*some)
    (site,) = made[0].report.sites
    return made, site


WIDE = (4, 8, 4096, 128), (4, 2, 4096, 128), (4, 2, 4096, 128)


def test_on_a_gpu_the_decision_writes_the_call(monkeypatch):
    made, site = on_an_h100(monkeypatch, {"target": "h100-sxm"}, grouped, *WIDE)
    assert (site.decision.tier, site.decision.kernel) == ("library", fused.CUDNN) and not site.notes
    (written,) = calls(made)
    assert written.args[1].meta["val"].shape == (4, 2, 4096, 128) and written.kwargs == {
        "scale": 0.3,
        "enable_gqa": True,
    }


def flash_calls(made):
    named = torch.ops.aten._scaled_dot_product_flash_attention.default
    return [n for n in made[0].gm.graph.nodes if n.target is named]


@pytest.mark.parametrize("flash", ["FA3", "FA4"])
def test_flash_attention_is_called_by_its_own_operator_as_pytorch_prefers_cudnn(monkeypatch, flash):
    target = replace(Target.by_name("h100-sxm"), flash_attention=flash)
    choice = {"target": target, "tiers": ("library",)}
    shapes = [(2, 8, 4096, 64)] * 3
    made, site = on_an_h100(monkeypatch, choice, plain, *shapes, backends=fused.Backends(flash=flash))
    assert site.decision.kernel == fused.IMPLEMENTATIONS[flash]
    assert fused.CUDNN in [c.kernel for c in site.decision.alternatives]
    (written,) = flash_calls(made)
    assert written.args[3:] == (0.0, False, False) and written.kwargs == {"scale": 0.125}
    assert not calls(made)


def test_training_never_calls_a_kernel_of_cudnn_off_the_list(monkeypatch):
    """Neither where the decision knows it, nor where the target that was named has a cuDNN on the list."""
    choice = {"target": "h100-sxm", "tiers": ("library",), "rewrite": "always"}
    made, site = on_an_h100(monkeypatch, choice, grouped, *WIDE, training=True)
    assert len(flash_calls(made)) == 1 and not calls(made)
    monkeypatch.setattr(fused, "CUDNN_BACKWARD", {93100: "a test"})
    choice["target"] = replace(Target.by_name("h100-sxm"), cudnn=93100)
    made, site = on_an_h100(monkeypatch, choice, grouped, *WIDE, training=True)
    assert site.decision.kernel == fused.CUDNN and len(flash_calls(made)) == 1 and not calls(made)
    made, site = on_an_h100(monkeypatch, choice, grouped, *WIDE, training=True, backends=fused.Backends(93100))
    assert len(calls(made)) == 1
