"""Compile spellings of attention to the Triton kernels, run them in the interpreter, and compare with float64.

A spelling is a way to write a program."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnfx.compiler import choose as deciding
from attnfx.kernels.operators import attention as operator
from attnfx.targets import Target
from tests import support
from tests.passes import programs
from tests.passes.programs import LOW, Program, Spelling, arrange, write
from tests.support import compiled, error, new_reports, rand, run

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

B, H, G, T, S, D = 2, 2, 1, 37, 41, 16
SCALE = 0.25
INF = math.inf


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    """Let the CPU stand in for a GPU whose only tiers are the Triton kernels, without a fallback."""
    monkeypatch.setitem(operator.AUTO, "cpu", ("decode", "flash"))
    monkeypatch.setattr(deciding, "target_of", lambda options, device: Target.by_name("h100-sxm"))
    absent = operator.TIERS["chunked"]._replace(supports=lambda call: "it is not of this test")
    monkeypatch.setitem(operator.TIERS, "chunked", absent)


def check(fn, *args, tier="flash", **options):
    sites = support.check(fn, *args, **options)
    assert [site.decision.tier for site in sites if site.decision is not None] == [tier]


def heads(*shape):
    """Create query, key and value (B, H, T, D), with the sizes in `shape` first."""
    b, h, t, s, d, dv = (*shape, *(B, H, T, T, D, D)[len(shape) :])
    return rand(b, h, t, d), rand(b, h, s, d), rand(b, h, s, dv)


def places(t=T, s=None):
    return torch.arange(t)[:, None], torch.arange(t if s is None else s)[None, :]


def padded():
    return torch.arange(T).expand(B, T) < torch.tensor([[T], [T - 20]])


def scores(q, k):
    return q @ k.mT * SCALE


def causal(t=T):
    return torch.ones(t, t, dtype=torch.bool).tril()


# -- written by hand ------------------------------------------------------------------------------
def packed_projection(x, w):
    q, k, v = (x @ w).reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    return (scores(q, k).softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * D)


def permuted_key(q, k, v):
    return (q @ k.view(B, T, H, D).permute(0, 2, 3, 1) * SCALE).softmax(-1) @ v


def multi_query(q, k, v):
    return scores(q, k.unsqueeze(1)).softmax(-1) @ v.unsqueeze(1)


def cross(q, k, v):
    return F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D), dim=-1).matmul(v)


def learned_scale(q, k, v, scale):
    return (q @ k.mT * scale).softmax(-1) @ v


def cosine(q, k, v, temperature):
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return (q @ k.mT * temperature.clamp(max=4.0).exp()).softmax(-1) @ v


def bool_mask(q, k, v, keep):
    return scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


def upper_triangle(q, k, v):
    return (scores(q, k) + torch.full((T, T), -INF).triu(1)).softmax(-1) @ v


def sliding(q, k, v):
    i, j = places()
    return scores(q, k).masked_fill((j > i) | (i - j >= 7), -INF).softmax(-1) @ v


def banded_and_sinks(q, k, v):
    i, j = places()
    return torch.where((j <= i) & ((i - j < 5) | (j < 2)), scores(q, k), LOW).softmax(-1) @ v


def prefix(q, k, v):
    i, j = places()
    return scores(q, k).masked_fill((j > i) & (j >= 11), -INF).softmax(-1) @ v


def dilated(q, k, v):
    i, j = places()
    return scores(q, k).masked_fill((i - j) % 3 != 0, -INF).softmax(-1) @ v


def padding_as_bert(q, k, v, keep):
    return (scores(q, k) + (1.0 - keep[:, None, None, :].to(q.dtype)) * -10000.0).softmax(-1) @ v


def padding_on_the_left(q, k, v, keep):
    i, j = places()
    allowed = (j <= i)[None, None] & keep.flip(1)[:, None, None, :]
    return torch.where(allowed, scores(q, k), torch.finfo(torch.float32).min).softmax(-1) @ v


def padding_on_the_left_added(q, k, v, keep):
    i, j = places()
    allowed = (j <= i)[None, None] & keep.flip(1)[:, None, None, :]
    return (scores(q, k) + torch.where(allowed, 0.0, torch.finfo(torch.float32).min)).softmax(-1) @ v


def documents(q, k, v, doc):
    i, j = places()
    same = doc[:, None, :, None] == doc[:, None, None, :]
    return torch.where(same & (j <= i), scores(q, k), -1e9).softmax(-1) @ v


def row_without_a_key(q, k, v):
    keep = causal() & (torch.arange(T) > 2)
    return torch.where(keep, scores(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v


def batch_without_a_key(q, k, v, keep):
    none = keep & (torch.arange(B)[:, None] == 0)
    return scores(q, k).masked_fill(~none[:, None, None, :], torch.finfo(q.dtype).min).softmax(-1) @ v


def soft_cap(q, k, v):
    return (torch.tanh(scores(q, k) / 3) * 3).masked_fill(~causal(), -INF).softmax(-1) @ v


def alibi(q, k, v, slopes):
    i, j = places()
    return (scores(q, k) + slopes[:, None, None] * (j - i)).masked_fill(j > i, -INF).softmax(-1) @ v


def buckets(q, k, v, table):
    i, j = places()
    distance = j - i
    bucket = (distance > 0).long() * 8
    small = distance.abs()
    large = 4 + (torch.log(small.clamp(min=1).float() / 4) / math.log(8) * 4).long()
    bucket = bucket + torch.where(small < 4, small, large.clamp(max=7))
    return (q @ k.mT + table[bucket].permute(2, 0, 1).unsqueeze(0)).softmax(-1) @ v


def clipped_distance(q, k, v, table):
    i, j = places()
    return (scores(q, k) + table[:, (j - i).clamp(-6, 6) + 6]).softmax(-1) @ v


def two_biases(q, k, v, row, pair):
    return (scores(q, k) + row + pair).softmax(-1) @ v


def shifted_windows(q, k, v, bias, mask):
    s = (scores(q, k) + bias.unsqueeze(0)).view(B, 3, H, T, T) + mask.unsqueeze(1).unsqueeze(0)
    return s.view(-1, H, T, T).softmax(-1) @ v


def sink(q, k, v, logit):
    s = torch.cat([scores(q, k), logit.expand(B, H, T, 1)], -1)
    return (s - s.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def softmax_plus_one(q, k, v):
    s = scores(q, k)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    return e / (torch.exp(-m) + e.sum(-1, keepdim=True)) @ v


def sigmoid(q, k, v):
    return torch.sigmoid(scores(q, k) - math.log(T)) @ v


def masked_again(q, k, v):
    return (scores(q, k).softmax(-1) * causal()) @ v


def head_mask(q, k, v, mask):
    return (scores(q, k).softmax(-1) * mask) @ v


def library_call(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal())


def upcast(q, k, v):
    return F.softmax(scores(q, k).masked_fill(~causal(), LOW), dim=-1, dtype=torch.float32).to(q.dtype) @ v


BY_HAND = {
    packed_projection: lambda: (rand(B, T, H * D), rand(H * D, 3 * H * D) / 4),
    permuted_key: lambda: (rand(B, H, T, D), rand(B, T, H * D), rand(B, H, T, D)),
    multi_query: lambda: (rand(B, H, T, D), rand(B, T, D), rand(B, T, D)),
    cross: lambda: heads(B, H, T, S, D, 24),
    learned_scale: lambda: (*heads(), torch.tensor(0.3)),
    cosine: lambda: (*heads(), rand(H, 1, 1)),
    bool_mask: lambda: (*heads(), torch.rand(T, T) < 0.7),
    upper_triangle: heads,
    sliding: heads,
    banded_and_sinks: heads,
    prefix: heads,
    dilated: heads,
    padding_as_bert: lambda: (*heads(), padded()),
    padding_on_the_left: lambda: (*heads(), padded()),
    padding_on_the_left_added: lambda: (*heads(), padded()),
    documents: lambda: (*heads(), torch.arange(T).div(11, rounding_mode="floor").expand(B, T)),
    row_without_a_key: heads,
    batch_without_a_key: lambda: (*heads(), padded()),
    soft_cap: heads,
    alibi: lambda: (*heads(), torch.tensor([0.5, 0.125])),
    buckets: lambda: (*heads(), rand(16, H)),
    clipped_distance: lambda: (*heads(), rand(H, 13)),
    two_biases: lambda: (*heads(), rand(B, 1, 1, T), rand(1, H, T, T)),
    shifted_windows: lambda: (*heads(3 * B), rand(H, T, T), rand(3, T, T)),
    sink: lambda: (*heads(), rand(1, H, 1, 1)),
    softmax_plus_one: heads,
    sigmoid: heads,
    masked_again: heads,
    head_mask: lambda: (*heads(), rand(1, H, 1, 1)),
    library_call: heads,
    upcast: heads,
}


@pytest.mark.parametrize("fn", BY_HAND, ids=lambda fn: fn.__name__)
def test_a_spelling_runs_on_the_kernels_with_all_its_gradients(fn):
    check(fn, *BY_HAND[fn]())


def test_a_symbolic_length_runs_on_the_kernels():
    def attention(q, k, v):
        i, j = places(q.shape[2])
        return scores(q, k).masked_fill(j > i, -INF).softmax(-1) @ v

    fast = compiled(attention, dynamic=True)
    for length in (20, T):
        args = heads(1, 1, length, length)
        with new_reports():
            assert error(run(fast, args, True), run(attention, [x.double() for x in args], True)) < 1e-5


# -- written by the generator of spellings --------------------------------------------------------
WRITTEN = [
    (Program(groups=2, masks=("causal",)), Spelling(layout="bthd", repeat="five_dims", causal="triu")),
    (Program(groups=1, masks=("causal", "padding"), fill=LOW), Spelling(masking="add", upcast="dtype")),
    (Program(masks=("window",)), Spelling(layout="einsum_bthd", scale="query", masking="where")),
    (Program(masks=("document",), cap=8.0), Spelling(layout="fused", softmax="by_hand", cap="multiply")),
    (Program(bias=("alibi",), masks=("causal",)), Spelling(layout="bmm", scale="both", bias="alpha")),
    (Program(bias=("full",), sink=True), Spelling(layout="stored_transposed", scale="divide", sink="by_hand")),
    (Program(bias=("pair", "row")), Spelling(layout="baddbmm", softmax="divided_later")),
    (Program(head_mask=True, masks=("causal",)), Spelling(layout="einsum", softmax="logsumexp", causal="buffer")),
    (Program(masks=("padding",), fill=LOW), Spelling(scale="tensor", softmax="log_softmax", masking="product")),
    (Program(groups=2, sink=True, masks=("window",)), Spelling(repeat="expand", sink="column", causal="reversed")),
]


@pytest.mark.parametrize("program, spelling", WRITTEN, ids=[str(n) for n in range(len(WRITTEN))])
def test_a_generated_spelling_runs_on_the_kernels(program, spelling):
    x = arrange(programs.tensors(program), spelling)
    fn, names = write(program, spelling), list(x)
    exact = spelling.upcast == "none"  # an upcast spelling computes in float32 for any input dtype
    check(lambda *args: fn(**dict(zip(names, args))), *x.values(), exact=exact)


# -- decoding and dropout -------------------------------------------------------------------------
def test_one_query_against_a_cache_is_decoded():
    def attention(q, k, v, position):
        k, v = k.repeat_interleave(4, dim=1), v.repeat_interleave(4, dim=1)
        return scores(q, k).masked_fill(torch.arange(300) > position, -INF).softmax(-1) @ v

    args = rand(2, 4, 1, D), rand(2, 1, 300, D), rand(2, 1, 300, D), torch.tensor(211)
    check(attention, *args, train=False, tier="decode", tiers=["decode"])
    plain = heads(1, 2, 3, 130)
    check(lambda q, k, v: scores(q, k).softmax(-1) @ v, *plain, train=False, tier="decode", tiers=["decode"])


def test_dropout_is_linear_in_the_values_and_repeats_with_the_seed():
    fast = compiled(lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.2, True) @ v)
    q, k, v = (x.requires_grad_() for x in heads())
    with new_reports() as filed:
        torch.manual_seed(3)
        out = fast(q, k, v)
    grad = rand(*out.shape)
    out.backward(grad)
    assert [site.decision.tier for report in filed for site in report.sites] == ["flash"]
    assert v.grad is not None
    assert (out * grad).sum().item() == pytest.approx((v * v.grad).sum().item(), rel=1e-4)
    torch.manual_seed(3)
    assert torch.equal(fast(q, k, v), out)
    assert not torch.equal(fast(q, k, v), out)
