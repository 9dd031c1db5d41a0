"""Run the Triton kernels on a GPU: every kind of program, dtypes, CUDA graphs, streams, devices, new lengths."""

from dataclasses import replace

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.chunked import attention as chunked
from attnfx.kernels.flash import tier
from attnfx.kernels.flash.host.blocks import Run
from attnfx.kernels.flash.triton.forward import forward_kernel
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AttentionSpec, Capture, I, J
from tests.kernels.cases import CAUSAL, DOT, FINITE, INF, PAD, WINDOW, masked, padding
from tests.kernels.flash.cases import CASES, whole
from tests.kernels.flash.host.test_mask_summary import MASKS
from tests.support import error, new_reports

# relative to the largest value, for rounding of inputs, weights and outputs; eager's whole matrices are not closer
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def inputs(dtype, T=37, S=41, D=16, Dv=16, size_b=2, heads=2, groups=1, device="cuda"):
    torch.manual_seed(0)
    shapes = (size_b, heads, T, D), (size_b, groups, S, D), (size_b, groups, S, Dv)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def results(spec, some, captures=(), sizes=(), summarised=False):
    """Compute output and gradients of inputs and captures, by the kernels and by the whole matrix in float64."""
    device, dtype = some[0].device, some[0].dtype
    captures = [x.to(device) for x in captures]
    spec = replace(spec, out_dtype=str(dtype).removeprefix("torch."))
    call = Call(spec, *some, captures, sizes, None)
    assert tier.supports(call) is None
    if summarised:
        found = summary.of(spec)
        over = [call.sizes[n] for n in "BHTS"]
        call = replace(call, summary=tier.summarise([captures[s] for s in found.slots], over, found.spec))
    leaves = [x.double().requires_grad_() for x in some]
    doubles = [x.double() if x.is_floating_point() else x for x in captures]
    doubles = [x.requires_grad_() if c.grad else x for x, c in zip(doubles, spec.captures)]
    want = whole(spec, *leaves, doubles, sizes)
    grad = torch.randn(want.shape, device=device).to(dtype)
    wanted = [*leaves, *(x for x, c in zip(doubles, spec.captures) if c.grad)]
    expected = [want.detach(), *torch.autograd.grad(want, wanted, grad.double())]
    out, logsumexp = tier.forward(call)
    *grads, of_captures = tier.backward(call, grad, out, logsumexp)
    return [x.double() for x in (out, *grads, *of_captures)], expected


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_whole_matrix(name, dtype):
    fields, captures = CASES[name]
    sizes = (3,) if name == "named size" else ()
    assert error(*results(AttentionSpec(**fields), inputs(dtype), captures, sizes)) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("keep", [None, CAUSAL, WINDOW], ids=["full", "causal", "window"])
def test_every_tile_of_the_table(keep, head_dim, dtype):
    spec = AttentionSpec(score=DOT if keep is None else masked(keep))
    some = inputs(dtype, 515, 1027, head_dim, head_dim, 1, 4, 2)
    some[0] = some[0] * head_dim**-0.5
    assert error(*results(spec, some)) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_rows_without_a_live_key_give_what_eager_gives(fill, dtype):
    spec = AttentionSpec(score=masked(PAD, fill), captures=CASES["documents"][0]["captures"])
    spec = replace(spec, captures=(replace(spec.captures[0], kind="b", ndim=2),))
    empty = padding.clone()
    empty[1] = False
    got, want = results(spec, inputs(dtype), (empty,))
    assert error(got, want) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("fill", [-INF, FINITE])
@pytest.mark.parametrize("name", MASKS)
def test_summarized_masks_give_what_the_whole_matrix_gives(name, fill, dtype):
    keep, small = MASKS[name]
    mask = small * 12 if small.ndim == 1 else small  # lengths, or one value for each index
    for dim, size in enumerate(small.shape):
        mask = mask.repeat_interleave(12 if size in (40, 60) else 1, dim)
    kind = "b" if mask.dtype == torch.bool else "i"
    spec = AttentionSpec(score=masked(keep, fill), captures=(Capture(kind, mask.ndim),))
    some = inputs(dtype, 12 * 40, 12 * 60, 64, 64, 2, 2)
    assert error(*results(spec, some, (mask,), summarised=True)) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("queries", [1, 4])
def test_decoding(queries, dtype):
    call = Call(AttentionSpec(score=DOT, out_dtype=str(dtype)[6:]), *inputs(dtype, queries, 5000, 64, 64, 1, 8), (), ())
    assert tier.supports_decode(call) is None
    want = whole(call.spec, *(x.double() for x in (call.query, call.key, call.value)))
    assert error([tier.forward_decode(call)[0].double()], [want]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("queries", [4, 200])
def test_every_path_draws_the_same_dropout(queries):
    spec = AttentionSpec(score=masked(A.ge(A.add(I, A.const(100)), J)), dropout=0.3, out_dtype="float16")
    some = inputs(torch.float16, queries, 300, 64, 64)
    call = Call(spec, *some, (), (), torch.tensor([2**40 + 7], device="cuda"))
    out, logsumexp = tier.forward(call)
    grad = torch.randn_like(out)
    got = [out, *tier.backward(call, grad, out, logsumexp)[:3]]
    want_out, want_logsumexp = chunked.forward(call, Run)
    want = [want_out, *chunked.backward(call, grad, want_out, want_logsumexp, make=Run)[:3]]
    if tier.supports_decode(call) is None:
        got, want = [*got, tier.forward_decode(call)[0]], [*want, want_out]
    assert error([x.double() for x in got], [x.double() for x in want]) <= 4e-3


def attention(q, k, v):
    i = torch.arange(q.shape[2], device=q.device)
    return (q @ k.mT * 0.125).masked_fill(i[None, :] > i[:, None], -INF).softmax(-1) @ v


def step(fn, some):
    leaves = [x.detach().clone().requires_grad_() for x in some]
    out = fn(*leaves)
    out.backward(torch.ones_like(out))
    return [x.detach().double().clone() for x in (out, *(x.grad for x in leaves))]


def fast(**how):
    how = {"options": {"rewrite": "always", "tiers": ["flash"]}, **how}
    return torch.compile(attention, backend="attnfx", **how)


def test_a_captured_graph_gives_the_same_for_other_numbers(monkeypatch):
    for name, value in (("ATTNFX_REWRITE", "always"), ("ATTNFX_TIERS", "flash")):
        monkeypatch.setenv(name, value)
    run = torch.compile(attention, backend="attnfx", mode="reduce-overhead")
    with new_reports() as filed:
        for seed in range(5):
            some = [x + seed for x in inputs(torch.float16, 256, 256, 64, 64, groups=2)]
            torch.compiler.cudagraph_mark_step_begin()
            assert error(step(run, some), step(attention, [x.double() for x in some])) <= 4e-3
    assert [s.decision.tier for r in filed for s in r.sites if s.decision is not None] == ["flash"]


def test_another_stream():
    some, run = inputs(torch.float16, 256, 256, 64, 64, groups=2), fast()
    want = step(run, some)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(run, some)
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_another_device_than_the_current_one():
    some = inputs(torch.float16, 256, 256, 64, 64, groups=2, device="cuda:1")
    assert error(step(fast(), some), step(attention, [x.double() for x in some])) <= 4e-3


def test_a_new_length_compiles_no_kernel():
    run, counts = fast(dynamic=True), []
    for length in (500, 501, 640, 1023):
        step(run, inputs(torch.float16, length, length, 64, 64, groups=2))
        counts.append(len(forward_kernel.device_caches[torch.cuda.current_device()][0]))
    assert len(set(counts)) == 1
