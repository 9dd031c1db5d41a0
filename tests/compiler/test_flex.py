"""Rewrite attention as PyTorch's flex_attention. Without Inductor it runs densely, and block masks are not used."""

import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import attnfx
from attnfx import Options
from attnfx.compiler import pipeline, tiers
from attnfx.kernels.flex import tier
from attnfx.passes.rewrite.flex import SHARED
from tests.support import assert_kept, assert_right, check, qkv, rand

LENGTH = 150
LOWEST = torch.finfo(torch.float32).min
OPERATOR = torch.ops.higher_order.flex_attention


def scores(q, k):
    return q @ k.mT / math.sqrt(q.shape[-1])


def below(q, k):
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def capped(q, k, v):
    return (20 * torch.tanh(scores(q, k) / 20)).masked_fill(~below(q, k), -math.inf).softmax(-1) @ v


def documents(q, k, v, doc):
    same = (doc[:, None, :, None] == doc[:, None, None, :]) & below(q, k)
    return scores(q, k).masked_fill(~same, -math.inf).softmax(-1) @ v


def padded(q, k, v, seen):
    """Hide keys of the past by a finite fill, so that a row without a live key averages the values."""
    return scores(q, k).masked_fill(~(seen[:, None, None, :] & below(q, k)), LOWEST).softmax(-1) @ v


def hidden(q, k, v, seen):
    return scores(q, k).masked_fill(~(seen[:, None, None, :] & below(q, k)), -math.inf).softmax(-1) @ v


def dense(q, k, v, keep):
    return scores(q, k).masked_fill(~keep, -math.inf).softmax(-1) @ v


def added(q, k, v, mask):
    return (scores(q, k) + mask).softmax(-1) @ v


