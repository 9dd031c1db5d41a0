"""Follow the advice of the report: it names the site's operators, lines and sizes, and leads to a rewrite."""

import inspect
import warnings

import pytest
import torch

import attnfx
from attnfx.report.advice import ADVICE, Advice, advise
from attnfx.report.codes import CODES
from attnfx.report.records import Decision, Refusal
from attnfx.report.report import Report
from attnfx.report.respell import EDITS, respell
from tests.backend import obstacles
from tests.backend.followed import FOLLOWED
from tests.backend.obstacles import OBSTACLES, B, D, H, T
from tests.support import qkv

TOLD = {  # what only this site's advice says, beside its line
    "weights_returned": "weights",
    "tier_not_allowed": '"library" or "chunked"',
    "short_sequence": "24 queries and 24 keys",
    "softmax_over_queries": "`return scores(q, k).softmax(-1) @ v`",
    "softmax_over_all_pairs": "(2, 4, 576)",
    "weights_transposed": "(2, 4, 24, 24)",
    "softmax_over_two_sources": "all 48 weights",
    "divided_by_the_sum_over_queries": "`return weights / weights.sum(-1, keepdim=True) @ v`",
    "divided_by_their_length": "`softmax`",
    "difference_of_softmaxes": "2 softmaxes",
    "product_of_softmaxes": "one of the 2 softmaxes",
    "dropped_out_twice": "p=0.19",
    "weights_raised_after_dropout": "p=0.1",
    "dropped_weights_returned": "p=0.1",
    "everything_dropped": "instead of 1.0",
    "logarithm_of_masked_rows": "-3.40282e+38",
    "mask_by_the_mean_score": "`mean = s.mean(-1, keepdim=True)`",
    "unknown_operator": "`linalg_inv`",
    "random_scores": "`exponential_`",
    "summed_up_over_queries": "`s = scores(q, k).cumsum(-1)`",
    "smoothed_over_queries": "`conv2d`",
    "batch_norm_in_training": "training=True, `batch_norm`",
    "scores_of_their_own_rank": "`sort`",
    "scores_beside_the_last": "`matmul`",
    "scores_less_their_mean": "`mean`",
    "complex_scores": "`matmul`",
    "integer_scores": "torch.int64",
    "weights_summed_up_over_queries": "`weights = weights.cumsum(-1)`",
    "weights_rolled": "`weights = weights.roll(1, -1)`",
    "inverted_weights": "`linalg_inv`",
    "sum_over_keys_and_heads": "`return torch.einsum('bhij,bhjd->bhid', weights, v).sum(1)`",
    "values_without_a_width": "(2, 4, 24, 1)",
    "weights_alone": "(2, 4, 24, 24)",
    "keys_gathered_for_each_query": "(2, 4, 24, 1, 8)",
    "keys_changed_in_place": "`k = k.add(1.0)`",
    "codebook": "(2, 4, 24, 8)",
    "break_before_the_softmax": "torch._dynamo.graph_break()",
    "break_after_the_softmax": "`print`",
    "mask_that_depends_on_data": "capture_scalar_outputs",
    "scores_in_low_precision": "(`matmul`)",
    "draws_inside_vmap": "the function that holds",
    "inside_a_loop": "`while_loop`",
    "classifier": "(2, 8)",
}
LINELESS = {"short_sequence", "tier_not_allowed", "dropped_out_twice"}  # the advice is on sizes, options or numbers


