"""Summarize masks in tensors in one pass, skip their empty tiles, and never change a result."""

import math
from dataclasses import replace

import pytest
import torch

from attnfx.compiler import choose as deciding
from attnfx.cost import gpu
from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash import tier
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import mask_summary as summarise
from attnfx.kernels.flash.host.backward import backward
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.kernels.operators import attention as operator
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AttentionSpec, B, Capture, H, I, J
from attnfx.targets import Target
from tests.kernels.cases import CAUSAL, DOT, FINITE, INF, masked
from tests.kernels.flash.cases import TILE, rand, tensors, whole
from tests.support import new_reports

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
T, S = 40, 60


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Configure grains and calls small enough for the interpreter."""
    for name, value in (("GRAIN", 16), ("LEAST", 0), ("SHORTEST", 0)):
        monkeypatch.setattr(summary, name, value)


def rows_and_keys(*parts):
    """Create a mask (S,) or (T, S) that keeps only these parts."""
    kept = torch.zeros(T, S, dtype=torch.bool)
    for part in parts:
        kept[part] = True
    return kept


padding = torch.zeros(2, S, dtype=torch.bool)
padding[0, :33] = True
padding[1, 40:] = True
holes = torch.stack([
    rows_and_keys((slice(0, 32), slice(0, 16)), (slice(0, 16), slice(32, 60)), (slice(20, 36), slice(5, 37))),
    rows_and_keys((slice(0, 16), slice(0, 16)), (slice(16, 39), slice(33, 56)), (39, 59)),
])  # fmt: skip
documents = (torch.arange(S) // 17).repeat(2, 1)
documents[1] = (torch.arange(S) // 29) + 7
by_head = torch.stack([holes[0], ~holes[1]])
PAD, LENGTH = A.load(0, [B, J], "b"), A.lt(J, A.load(0, [B], "i"))
SAME = A.eq(A.load(0, [B, I], "i"), A.load(0, [B, J], "i"))
MASKS = {
    "padding": (PAD, padding),
    "padding, causal": (A.and_(CAUSAL, PAD), padding),
    "lengths": (LENGTH, torch.tensor([17, 50])),
    "any": (A.load(0, [B, I, J], "b"), holes),
    "any, for all": (A.load(0, [I, J], "b"), holes[0]),
    "by head": (A.load(0, [H, I, J], "b"), by_head),
    "by row": (A.load(0, [B, I], "b"), padding[:, :T]),
    "documents": (SAME, documents),
    "documents, causal": (A.and_(CAUSAL, SAME), documents),
    "documents or a prefix": (A.or_(SAME, A.lt(J, A.const(5))), documents),
}


def call_with_summary(keep, capture, fill=-INF, inputs=None, score=DOT, more=(), **fields):
    """Create a call with the summary of its mask, and return both."""
    captures = (capture, *(x for x, _ in more))
    kinds = (Capture("b" if capture.dtype == torch.bool else "i", capture.ndim), *(c for _, c in more))
    spec = AttentionSpec(score=masked(keep, fill, score), captures=kinds, **fields)
    call = Call(spec, *(inputs or tensors(T, S, heads=2, groups=1)), captures)
    found = summary.of(spec)
    sizes = [call.sizes[n] for n in "BHTS"]
    states = summarise.summarise([captures[s] for s in found.slots], sizes, found.spec)
    return replace(call, summary=states), states


def compare(call, tile=TILE):
    """Compare output and all gradients with the whole matrix in float64, and with a call without a summary."""
    leaves = [x.double().requires_grad_() for x in (call.query, call.key, call.value)]
    doubles = [x.double().requires_grad_() if c.grad else x for x, c in zip(call.captures, call.spec.captures)]
    want = whole(call.spec, *leaves, doubles)
    grad = torch.randn(want.shape)
    wanted = [*leaves, *(x for x, c in zip(doubles, call.spec.captures) if c.grad)]
    expected = [want.detach(), *torch.autograd.grad(want, wanted, grad.double())]
    out, logsumexp = launch.forward(call, tile)
    *grads, of_captures = backward(call, grad, out, logsumexp, (tile, tile))
    for got, x in zip((out, *grads, *of_captures), expected):
        torch.testing.assert_close(got.double(), x, rtol=2e-5, atol=2e-5, equal_nan=True)
    return logsumexp


@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_those_of_the_whole_matrix(name):
    call, states = call_with_summary(*MASKS[name])
    compare(call)
    assert len(states.unique()) > 1


@pytest.mark.parametrize("fill", [-INF, FINITE])
@pytest.mark.parametrize("name", ["any", "padding, causal"])
def test_rows_without_a_live_key_give_what_eager_gives(name, fill):
    call, _ = call_with_summary(*MASKS[name], fill)
    logsumexp = compare(call)
    assert (logsumexp <= fill / 2).any() and not (logsumexp <= fill / 2).all()


@pytest.mark.parametrize("tile", [Tile(32, 16, 1, 1), Tile(16, 32, 1, 1)], ids=str)
def test_tiles_larger_than_a_grain_and_grouped_heads(tile):
    inputs = tensors(T, S, heads=4, groups=2, D=24, Dv=7)
    compare(call_with_summary(*MASKS["any"], inputs=inputs)[0], tile)


def test_tiles_smaller_than_a_grain(monkeypatch):
    monkeypatch.setattr(summary, "GRAIN", 32)
    compare(call_with_summary(*MASKS["documents, causal"])[0])


def test_a_learned_table_gets_its_gradient_from_the_live_tiles():
    distance = A.add(A.minimum(A.maximum(A.sub(J, I), A.const(-5)), A.const(5)), A.const(5))
    table = (rand(11, 2), Capture("f", 2, True)), (rand(T, S), Capture("f", 2, True))
    score = A.add(DOT, A.load(1, [distance, H], "f"), A.load(2, [I, J], "f"))
    compare(call_with_summary(*MASKS["any"], score=score, more=table)[0])


def test_the_summary_has_a_dim_for_each_index_that_the_tensors_depend_on():
    shapes = {name: tuple(call_with_summary(*mask)[1].shape) for name, mask in MASKS.items()}
    assert shapes == {
        "padding": (2, 1, 1, 4), "padding, causal": (2, 1, 1, 4), "lengths": (2, 1, 1, 4), "any": (2, 1, 3, 4),
        "any, for all": (1, 1, 3, 4), "by head": (1, 2, 3, 4), "by row": (2, 1, 3, 1), "documents": (2, 1, 3, 4),
        "documents, causal": (2, 1, 3, 4), "documents or a prefix": (2, 1, 3, 4),
    }  # fmt: skip


def test_a_grain_is_live_or_dead_as_its_scores_are():
    _, states = call_with_summary(*MASKS["any"])
    for b in range(2):
        for n in range(3):
            for m in range(4):
                grain = holes[b, 16 * n : 16 * n + 16, 16 * m : 16 * m + 16]
                state = summary.LIVE * grain.any() + summary.DEAD * (~grain).any() + summary.EVERY * grain.any(1).all()
                assert states[b, 0, n, m] == state


def test_what_is_empty_is_not_visited():
    """A NaN in an empty tile does not spread. Without a summary, it does."""
    call, states = call_with_summary(*MASKS["padding"])
    empty = (states == summary.DEAD).all(2).nonzero()[0]  # a batch and a column of tiles
    at = empty[0], slice(None), 16 * empty[-1]
    key, value = call.key.clone(), call.value.clone()
    key[at] = value[at] = math.nan
    call = replace(call, key=key, value=value)
    out, logsumexp = launch.forward(call, TILE)
    live = logsumexp > -INF
    of_query = backward(call, torch.ones_like(out), out, logsumexp, (TILE, TILE))[0]
    assert live.any() and not out[live].isnan().any() and not of_query[live].isnan().any()
    blind = launch.forward(replace(call, summary=None), TILE)[0]
    assert blind[empty[0]].isnan().all()


def test_full_tiles_read_no_mask():
    """The mask changes after its summary was made; full tiles must not read it."""
    call, _ = call_with_summary(*MASKS["any"])
    before = launch.forward(call, TILE)[0]
    changed = call.captures[0].clone()
    changed[:, :32, :16] = False  # full tiles of the first batch
    after = launch.forward(replace(call, captures=(changed,)), TILE)[0]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0, equal_nan=True)


# -- in a graph ---------------------------------------------------------------------------------
def attend(q, k, v, mask):
    return (q @ k.mT * 0.25).masked_fill(~mask[:, None], -INF).softmax(-1) @ v


def two_layers(q, k, v, mask):
    return attend(attend(q, k, v, mask), k, v, mask)


def changed_between(q, k, v, mask):
    mask = mask.clone()
    x = attend(q, k, v, mask)
    mask[:, :, :20] = True
    return attend(x, k, v, mask)


@pytest.fixture
def passes(monkeypatch):
    """Record each summary of a mask, in graphs for which the flash tier is chosen."""
    seen, original = [], tier.summarise
    monkeypatch.setattr(tier, "summarise", lambda *some: seen.append(1) or original(*some))
    monkeypatch.setitem(operator.AUTO, "cpu", ("decode", "flash"))
    monkeypatch.setattr(gpu, "EMPTY", math.inf)
    monkeypatch.setattr(deciding, "target_of", lambda options, device: Target.by_name("h100-sxm"))
    return seen


def compiled(fn, tier="flash", **how):
    options = {"rewrite": "always", "tiers": [tier], "inner": "aot_eager"}
    return torch.compile(fn, backend="attnfx", options=options, **how)


def graph_inputs(length=40):
    some = [rand(1, 4, length, 16).requires_grad_() for _ in range(3)]
    document = torch.arange(length) // 17
    return [*some, (document[:, None] == document).repeat(1, 1, 1)]


def test_layers_and_both_passes_share_one_summary_and_a_changed_mask_is_seen(passes):
    fast, (*some, mask) = compiled(two_layers, dynamic=True), graph_inputs()
    with new_reports() as filed:
        for step in range(2):
            out, want = fast(*some, mask), two_layers(*some, mask)
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
            grads = zip(*(torch.autograd.grad(x.square().sum(), some) for x in (out, want)))
            for got, expected in grads:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            assert len(passes) == step + 1
            mask[:, :, 3] = True  # the same tensor, another mask
            mask[:, 20:, 30:] = False
            mask[:, :, 0] = True
    assert [s.decision.tier for r in filed for s in r.sites if s.decision is not None] == ["flash", "flash"]


def test_a_mask_that_changes_between_two_layers_is_not_shared(passes):
    some = graph_inputs()
    with torch.no_grad(), new_reports() as filed:
        torch.testing.assert_close(compiled(changed_between)(*some), changed_between(*some), rtol=1e-5, atol=1e-5)
    assert len(passes) == sum(s.decision is not None and s.decision.tier == "flash" for r in filed for s in r.sites)


def test_pytorchs_own_checks_of_an_operator_pass():
    call, states = call_with_summary(*MASKS["documents"])  # no row is NaN
    found = summary.of(call.spec)
    sizes = [call.sizes[n] for n in "BHTS"]
    torch.library.opcheck(torch.ops.attnfx.mask_summary.default, ([documents], sizes, found.spec.to_json()))
    some = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    args = (*some, list(call.captures), [], None, call.spec.to_json(), "chunked", states)
    torch.library.opcheck(torch.ops.attnfx.attention.default, args)


def test_a_summary_that_does_not_fit_is_refused():
    call, states = call_with_summary(*MASKS["any"])
    args = call.query, call.key, call.value, list(call.captures), [], None, call.spec.to_json(), "flash"
    with pytest.raises(ValueError, match=r"summary has shape \(2, 1, 3, 3\), expected \(2, 1, 3, 4\)"):
        torch.ops.attnfx.attention(*args, states[..., :3].contiguous())


@pytest.mark.parametrize(
    "name, heads, length, passes, pays",
    [
        ("padding", 1, 8192, 1, True), ("padding", 1, 1024, 1, False), ("padding", 32, 256, 1, False),
        ("any", 8, 4096, 1, True), ("any", 1, 8192, 1, False), ("by head", 8, 4096, 1, False),
    ],
)  # fmt: skip
def test_a_summary_is_made_where_it_is_cheap_beside_the_kernels(monkeypatch, name, heads, length, passes, pays):
    monkeypatch.undo()
    keep, capture = MASKS[name]
    spec = AttentionSpec(score=masked(keep), captures=(Capture("b", capture.ndim),))
    sizes = dict(B=1, H=heads, T=length, S=length)
    assert (summary.worth(spec, sizes, passes) is not None) == pays


def test_what_reads_no_tensor_or_depends_on_the_scores_has_no_summary():
    assert summary.of(AttentionSpec(score=masked(CAUSAL))) is None
    above = A.lt(A.load(0, [B, I], "f"), A.DOT)
    assert summary.of(AttentionSpec(score=masked(above), captures=(Capture("f", 2),))) is None
