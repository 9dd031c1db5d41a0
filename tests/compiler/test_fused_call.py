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


def test_on_a_gpu_the_decision_writes_the_call(monkeypatch):
    """Fake tensors make a device possible that is not present."""
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
