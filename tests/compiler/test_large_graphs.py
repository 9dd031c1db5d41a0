"""Compile large and deep graphs: the work grows with the nodes, and the report names the scores that are too deep."""

import sys

import pytest

from attnfx.compiler import pipeline
from attnfx.compiler.choose import choose
from attnfx.compiler.context import Context
from attnfx.compiler.find import find
from attnfx.options import Options
from attnfx.passes.lift.graph import Graph
from attnfx.passes.prepare import expand_vmap, inline_checkpoints, trace
from attnfx.report.report import Report
from tests.compiler import graphs

OPTIONS = Options.make({"rewrite": "always", "strict": True})
TRACING = (inline_checkpoints, expand_vmap, trace)


def rewritten(gm, stages=False):
    """Return the report on an ATen graph, and its rewritten form: every step of the pipeline apart from tracing."""
    context = Context(OPTIONS, Report(), stages=stages)
    graph = Graph(gm, traced=True)
    for step in pipeline.PREPARE:
        if step not in TRACING:
            pipeline._passed(step, graph, False)
    found = find(graph, context, None, {})
    made, _ = pipeline._applied(found, pipeline._named({"": choose(found, context, OPTIONS)}), context, False)
    return context.report, made


def calls(gm):
    """Return the number of calls of attnfx's functions, and of resumed generators, in the rewriting of a graph."""
    count = 0

    def seen(frame, event, arg):
        nonlocal count
        count += event == "call" and frame.f_globals.get("__name__", "").startswith("attnfx")

    sys.setprofile(seen)
    try:
        rewritten(gm)
    finally:
        sys.setprofile(None)
    return count


LINEAR = {
    "chain": 10, "steps": 15, "row_steps": 10, "kept_steps": 10, "query_chunks": 30, "head_steps": 30, "key_sets": 10,
    "nested": 20, "nested_softmaxes": 40, "deep_scores": 300, "deep_weights": 300, "deep_bias": 300, "many_dims": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_the_work_grows_with_the_nodes(name):
    build, n = getattr(graphs, name), LINEAR[name]
    calls(build(n))  # fills caches
    once, twice, again = (calls(build(size)) for size in (n, 2 * n, 4 * n))
    assert again - twice <= 2.1 * (twice - once), (once, twice, again)


@pytest.mark.parametrize("name", ["squares", "integer_products"])
def test_repeated_products_do_not_grow_exponentially(name):
    few, many = (calls(getattr(graphs, name)(n)) for n in (20, 40))
    assert many <= 3 * few


@pytest.mark.parametrize("name", ["deep_scores", "deep_weights"])
def test_scores_that_are_too_deep_are_given_up_in_the_report(name):
    report, _ = rewritten(getattr(graphs, name)(2000))
    (site,) = report.sites
    assert site.code == "rows_mixed" and "more than 400 operators" in site.refusal.message
    assert "at most 400 operators" in site.refusal.hint


def test_scores_below_the_largest_depth_are_lifted():
    (site,) = rewritten(graphs.deep_scores(390))[0].sites
    assert site.rewritten and site.spec is not None


def test_a_bias_of_any_depth_is_loaded():
    (site,) = rewritten(graphs.deep_bias(2000))[0].sites
    assert site.rewritten and len(site.spec.captures) == 1


@pytest.mark.parametrize("name", ["nested", "nested_softmaxes", "many_dims", "squares", "integer_products"])
def test_nests_and_products_are_rewritten(name):
    report, _ = rewritten(getattr(graphs, name)(30), stages=True)
    assert report.sites and report.rewritten == report.sites and not report.notes


def test_a_long_loop_over_chunks_becomes_one_attention():
    report, made = rewritten(graphs.query_chunks(250))
    assert len(report.sites) == 1 == len(report.rewritten) and len(made.graph.nodes) < 50


def test_a_long_loop_of_steps_is_rewritten_at_each():
    report, _ = rewritten(graphs.steps(250))
    assert len(report.rewritten) == 250 == len(report.sites)
