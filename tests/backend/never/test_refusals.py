"""Refuse unsupported code with its refusal code and place; a failure of attnfx never costs the result."""

import warnings

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from tests.support import assert_kept, check, compiled, error, new_reports, qkv, raises_refusal, rand, run

SCALE = 0.3


LOW = torch.finfo(torch.float32).min


INF = float("-inf")


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def over_all_pairs(q, k, v):
    s = (q @ k.mT) * SCALE
    return s.flatten(2).softmax(-1).view_as(s) @ v


def summed_up(q, k, v):
    return ((q @ k.mT) * SCALE).cumsum(-2).softmax(-1) @ v


refused = pytest.mark.parametrize(
    ("fn", "code"), [(over_all_pairs, "softmax_dim"), (summed_up, "rows_mixed")], ids=["over all pairs", "summed up"]
)


def kept_by(fn, *args, **options):
    with new_reports() as filed:
        out = compiled(fn, **options)(*args)
    return out, filed


@refused
def test_a_refusal_says_why_and_where(fn, code):
    _, filed = kept_by(fn, *qkv())
    (site,) = [s for r in filed for s in r.sites]
    assert not site.rewritten
    assert site.refusal is not None and site.refusal.code == code
    assert len(site.refusal.message) > 10
    assert site.refusal.nodes
    assert "test_refusals.py:" in site.where


@refused
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_refused_attention_is_right(fn, code, inner):
    assert_kept(fn, *qkv(t=24), code=code, inner=inner)


def test_a_router_is_no_attention():
    fn = lambda x, gate, w: (x @ gate).softmax(-1) @ w  # noqa: E731
    assert_kept(fn, rand(2, 30, 16), rand(16, 8), rand(8, 16), code="shared_keys")


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, gate, w: torch.sigmoid(x @ gate) @ w,
        lambda x, gate, w: (x @ gate * torch.sigmoid(x @ gate)) @ w,
    ],
    ids=["gate", "gated layer"],
)
def test_a_layer_without_keys_is_no_attention(fn):
    check(fn, rand(2, 30, 16), rand(16, 8), rand(8, 16), sites=0)


def test_linear_attention_is_left_alone():
    def fn(q, k, v):
        return q.softmax(-1) @ (k.softmax(1).mT @ v)

    assert_kept(fn, *(rand(2, 30, 16) for _ in range(3)), code=["not_attention"] * 2)


def test_weights_that_the_caller_asked_for_exist():
    def fn(q, k, v):
        weights = ((q @ k.mT) * SCALE).softmax(-1)
        return weights @ v, weights

    check(fn, *qkv())


@refused
def test_strict_raises_where_a_site_is_refused(fn, code):
    with raises_refusal(code):
        compiled(fn, strict=True)(*qkv())


def test_strict_is_quiet_where_all_is_rewritten():
    check(attend, *qkv(), strict=True)


def break_inside(monkeypatch, place):
    def fail(*_, **__):
        raise ZeroDivisionError("broken for a test")

    monkeypatch.setattr(f"attnfx.{place}", fail)


@pytest.mark.parametrize(
    "place",
    ["compiler.pipeline.run", "passes.prepare.trace.run", "compiler.choose._Choosing.choice", "compiler.apply.rewrite"],
)
def test_a_failure_inside_attnfx_is_one_warning_and_the_model_runs(monkeypatch, place):
    break_inside(monkeypatch, place)
    args = qkv()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = compiled(attend)(*args)
    torch.testing.assert_close(out, attend(*args))
    ours = [w for w in seen if "attnfx" in str(w.message)]
    assert len(ours) == 1
    assert "ZeroDivisionError: broken for a test" in str(ours[0].message)
    assert "report" in str(ours[0].message)


@pytest.mark.slow
def test_a_failure_inside_attnfx_gives_the_original_graph_to_the_compiler(monkeypatch):
    break_inside(monkeypatch, "compiler.pipeline.check")
    with pytest.warns(UserWarning, match="attnfx failed"):
        got = run(compiled(attend, inner="inductor"), args := qkv(), True)
    assert error(got, run(attend, args, True)) < 1e-5


@pytest.mark.parametrize("place", ["compiler.pipeline.run", "compiler.apply.rewrite"])
def test_strict_raises_a_failure_inside_attnfx(monkeypatch, place):
    break_inside(monkeypatch, place)
    with pytest.raises(BackendCompilerFailed, match="ZeroDivisionError: broken for a test"):
        compiled(attend, strict=True)(*qkv())
