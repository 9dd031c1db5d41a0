"""Contain a failure of attnfx in the part in which it happens.

The program returns eager's results, one warning names the part that failed, and the report lists it.
"""

import warnings

import pytest
import torch
from torch._inductor import compile_fx

from attnfx.compiler import pipeline
from attnfx.kernels.operators import attention as operator
from attnfx.kernels.operators import exercise
from attnfx.kernels.rows import run as rows
from attnfx.passes.prepare import trace
from tests.support import compiled, error, new_reports, qkv, run

SCALE = 0.35


def attend(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1) @ v


def twice(q, k, v):
    """Compute two attentions, and a sum of the weights of the second."""
    w = (attend(q, k, v) @ k.mT * SCALE).softmax(-1)
    return w @ v, w.sum(-2)


def whole_rows(q, k, v):
    """Compute talking heads, a region of whole rows."""
    mix = torch.linspace(-1, 1, 16, dtype=q.dtype).view(4, 4)
    return torch.einsum("bhij,gh->bgij", q @ k.mT, mix).softmax(-1) @ v


def fail(*_, **__):
    raise ZeroDivisionError("planted")


@pytest.fixture(autouse=True)
def nothing_exercised(monkeypatch):
    monkeypatch.setattr(exercise, "_done", set())


def contained(fn, rewritten, **options):
    """Run a function, require eager's results and one warning, and return the warning's text and the report."""
    args = qkv()
    with new_reports() as filed, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = run(compiled(fn, **options), args, True)
    assert error(got, run(fn, args, True)) < 1e-5
    ours = [str(w.message) for w in seen if str(w.message).startswith("attnfx")]
    assert len(ours) == 1 and "planted" in ours[0] and "report this" in ours[0], ours
    (report,) = filed
    assert len(report.rewritten) == rewritten, str(report)
    assert "planted" in str(report)
    return ours[0], report


PASSES = [step for step in pipeline.PREPARE if step is not trace]


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.__name__.rpartition(".")[2])
def test_a_pass_that_fails_is_left_out(monkeypatch, step):
    def broken(graph):
        if graph.traced:  # the graph is half changed when it fails
            first, *rest = graph.gm.graph.nodes
            for n in rest[:-1]:
                n.replace_all_uses_with(first)
        fail()

    monkeypatch.setattr(step, "run", broken)
    message, _ = contained(twice, rewritten=2)
    assert f"the pass {step.__name__.rpartition('.')[2]}" in message


def test_a_trace_that_fails_leaves_the_graph_as_it_was(monkeypatch):
    monkeypatch.setattr(trace, "run", fail)
    contained(twice, rewritten=0)


STEPS = {
    "find.merge": "merge_parts", "find.find_reductions": "weight_reductions", "find.needed": "weight_uses",
    "find.others": "unmatched", "pipeline.share": "share", "pipeline.unmark": "unmark",
}  # fmt: skip


@pytest.mark.parametrize(("where", "name"), STEPS.items(), ids=list(STEPS))
def test_a_step_that_fails_is_left_out(monkeypatch, where, name):
    monkeypatch.setattr(f"attnfx.compiler.{where}", fail)
    message, _ = contained(twice, rewritten=2)
    assert f"the pass {name}" in message


@pytest.mark.parametrize("where", ["attnfx.passes.match.matcher.N.normalise", "attnfx.compiler.find.describe_site"])
def test_a_site_at_which_the_search_fails_is_kept_and_the_others_are_not(monkeypatch, where):
    fails_at(monkeypatch, where, 2)
    _, report = contained(twice, rewritten=1)
    assert [s.code for s in report.kept] == ["fault"]