def explained(fn, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attnfx.explain(fn, **options)(*qkv(B, H, T, T, D))


def advice(name):
    """Return the report's line for an obstacle, and the refusal or the decision."""
    fn, code, options = OBSTACLES[name]
    report = explained(fn, options)
    site = next(s for s in (*report.sites, *report.others) if s.code == code)
    return str(report), site.refusal or site.decision


@pytest.mark.parametrize("name", OBSTACLES)
def test_the_advice_names_the_operator_the_line_and_the_size(name):
    text, given = advice(name)
    fn, code, _ = OBSTACLES[name]
    said = f"{given.closest} {given.hint}"
    assert TOLD[name] in said and given.hint != CODES[code].edit
    lines, first = inspect.getsourcelines(fn)
    own = [f"obstacles.py:{n}" for n in range(first, first + len(lines))]
    assert name in LINELESS or any(line in said for line in own), said
    assert not {"{", "}"} & set(said)
    printed = " ".join(text.split())
    assert code in ("no_values", "shared_keys", "not_attention") or given.hint in printed


RESPELLED = [name for name, text in TOLD.items() if OBSTACLES[name].code in EDITS and "`" in text and "(" in text]


@pytest.mark.parametrize("name", [n for n in RESPELLED if n != "batch_norm_in_training"])
def test_the_line_as_the_report_respells_it_is_rewritten(name):
    """Puts the advised line in the place of the user's, and compiles the result."""
    _, given = advice(name)
    fn, _, options = OBSTACLES[name]
    lines, first = inspect.getsourcelines(fn)
    at = int(given.facts["place"].split(":")[1]) - first
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    lines[at] = f"{indent}{given.closest.strip('`')}\n"
    start = next(n for n, line in enumerate(lines) if line.startswith("def "))
    space = dict(vars(obstacles))
    exec("".join(lines[start:]), space)
    report = explained(space[name], options)
    assert report.sites and report.rewritten == report.sites, str(report)


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_program_that_follows_the_advice_is_rewritten(name):
    fn, _, options = FOLLOWED[name]
    report = explained(fn, options)
    assert report.sites and report.rewritten == report.sites, str(report)
    if OBSTACLES[name].options == obstacles.NO_ROWS and fn is not OBSTACLES[name].fn:
        assert all(site.spec is not None for site in report.sites), "rewritten as whole rows, as the obstacle is too"


def test_a_size_that_nothing_in_the_graph_has_is_named():
    given = advise("layout", {"unread": "s7 + 1", "place": "model.py:12", "operator": "matmul", "shape": "(2, 8)"})
    assert given is not None and "`" not in given.edit
    assert all(name in text for text in (given.closest, given.edit) for name in ("s7 + 1", "model.py:12"))


def test_the_advised_einsum_returns_the_same():
    _, given = advice("sum_over_keys_and_heads")
    weights, v = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 6, 8)
    made = eval(given.closest.strip("`").removeprefix("return "), {"torch": torch, "weights": weights, "v": v})
    torch.testing.assert_close(made, torch.einsum("bhij,bhjd->bid", weights, v))


LINES = [
    ("softmax_dim", "w = F.softmax(s, dim=1)", {"operator": "softmax"}, "w = F.softmax(s, dim=-1)"),
    ("softmax_dim", "w = s.softmax(2) * 3", {"operator": "softmax"}, "w = s.softmax(-1) * 3"),
    ("softmax_dim", "w = s.softmax(-1)", {"operator": "softmax"}, ""),
    ("softmax_dim", "w = s.softmax(dim=axis)", {"operator": "softmax"}, ""),
    ("softmax_dim", "w = s.softmax(", {"operator": "softmax"}, ""),
    ("mutated", "k += 1", {}, "k = k + 1"),
    ("mutated", "k.mul_(x)", {}, "k = k.mul(x)"),
    ("mutated", "k[:, 0] = 1", {}, ""),
    ("mutated", "x = q * k; k.mul_(x)", {}, ""),
    ("mutated", "self.k.add_(1)", {}, ""),
    ("rows_mixed", "x = torch.cumsum(w, dim=-2)", {"operator": "cumsum"}, "x = torch.cumsum(w, dim=-1)"),
    ("rows_mixed", "x = torch.cat([w, w], dim=-2)", {"operator": "cat"}, ""),
    ("rows_mixed", "x = w.inverse()", {"operator": "linalg_inv"}, ""),
    ("contraction", "o = torch.einsum('bhij,bhjd->bid', w, v)", {}, "o = torch.einsum('bhij,bhjd->bhid', w, v).sum(1)"),
    ("contraction", "o = torch.einsum('bij,bjd->bid', w, v)", {}, ""),
    ("contraction", "o = torch.einsum('iij,ijd->d', w, v)", {}, ""),
]


@pytest.mark.parametrize(("code", "line", "facts", "made"), LINES)
def test_a_line_is_respelled_or_left(code, line, facts, made):
    assert respell(code, line, facts) == made


def test_every_code_that_a_site_ends_with_has_advice_or_tells_of_a_failure():
    failures = {"fault", "exercise", "mismatch", "compiler"}
    assert set(ADVICE) == set(CODES) - failures


def test_each_advice_is_filled_in_from_its_facts_alone():
    for code, several in ADVICE.items():
        for each in several:
            facts = {name: f"<{name}>" for name in each.names} | {"respelled": "<respelled>"}
            assert "{" not in each.filled(facts).edit + each.filled(facts).closest, code


def test_a_site_without_facts_gets_the_codes_own_text():
    bare = Refusal("softmax_dim", "a sentence")
    assert (bare.hint, bare.closest) == (CODES["softmax_dim"].edit, CODES["softmax_dim"].closest)
    assert advise("softmax_dim", {"place": "a.py:1"}) is None


def test_advice_survives_json():
    (site,) = (report := explained(OBSTACLES["summed_up_over_queries"].fn, obstacles.ALWAYS)).sites
    (again,) = Report.from_json(report.to_json()).sites
    assert again.refusal == site.refusal and again.refusal.closest == site.refusal.closest
    made = Decision("kept", "", code="weights_read", facts={"reader": "a.py:1"})
    assert "a.py:1" in made.hint and "a.py:1" in made.closest and isinstance(advise("slower", {"sizes": "8"}), Advice)