def sdpa(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def bucketed(q, k, v, table):
    far = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs().clamp(min=1)
    return (q @ k.mT + table[((far.float() / 8).log() * 3).clamp(0, 31).long()].permute(2, 0, 1)).softmax(-1) @ v


def alibi(q, k, v, slope):
    far = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return (scores(q, k) + slope.view(-1, 1, 1) * far).masked_fill(~below(q, k), -math.inf).softmax(-1) @ v


def slopes_by_head(q, k, v):
    slope = torch.exp2(-8.0 * torch.arange(1, q.shape[1] + 1) / q.shape[1])[:, None, None]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return (scores(q, k) + slope * (j - i)).masked_fill(j > i, -math.inf).softmax(-1) @ v


def distances(q, k, v, table):
    far = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    return (scores(q, k) + table[far.clamp(-16, 16) + 16].permute(2, 0, 1)).softmax(-1) @ v


def two_layers(q, k, v, doc):
    return documents(documents(q, k, v, doc), k, v, doc)


def sliced(q, k, v, bias):
    return (scores(q, k) + bias[4 : 4 + k.shape[2]] + bias[-k.shape[2] :]).softmax(-1) @ v


def projected(x, weight):
    q, k, v = (y.view(*x.shape[:2], 4, 16).transpose(1, 2) for y in (x @ weight).chunk(3, -1))
    return scores(q, k).softmax(-1) @ v


def by_head(q, k, v, factor):
    return (scores(q, k).softmax(-1) * factor.view(-1, 1, 1)) @ v


def sink(q, k, v, logit):
    score = scores(q, k).masked_fill(~below(q, k), -math.inf)
    both = torch.cat([score, logit.view(1, -1, 1, 1).expand(*score.shape[:3], 1)], -1)
    return both.softmax(-1)[..., :-1] @ v


def mean_weight(q, k, v):
    weight = scores(q, k).softmax(-1)
    return weight @ v, weight.mean(1)


def log_sum(q, k, v):
    score = scores(q, k)
    return score.softmax(-1) @ v, score.logsumexp(-1)


def heads(t=LENGTH, **how):
    return qkv(t=t, d=16, **how)


def doc(t=LENGTH, each=70):
    return (torch.arange(t) // each).expand(2, t).contiguous()


def seen(t=LENGTH):
    """Hide the first keys of the second batch, so that its first rows lack a live key."""
    out = torch.ones(2, t, dtype=torch.bool)
    out[1, : t // 3] = False
    return out


def holes(t=LENGTH):
    out = (torch.arange(t)[:, None] * 7 + torch.arange(t)) % 5 < 2
    out[5] = out[t - 20 :] = False
    return out


def additive(t=LENGTH, fill=-math.inf):
    return torch.zeros(1, 1, t, t).masked_fill(~holes(t), fill)


PROGRAMS = {
    "capped": (capped, lambda: heads()),
    "documents": (documents, lambda: (*heads(), doc())),
    "padded, average": (padded, lambda: (*heads(), seen())),
    "padded, NaN": (hidden, lambda: (*heads(), seen())),
    "dense": (dense, lambda: (*heads(), holes())),
    "added": (added, lambda: (*heads(), additive())),
    "added, average": (added, lambda: (*heads(), additive(fill=LOWEST))),
    "PyTorch's own, zero rows": (sdpa, lambda: (*heads(), holes())),
    "grouped": (grouped, lambda: heads(g=2)),
    "grouped, bfloat16": (grouped, lambda: tuple(x.bfloat16() for x in heads(g=2))),
    "cross, other widths": (added, lambda: (rand(2, 4, 130, 16), rand(2, 4, 70, 16), rand(2, 4, 70, 24), rand(70))),
    "buckets through floats": (bucketed, lambda: (*heads(), rand(32, 4))),
    "slopes": (alibi, lambda: (*heads(), torch.logspace(0, -2, 4))),
    "slopes by head": (slopes_by_head, lambda: heads()),
    "table": (distances, lambda: (*heads(), rand(33, 4))),
    "slices of one tensor": (sliced, lambda: (*heads(), rand(2 * LENGTH + 20))),
    "projected": (projected, lambda: (rand(2, LENGTH, 64), rand(64, 192) / 8)),
    "one factor a head": (by_head, lambda: (*heads(), rand(4))),
    "scores beyond float32": (capped, lambda: tuple(x * 1e20 for x in heads())),
    "one query, scores far below zero": (
        lambda q, k, v, far: (scores(q, k) - 200).masked_fill(far, -math.inf).softmax(-1) @ v,
        lambda: (rand(2, 4, 1, 16), rand(2, 4, 1100, 16), rand(2, 4, 1100, 16), torch.arange(1100) > 600),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_said_exactly(name):
    fn, args = PROGRAMS[name]
    (site,) = check(fn, *args(), train=False, tiers=["flex"])
    assert (site.decision.tier, site.decision.kernel) == ("flex", "dense")


@pytest.mark.parametrize(
    "name", ["capped", "documents", "padded, average", "dense", "slopes by head", "table", "slices of one tensor"]
)
def test_symbolic_sizes_make_the_block_mask_in_the_graph(name):
    fn, args = PROGRAMS[name]
    sites = assert_right(fn, *args(), train=False, dynamic=True, tiers=["flex"])
    assert sites and all(site.decision.tier == "flex" for site in sites)


# several tiles a side, which only the generated code divides
COMPILED = {
    "views of one tensor": (lambda x: capped(x[:, :, 5:], x[:, :, 2:147], x[:, :, 1:146]), lambda: (heads()[0],)),
    "transposed, few keys": (
        lambda x, gate, experts: (x @ gate).softmax(-1) @ experts,
        lambda: (rand(192, 64), rand(64, 8), rand(8, 64)),
    ),
    "documents": (documents, lambda: (*heads(300), doc(300))),
    "padded, average": (padded, lambda: (*heads(300), seen(300))),
    "padded, NaN": (hidden, lambda: (*heads(300), seen(300))),
    "dense": (dense, lambda: (*heads(300), holes(300))),
    "slices of one tensor": (sliced, lambda: (*heads(), rand(2 * LENGTH + 20))),
    "projected": PROGRAMS["projected"],
    "buckets through floats": PROGRAMS["buckets through floats"],
    "slopes by head": PROGRAMS["slopes by head"],
    "one query, scores far below zero": PROGRAMS["one query, scores far below zero"],
    "all products beyond float32": (slopes_by_head, lambda: (*(x * f for x, f in zip(ones(), (1e20, -1e20, 1.0))),)),
    "some products beyond float32": (
        lambda q, k, v: scores(q, k).masked_fill(~below(q, k), -math.inf).softmax(-1) @ v,
        lambda: (torch.linspace(0, 1, 150)[:, None] ** 9 * 1e20 * ones()[0], -1e20 * ones()[1], ones()[2]),
    ),
    "values of zeros": (slopes_by_head, lambda: (*heads()[:2], torch.zeros_like(heads()[2]))),
}


def ones():
    return tuple(torch.ones(2, 4, LENGTH, 16) for _ in range(3))


@pytest.mark.parametrize("name", COMPILED)
def test_the_generated_code_is_right(name):
    fn, args = COMPILED[name]
    (site,) = check(fn, *args(), train=False, tiers=["flex"], inner="inductor")
    assert (site.decision.tier, site.decision.kernel) == ("flex", "cpp")


def rewritten(fn, *args, train=False, **options):
    """Return the graph after rewriting and its report."""
    made = []

    def backend(gm, inputs):
        made.append(pipeline.run(gm, Options.make({"rewrite": "always", "tiers": ["flex"], **options}), inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(train):
        torch.compile(fn, backend=backend)(*args)
    (result,) = made
    return result


def test_sites_with_one_mask_share_its_tiles():
    nodes = list(rewritten(two_layers, *heads(300), doc(300)).gm.graph.nodes)
    calls = [n for n in nodes if n.target is OPERATOR]
    assert len(calls) == 2 and calls[0].args[4][:-1] == calls[1].args[4][:-1]
    assert sum("sort" in str(n.target) for n in nodes if n.meta.get(SHARED)) == 2  # of partial and of full tiles


def test_functions_of_the_head_are_computed_once():
    gm = rewritten(slopes_by_head, *heads(300)).gm
    (call,) = (n for n in gm.graph.nodes if n.target is OPERATOR)
    assert [getattr(gm, n.target).tolist() for n in call.args[7]] == [[2.0 ** (-8 * h / 4) for h in range(1, 5)]]
    assert not any("exp2" in str(n.target) for n in getattr(gm, call.args[3].target).graph.nodes)


def test_a_known_mask_is_a_constant_of_the_graph():
    gm = rewritten(capped, *heads(300)).gm
    (call,) = (n for n in gm.graph.nodes if n.target is OPERATOR)
    number, order, full, _ = (getattr(gm, n.target) for n in call.args[4][2:6])
    assert number.tolist() == [[[1, 1, 1]]] and order[0, 0, :, 0].tolist() == [0, 1, 2]
    assert full.tolist() == [[[0, 1, 2]]] and not any("sort" in str(n.target) for n in gm.graph.nodes)


def test_rows_that_see_their_own_position_are_masked_by_a_finite_fill_as_by_infinity():
    def fn(q, k, v, doc):
        same = (doc[:, None, :, None] == doc[:, None, None, :]) & below(q, k)
        return scores(q, k).masked_fill(~same, LOWEST).softmax(-1) @ v

    gm = rewritten(fn, *heads(), doc()).gm
    (call,) = (n for n in gm.graph.nodes if n.target is OPERATOR)
    mask, operands = getattr(gm, call.args[4][-1].target), call.args[-1]
    assert len(operands) == 1 and any(n.target is torch.ops.aten.eq.Scalar for n in mask.graph.nodes)


@pytest.mark.parametrize(("each", "tier_"), [(100, "flex"), (2048, "library")])
def test_a_mask_in_a_tensor_is_priced_by_its_values_at_the_first_call(each, tier_):
    at = torch.arange(2048)
    keep = at[:, None] // each == at // each
    result = rewritten(dense, *qkv(1, 4, 2048, d=64), keep, rewrite="cost", tiers=["library", "flex", "chunked"])
    (site,) = result.report.sites
    assert site.decision.tier == tier_
    assert any("leaves 18% of the tiles" in note for note in site.notes) == (each == 100), site.notes


def test_values_that_are_not_known_when_a_graph_is_compiled_count_as_all_tiles():
    def fn(q, k, v, keep):
        return dense(q, k, v, keep & (torch.rand(300, 300) < 2))

    result = rewritten(fn, *heads(300), holes(300), rewrite="cost", tiers=["flex"])
    assert not any("of the tiles" in note for site in result.report.sites for note in site.notes)


def test_no_tensor_of_all_scores_is_in_the_graph():
    gm = rewritten(documents, *heads(300), doc(300)).gm
    held = (n.meta.get("val") for n in gm.graph.nodes)
    assert not any(isinstance(x, torch.Tensor) and list(x.shape[-2:]) == [300, 300] for x in held)


def test_verification_compares_the_call_with_the_original():
    (site,) = check(documents, *heads(), doc(), train=False, tiers=["flex"], verify="first")
    assert site.decision.tier == "flex" and any("agree" in n or "verified" in n for n in site.notes), site.notes


def test_a_graph_for_an_absent_gpu_has_the_operator():
    with FakeTensorMode():
        q, k = (torch.empty(4, 8, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        result = rewritten(lambda q, k, v: torch.tanh(q @ k.mT * 0.01).softmax(-1) @ v, q, k, k, target="h100-sxm")
    (site,) = result.report.sites
    assert (site.decision.tier, site.decision.kernel) == ("flex", "triton")
    (call,) = (n for n in result.gm.graph.nodes if n.target is OPERATOR)
    assert call.args[6]["OUTPUT_LOGSUMEXP"] and [x.device.type for x in call.meta["val"]] == ["cuda"] * 3


def hopper(**changes):
    return replace(attnfx.Target.by_name("h100-sxm"), **{"flash_attention": "FA4", **changes})


def kernels(fn, *given, target=None):
    """Return the kernels of flex_attention that are candidates for a target."""
    torch._dynamo.reset()
    (site,) = attnfx.explain(fn, target=target or hopper())(*given).sites
    return {c.kernel for c in (site.decision, *site.decision.alternatives) if c.tier == "flex"}


def bfloat16(*given):
    return [x.to(torch.bfloat16) if x.is_floating_point() else x for x in given]


def unmasked(q, k, v):
    return torch.tanh(scores(q, k)).softmax(-1) @ v


def test_flash_attention_4_is_a_candidate_for_calls_that_it_takes():
    both, wide = {"triton", "flash-attention-4"}, bfloat16(*qkv(1, 4, 300, d=64))
    assert kernels(capped, *wide) == both and kernels(documents, *wide, doc(300, 1)) == both
    b200 = replace(attnfx.Target.by_name("b200"), flash_attention="FA4")
    assert kernels(unmasked, *wide, target=b200) == both
    for target in (hopper(flash_attention="FA2"), hopper(flash_attention="FA3"), b200, hopper(capability=89)):
        assert kernels(capped, *wide, target=target) == {"triton"}
    assert kernels(capped, *qkv(1, 4, 300, d=64)) == {"triton"}  # float32
    assert kernels(capped, *bfloat16(*qkv(1, 4, 300, d=80))) == {"triton"}
    assert kernels(capped, *bfloat16(*qkv(1, 4, 100, d=64))) == {"triton"}  # all keys in one tile
    assert kernels(hidden, *wide, torch.ones(1, 300, dtype=torch.bool)) == {"triton"}  # a row may be empty
    assert kernels(capped, *(x.requires_grad_() for x in wide)) == {"triton"}


def test_a_call_on_flash_attention_4_asks_for_it(monkeypatch):
    asked = tiers.flex_on_flash
    monkeypatch.setattr(tiers, "flex_on_flash", lambda match, sizes, device: asked(match, sizes, device, hopper()))
    with FakeTensorMode():
        q = torch.empty(4, 8, 2048, 128, device="cuda", dtype=torch.bfloat16)
        result = rewritten(lambda q: unmasked(q, q, q), q, target=hopper())
    (site,) = result.report.sites
    assert (site.decision.tier, site.decision.kernel) == ("flex", "flash-attention-4")
    (call,) = (n for n in result.gm.graph.nodes if n.target is OPERATOR)
    assert call.args[6]["BACKEND"] == "FLASH"
    (unit,) = (n.args[1] for n in result.gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor and n.args[1] == 1.0)
    assert unit == 1.0  # its log-sum-exp is natural


def test_flash_attention_4_is_looked_for_and_never_imported(monkeypatch):
    tier.flash_installed.cache_clear()
    assert not tier.flash_installed() and "flash_attn" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    tier.flash_installed.cache_clear()
    assert tier.flash_installed()
    tier.flash_installed.cache_clear()


# -- as on a GPU: the operator returns the log-sum-exp and has a backward pass ---------------------------
@pytest.fixture
def gpu(monkeypatch):
    """Make calls as for a GPU. Here they run as dense operators on the CPU, with a backward pass."""
    original = tier.call_of

    def call_of(*given):
        found = original(*given)
        return None if found is None else replace(found, gpu=True)

    monkeypatch.setattr(tier, "call_of", call_of)
    monkeypatch.setattr(tier, "_on_cpu", lambda *_: None)


@pytest.mark.parametrize(
    "name", ["capped", "documents", "padded, NaN", "dense", "grouped", "slopes", "table", "slices of one tensor",
             "one factor a head", "PyTorch's own, zero rows"]
)  # fmt: skip
def test_a_gpu_trains_with_gradients_of_the_captures(gpu, name):
    fn, args = PROGRAMS[name]
    (site,) = check(fn, *args(), tiers=["flex"])
    assert site.decision.tier == "flex"


@pytest.mark.parametrize("fn", [sink, mean_weight, log_sum])
def test_a_gpu_has_sinks_and_reductions_through_the_log_sum_exp(gpu, fn):
    (site,) = check(fn, *heads(), *([rand(4)] if fn is sink else []), tiers=["flex"])
    assert site.decision.tier == "flex"


@pytest.mark.parametrize("fn", [padded, added])
def test_a_lost_row_averages_on_a_gpu_too(gpu, fn):
    (site,) = check(fn, *heads(), seen() if fn is padded else additive(fill=LOWEST), train=False, tiers=["flex"])
    assert site.decision.tier == "flex"


def test_the_log_sum_exp_is_converted_from_the_base_of_this_pytorch():
    assert tier._unit() in (1.0, math.log(2))


# -- refusals ----------------------------------------------------------------------------------------------
def dropped(q, k, v):
    return F.dropout(scores(q, k).softmax(-1), 0.5) @ v


def sigmoid(q, k, v):
    return torch.sigmoid(scores(q, k)) @ v


def squared(q, k, v):
    return (scores(q, k).softmax(-1) ** 2) @ v


def through_half(q, k, v):
    return scores(q, k).half().to(q.dtype).softmax(-1) @ v


def nothing(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return torch.where((i > j) & (j > i), scores(q, k), LOWEST).softmax(-1) @ v


REFUSED = {
    "a learned capture": (alibi, lambda: (*heads(), rand(4)), True, "a tensor that the program loads from needs a"),
    "training": (capped, heads, True, "has no backward pass on a CPU"),
    "sigmoid": (sigmoid, heads, False, "the weights are not a softmax"),
    "changed weights": (squared, heads, False, "changed after the softmax by more than a factor"),
    "half": (through_half, heads, False, "rounded to float16"),
    "sink": (sink, lambda: (*heads(), rand(4)), False, "does not return the log-sum-exp on a CPU"),
    "sums": (mean_weight, heads, False, "parts of the weights are read"),
    "float64": (capped, lambda: tuple(x.double() for x in heads()), False, "computes in float32"),
    "an empty mask": (nothing, heads, False, "the mask keeps no score"),
    "no keys": (lambda q, k, v: scores(q, k).softmax(-1) @ v, lambda: heads(s=0), False, "number of keys is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_that_it_cannot_say_is_refused_with_a_sentence(name):
    fn, args, train, sentence = REFUSED[name]
    given = args()
    (site,) = assert_kept(fn, *given, train=train, code="no_tier", tiers=["flex"])
    assert sentence in site.decision.reason and site.decision.reason.count(". ") == 0, site.decision.reason
    (site,) = check(fn, *given, train=train, tiers=["flex", "library", "chunked"])
    assert site.decision.tier in ("library", "chunked")


def test_dropout_is_refused():
    with torch.no_grad():
        (site,) = attnfx.explain(dropped, rewrite="always", tiers=["flex"])(*heads()).sites
    assert "the attention has dropout" in site.decision.reason


def test_symbolic_sizes_without_a_table_are_refused():
    (site,) = assert_kept(bucketed, *heads(), rand(32, 4), train=False, dynamic=True, code="no_tier", tiers=["flex"])
    assert "a table of it" in site.decision.reason


def test_generated_code_with_symbolic_sizes_is_refused():
    (site,) = check(capped, *heads(300), train=False, dynamic=True, inner="inductor")
    refused = {c.tier: c.reason for c in site.decision.alternatives if c.tier == "flex"}
    assert site.decision.tier != "flex" and not refused


def test_a_mask_is_read_at_a_constant_and_a_computed_index():
    def fn(q, k, v, mask):
        return (q @ k.mT).masked_fill(mask.flip(-1), -math.inf).softmax(-1) @ v

    mask = torch.zeros(1, 1, heads()[0].shape[2], heads()[0].shape[2]).bool()
    mask[..., 3:7] = True
    (site,) = check(fn, *heads(), mask, train=False, tiers=["flex"])
    assert site.decision.tier == "flex"


def test_an_average_of_a_lost_row_is_not_trained(gpu):
    (site,) = assert_kept(padded, *heads(), seen(), code="no_tier", tiers=["flex"])
    assert "cannot tell its weights apart" in site.decision.reason


def test_another_form_of_the_operator_is_refused(monkeypatch):
    monkeypatch.setattr(tier, "ARGUMENTS", ("query", "key"))
    tier.missing.cache_clear()
    try:
        (site,) = assert_kept(capped, *heads(), train=False, code="no_tier", tiers=["flex"])
    finally:
        tier.missing.cache_clear()
    assert "takes other arguments" in site.decision.reason


def test_without_inductor_the_dense_form_is_not_preferred():
    (site,) = check(capped, *heads(600), train=False)
    assert site.decision.tier == "chunked"
    assert {c.tier: c.kernel for c in site.decision.alternatives}["flex"] == "dense"