@pytest.mark.parametrize("name", ["rewrite", "replace_region"])
def test_a_site_that_cannot_be_emitted_is_kept_and_the_others_are_not(monkeypatch, name):
    def both(q, k, v):
        return attend(q, k, v) + whole_rows(q, k, v)

    monkeypatch.setattr(f"attnfx.compiler.apply.{name}", fail)
    _, report = contained(both, rewritten=1)
    assert [s.code for s in report.kept] == ["fault"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tier", ["library", "chunked"])
def test_a_kernel_that_fails_is_found_when_the_graph_is_compiled(monkeypatch, tier, direction):
    monkeypatch.setitem(operator.TIERS, tier, operator.TIERS[tier]._replace(**{direction: fail}))
    _, report = contained(attend, rewritten=0, tiers=[tier])
    assert [s.code for s in report.kept] == ["exercise"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_whole_rows_that_fail_are_found_when_the_graph_is_compiled(monkeypatch, direction):
    monkeypatch.setattr(rows, direction, fail)
    _, report = contained(whole_rows, rewritten=0)
    assert [s.code for s in report.kept] == ["exercise"]


@pytest.mark.parametrize("operands", [(2, 2, 8, 8), (1, 1, 700, 4)], ids=["small", "large"])
def test_whole_rows_are_exercised_at_any_size(monkeypatch, operands):
    """Fake tensors are used if real ones would take too much memory."""
    monkeypatch.setattr(exercise, "LARGEST", 1 << 10)
    q = torch.randn(*operands, requires_grad=True)

    def top(q):
        s = q @ q.mT
        return s.masked_fill(s < s.topk(2, -1).values[..., -1:], -1e30).softmax(-1) @ q

    with new_reports() as filed, warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(top)(q).sum().backward()
    assert [len(r.rewritten) for r in filed] == [1]
    assert exercise._done


def test_each_call_is_exercised_once(monkeypatch):
    seen = []
    monkeypatch.setattr(exercise, "_run", lambda *args: seen.append(args))

    def layers(q, k, v):
        for _ in range(4):
            q = attend(q, k, v)
        return q

    compiled(layers)(*qkv())
    assert len(seen) == 1


def test_explain_exercises_nothing(monkeypatch):
    import attnfx

    monkeypatch.setattr(exercise, "_run", fail)
    assert len(attnfx.explain(attend, rewrite="always")(*qkv()).rewritten) == 1


@pytest.mark.slow
@pytest.mark.parametrize("at", ["forward", "lowering"])
def test_a_compiler_that_fails_on_the_rewritten_graph_compiles_the_graph_as_it_was(monkeypatch, at):
    original = compile_fx.compile_fx_inner if at == "forward" else compile_fx.compile_fx

    def compile_(gm, *args, **kwargs):
        if any("attnfx" in str(n.target) for n in gm.graph.nodes):
            fail()
        return original(gm, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner" if at == "forward" else "compile_fx", compile_)
    message, report = contained(attend, rewritten=0, inner="inductor")
    assert "test_containment.py" in message
    assert [s.code for s in report.kept] == ["compiler"]


@pytest.mark.slow
def test_a_backward_pass_that_cannot_be_compiled_runs_operator_by_operator(monkeypatch):
    original = compile_fx.compile_fx_inner

    def compile_(gm, *args, **kwargs):
        return fail() if kwargs.get("is_backward") else original(gm, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_)
    contained(twice, rewritten=2, inner="inductor")


@pytest.mark.parametrize("strict", [dict(strict=True)])
@pytest.mark.parametrize("place", ["find.merge", "apply.rewrite", "find.describe_site", "choose.prepare"])
def test_strict_raises_what_a_part_raised(monkeypatch, place, strict):
    monkeypatch.setattr(f"attnfx.compiler.{place}", fail)
    with pytest.raises(Exception, match="planted"):
        compiled(attend, **strict)(*qkv())


def test_explain_reports_a_part_that_failed(monkeypatch):
    import attnfx

    fails_at(monkeypatch, "attnfx.passes.match.matcher.N.normalise", 1)
    report = attnfx.explain(twice, rewrite="always")(*qkv())
    assert [s.code for s in report.kept] == ["fault"] and len(report.rewritten) == 1


def test_a_graph_in_which_nothing_is_rewritten_goes_on_as_dynamo_made_it(monkeypatch):
    given, compiled_ = [], []
    original = pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda gm, *a, **k: (given.append(gm), original(gm, *a, **k))[1])
    monkeypatch.setattr("attnfx.backend.compile_graph", lambda gm, *a, **k: (compiled_.append(gm), gm.forward)[1])
    x = torch.randn(3, 8)
    compiled(lambda x: (x.exp_() @ torch.ones(8, 8)).softmax(-1))(x)
    assert given and given[0] is compiled_[0]


def fails_at(monkeypatch, where, place):
    """Make the function fail, in every attempt, at the site of the `place`-th product with values."""
    import importlib

    module, _, name = where.rpartition(".")
    if module.endswith(".N"):
        module = "attnfx.passes.match.softmax"
    owner = importlib.import_module(module)
    original = getattr(owner, name)
    seen: list[str] = []

    def sometimes(first, *rest, **named):
        key = str(getattr(first, "final", first))
        if key not in seen:
            seen.append(key)
        return fail() if seen.index(key) == place - 1 else original(first, *rest, **named)

    monkeypatch.setattr(owner, name, sometimes)
