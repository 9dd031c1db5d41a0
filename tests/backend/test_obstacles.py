"""Name the obstacle: the report on each naive model has its code and the line of the user's code."""

import ast
import inspect
import warnings
from pathlib import Path

import pytest
import torch

import attnfx
from attnfx.errors import RefusalError
from attnfx.passes.fx.examples import Untraceable
from attnfx.report.codes import CODES, page
from attnfx.report.records import Decision, Refusal
from tests.backend.obstacles import OBSTACLES, B, D, H, T
from tests.support import compiled, qkv

ROOT = Path(__file__).resolve().parents[2]


def line_of(fn):
    lines, first = inspect.getsourcelines(fn)
    (at,) = [n for n, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return f"obstacles.py:{first + at}"


@pytest.mark.parametrize("name", OBSTACLES)
def test_the_report_names_the_code_and_the_line(name):
    fn, code, options = OBSTACLES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = attnfx.explain(fn, **options)(*qkv(B, H, T, T, D))
    (site,) = [s for s in (*report.sites, *report.others) if s.code == code]
    assert not any(s.rewritten for s in report.sites), str(report)
    where = site.refusal.where if site.refusal is not None else site.where
    assert where == line_of(fn), str(report)
    assert code in str(report) and where in str(report)
    if site.refusal is not None:
        assert site.refusal.hint and site.refusal.closest and len(site.refusal.message) > 10


NAMED = {
    "unknown_operator": "linalg_inv between the scores and the softmax",
    "batch_norm_in_training": "the operator batch_norm between the scores and the values",
    "weights_summed_up_over_queries": "the operator cumsum between the scores and the values",
    "scores_of_their_own_rank": "the scores pass through sort,",
    "integer_scores": "the product of queries and keys, matmul, has the dtype torch.int64",
    "complex_scores": "matmul returns torch.complex64",
    "keys_changed_in_place": "add_ changes the key in place",
    "dropped_weights_returned": "by way of dropout",
}


@pytest.mark.parametrize("name", NAMED)
def test_the_message_names_the_operator(name):
    fn, _, options = OBSTACLES[name]
    report = attnfx.explain(fn, **options)(*qkv(B, H, T, T, D))
    (site,) = (*report.sites, *report.others)
    assert NAMED[name] in site.refusal.message


def test_an_operator_of_the_layer_before_is_not_named():
    def fn(q, k, v):
        x = torch.nn.functional.layer_norm((q @ k.mT).softmax(-1) @ v, (D,))
        return (x @ x.mT).softmax(-1).cumsum(-2) @ x

    report = attnfx.explain(fn, rewrite="always")(*qkv(B, H, T, T, D))
    (message,) = [s.refusal.message for s in (*report.sites, *report.others) if s.code == "rows_mixed"]
    assert "the operator cumsum between" in message and "layer_norm" not in message


def test_a_graph_break_says_what_broke_the_graph():
    report = attnfx.explain(OBSTACLES["break_before_the_softmax"].fn, rewrite="always")(*qkv())
    (site,) = report.sites
    assert "torch._dynamo.graph_break()" in site.refusal.message
    assert "Remove the `torch._dynamo.graph_break()` call" in site.refusal.hint


def test_a_graph_that_cannot_be_traced_tells_of_its_softmaxes(monkeypatch):
    def fail(*_):
        raise Untraceable("an operator that is unknown")

    monkeypatch.setattr("attnfx.passes.prepare.trace.run", fail)
    fn = OBSTACLES["short_sequence"].fn
    report = attnfx.explain(fn)(*qkv())
    (softmax,) = report.others
    assert softmax.code == "untraceable" and softmax.refusal.where == line_of(fn)
    assert "an operator that is unknown" in softmax.refusal.message and not report.sites


def test_a_break_elsewhere_is_no_refusal():
    def fn(q, k, v):
        out = ((q @ k.mT) * 0.25).softmax(-1) @ v
        torch._dynamo.graph_break()
        return ((out @ k.mT) * 0.25).softmax(-1) @ v

    report = attnfx.explain(fn, rewrite="always")(*qkv())
    assert [s.code for s in report.sites] == ["", ""] and not report.others


def test_scores_that_the_caller_gives_are_no_graph_break():
    report = attnfx.explain(lambda s, v: s.softmax(-1) @ v, rewrite="always")(
        torch.randn(2, 4, 24, 24), qkv()[2][:, :, :24]
    )
    assert [s.code for s in (*report.sites, *report.others)] == ["not_attention"]


def test_a_softmax_of_a_softmax_is_told_of_once():
    report = attnfx.explain(lambda q, k, v: (q @ k.mT).softmax(-1).softmax(-1) @ v, rewrite="always")(*qkv())
    assert len(report.sites) == 1 and not report.others


def test_strict_raises_the_code_the_line_and_the_hint():
    fn = OBSTACLES["keys_changed_in_place"].fn
    with pytest.raises(Exception) as raised:
        compiled(fn, strict=True)(*qkv(B, H, T, T, D))
    chain = [raised.value, raised.value.__cause__, getattr(raised.value, "inner_exception", None)]
    (error,) = [e for e in chain if isinstance(e, RefusalError)][:1]
    assert "[mutated]" in str(error) and line_of(fn) in str(error) and "write `k = k.add(1.0)`" in str(error)


def test_a_code_that_is_not_in_the_table_cannot_be_made():
    for make in (lambda: Refusal("no_such_code", "something"), lambda: Decision("kept", "", code="no_such_code")):
        with pytest.raises(ValueError, match="no_such_code"):
            make()
    with pytest.raises(TypeError):
        CODES["new"] = CODES["slower"]


def test_the_page_of_codes_has_a_heading_for_each_and_no_other():
    text = (ROOT / "docs" / "refusals.md").read_text()
    assert [line[4:] for line in text.splitlines() if line.startswith("### ")] == list(CODES)
    assert text == page(), "write it again: python -m attnfx.report.codes > docs/refusals.md"


def test_every_code_in_the_source_is_in_the_table():
    """Codes are literals at the place that raises them, so a misspelled one would only be noticed at run time."""
    makers = {"Refused", "NotNormalised", "refusal", "Refusal", "unread"}
    found = set()
    for file in [*(ROOT / "passes").rglob("*.py"), *(ROOT / "attnfx" / "compiler").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in makers:
                found |= {a.value for a in node.args[:2] if isinstance(a, ast.Constant) and str(a.value).isidentifier()}
    assert len(found) > 20 and found <= set(CODES)


def test_every_decision_to_keep_has_a_code():
    missing = []
    for file in [*(ROOT / "attnfx" / "cost").rglob("*.py"), *(ROOT / "attnfx" / "compiler").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and node.args and getattr(node.func, "id", "") in ("_of", "Decision"):
                first, last = node.args[0], node.args[-1]
                keeps = getattr(first, "id", "") == "kept" or getattr(first, "value", "") == "kept"
                given = [last, *(k.value for k in node.keywords if k.arg == "code")]
                if keeps and not any(isinstance(g, ast.Constant) and g.value in CODES for g in given):
                    missing.append(f"{file.name}:{node.lineno}")
    assert missing == [], "give the reason a code of attnfx/report/codes.py"
