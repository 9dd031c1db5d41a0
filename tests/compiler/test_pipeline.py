"""Keep the five steps separate: search once for all options, choose without changes, log the work of each pass."""

import logging

import pytest
import torch

import attnfx
from attnfx.compiler import find, pipeline
from attnfx.compiler.choose import choose
from attnfx.compiler.context import Context
from attnfx.options import Options
from attnfx.report.report import Report
from tests.support import compiled, error, new_reports, qkv, run

SCALE = 0.35


def attend(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1) @ v


def in_chunks(q, k, v):
    return torch.cat([attend(part, k, v) for part in q.chunk(4, 2)], 2)


@pytest.fixture
def fixed_times(monkeypatch):
    """Run every candidate, but report the length of its name as its ms."""
    names = []

    def shortest(runs, device):
        for call in runs.values():
            call()
        names.extend(runs)
        return {name: float(len(name)) for name in runs}

    monkeypatch.setattr("attnfx.tuning.timing.shortest", shortest)
    return names


@pytest.fixture
def searches(monkeypatch):
    found, original = [], pipeline.find
    monkeypatch.setattr(pipeline, "find", lambda *args: (found.append(args), original(*args))[1])
    return found


def test_the_search_runs_once_for_verification_tuning_and_a_budget(searches, fixed_times):
    args = qkv()
    with new_reports() as filed:
        fn = compiled(attend, verify="first", tune=True, memory_budget="1GiB", rewrite="cost")
        got = run(fn, args, True)
    assert error(got, run(attend, args, True)) < 1e-5
    assert len(searches) == 1
    (site,) = filed[0].sites
    assert site.decision.reason.startswith("measured") and site.decision.tier == "kept"


def test_a_budget_chooses_again_over_the_same_search(searches):
    """A site that would be kept by its cost is rewritten if only the rewrite fits."""
    args = qkv(b=1, h=2, t=512)
    with new_reports() as filed:
        run(compiled(attend, memory_budget="6MiB", rewrite="cost"), args, True)
    assert len(searches) == 1
    assert [s.rewritten for r in filed for s in r.sites] == [True]


def test_a_loop_over_chunks_is_tuned(fixed_times):
    """The merged site is timed as matched; a second search of the extracted graph would find its chunks."""
    args = qkv()
    with new_reports() as filed:
        got = run(compiled(in_chunks, tune=True), args, False)
    assert error(got, run(in_chunks, args, False)) < 1e-5
    (site,) = filed[0].sites
    assert site.rewritten and site.decision.reason.startswith("measured")
    assert {"kept", "library", "chunked"} <= set(fixed_times)
    assert "joined from 4 chunks of queries" in " ".join(site.notes)


def test_choosing_changes_no_graph(monkeypatch):
    seen = []

    def spy(gm, options, *rest, **named):
        context = Context(options, Report())
        found = pipeline._searched(gm, context)
        before = str(found.graph.gm.graph)
        seen.append([choose(found, context, options), choose(found, context, Options.make({"rewrite": "cost"}))])
        assert str(found.graph.gm.graph) == before
        return pipeline.Result(None, Report())

    monkeypatch.setattr(pipeline, "run", spy)
    compiled(attend)(*qkv())
    ((always, by_cost),) = seen
    assert [c.site.decision.tier != "kept" for c in (*always, *by_cost)] == [True, False]


def test_each_pass_and_its_changes_are_logged(caplog):
    def pairs(q, k, v):
        return torch.einsum("bhid,de,ef->bhif", q, k.new_ones(8, 8), k.new_ones(8, 8)), attend(q, k, v)

    with caplog.at_level(logging.DEBUG, "attnfx.compiler.pipeline"):
        compiled(pairs)(*qkv())
    said = [r.getMessage() for r in caplog.records if "changes" in r.getMessage()]
    names = [step.__name__.rpartition(".")[2] for step in pipeline.PREPARE]
    assert [line.split(":")[0].removeprefix("pass ") for line in said] == names
    assert "pass distribute_products: 1 changes" in said and "pass merge_key_sets: 0 changes" in said


def test_dump_dir_has_a_stage_for_each_pass_that_changed_the_graph(tmp_path):
    def pairs(q, k, v):
        return torch.einsum("bhid,de,ef->bhif", q, k.new_ones(8, 8), k.new_ones(8, 8)), attend(q, k, v)

    compiled(pairs, dump_dir=tmp_path)(*qkv())
    stages = sorted(p.name for p in (tmp_path / "graph_0" / "passes").iterdir())
    assert stages == ["01_trace.py", "02_distribute_products.py"]
    texts = [(tmp_path / "graph_0" / "passes" / name).read_text() for name in stages]
    assert [text.count("aten.einsum") for text in texts] == [1, 2]


@pytest.mark.parametrize("checked", [True, False])
def test_the_graph_is_verified_after_each_pass_where_that_is_asked(monkeypatch, checked):
    """A pass that leaves a node without an example value is named under `strict`."""

    def broken(graph):
        nodes = graph.gm.graph
        first = next(n for n in nodes.nodes if n.op == "call_function")
        with nodes.inserting_after(first):
            made = nodes.call_function(torch.ops.aten.neg.default, (first,))
        first.replace_all_uses_with(made, delete_user_cb=lambda u: u is not made, propagate_meta=False)
        return 1

    monkeypatch.setattr(pipeline, "CHECK_EACH", checked)
    monkeypatch.setattr("attnfx.passes.prepare.merge_key_sets.run", broken)
    with pytest.warns(
        UserWarning, match="the pass merge_key_sets: AssertionError" if checked else "has no example value"
    ):
        got = compiled(attend)(*(args := qkv()))
    torch.testing.assert_close(got, attend(*args))


def test_explain_and_the_backend_run_the_same_pipeline(searches):
    attnfx.explain(attend, rewrite="always")(*qkv())
    compiled(attend)(*qkv())
    assert len(searches) == 2 and find.find is not pipeline.find
