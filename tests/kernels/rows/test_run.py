"""Check the operator of whole rows: chunks, gradients, dropout, and missing gradients."""

from itertools import accumulate

import pytest
import torch

from attnfx.kernels.operators import rows as operator_rows  # noqa: F401  (the operator is registered by its import)
from attnfx.kernels.rows import heap
from attnfx.kernels.rows import run as rows
from attnfx.spec.rows import Call, Ref, Result, RowProgram, from_json
from tests.support import rand

T, S, H = 21, 13, 3


def v(n):
    return Ref("value", n)


def program(dropout=0.0):
    """Build softmax weights that depend on row sums, with mixed heads; inputs are q (rows in dim 1), k, v, mixing."""
    calls = [
        Call("einsum.default", ("hid,hjd->hij", (v(0), v(1)))),
        Call("topk.default", (v(4), 4)),
        Call("getitem", (v(5), 0)),
        Call("sum.dim_IntList", (v(6), (-1,), True)),
        Call("sub.Tensor", (v(4), v(7))),
        Call("softmax.int", (v(8), -1)),
        Call("einsum.default", ("hij,hg->gij", (v(9), v(3)))),
        Call("dropout", (v(10), dropout)) if dropout else Call("alias.default", (v(10),)),
        Call("einsum.default", ("hij,hjd->hid", (v(11), v(2)))),
    ]
    result = Result(12, 1, (H, Ref("rows", 0), Ref("size", 1)), "float64")
    weights = Result(10, 1, (H, Ref("rows", 0), S), "float64")
    return RowProgram((1, None, None, None), (True,) * 4, Ref("size", 0), tuple(calls), (result, weights))


def by_hand(q, k, value, mix):
    s = torch.einsum("hid,hjd->hij", q, k)
    s = s - s.topk(4).values.sum(-1, keepdim=True)
    w = torch.einsum("hij,hg->gij", s.softmax(-1), mix)
    return w @ value, w


def operands():
    found = rand(H, T, 8, seed=0), rand(H, S, 8, seed=1), rand(H, S, 6, seed=2), rand(H, H, seed=3)
    return [x.double().requires_grad_() for x in found]


def call(inputs, dropout=0.0, seed=None):
    return torch.ops.attnfx.attention_rows(inputs, [H * S, 6], seed, program(dropout).to_json())


@pytest.fixture(params=[1, 7, 100], ids=lambda n: f"{n} rows")
def chunk(request, monkeypatch):
    monkeypatch.setattr(rows, "ROWS", request.param)
    monkeypatch.setattr(rows, "TILE_ELEMENTS", {"cpu": 1})


def test_a_program_survives_its_text():
    assert from_json(program(0.5).to_json()) == program(0.5)
    assert "v5 = topk.default(v4, 4)" in str(program())


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"inputs": 3}'])
def test_another_text_is_a_value_error(text):
    with pytest.raises(ValueError):
        from_json(text)


def test_chunks_give_what_the_whole_gives(chunk):
    for got, want in zip(call(operands()), by_hand(*operands())):
        torch.testing.assert_close(got, want)


def test_gradients_of_rows_and_of_what_all_rows_read(chunk):
    mine, own = operands(), operands()
    out, weights = call(mine)
    ((out * 2).sum() + weights.square().sum()).backward()
    out, weights = by_hand(*own)
    ((out * 2).sum() + weights.square().sum()).backward()
    for got, want in zip(mine, own):
        torch.testing.assert_close(got.grad, want.grad)


def test_a_result_without_a_gradient_costs_none(chunk):
    mine, own = operands(), operands()
    call(mine)[0].square().sum().backward()
    by_hand(*own)[0].square().sum().backward()
    for got, want in zip(mine, own):
        torch.testing.assert_close(got.grad, want.grad)


def test_forward_and_backward_draw_the_same_dropout(chunk):
    """The output is linear in the values, so <out, g> is <v, dv> only for the same dropout."""
    inputs, seed = operands(), torch.tensor([5])
    out, _ = call(inputs, 0.4, seed)
    g = rand(*out.shape, seed=9).double()
    out.backward(g)
    torch.testing.assert_close((out * g).sum(), (inputs[2] * inputs[2].grad).sum())
    assert torch.equal(call(operands(), 0.4, seed)[0], out)
    assert not torch.equal(call(operands(), 0.4, torch.tensor([6]))[0], out)


@pytest.mark.parametrize("length", [0, 1])
def test_no_row_and_one_row(length):
    inputs = operands()
    inputs[0] = inputs[0].detach()[:, :length].requires_grad_()
    out, weights = call(inputs)
    assert out.shape == (H, length, 6) and weights.shape == (H, length, S)
    out.sum().backward()
    assert inputs[1].grad.shape == (H, S, 8)


def live_peak(run):
    """Return the peak of the live tensors' bytes during `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.slow
def test_a_pass_has_one_chunk_alive_and_saves_its_inputs(monkeypatch):
    """Memory beyond inputs and gradients shrinks with a chunk's rows, and no tensor of the scores' size is saved."""
    length = 256
    shapes = (H, length, 8), (H, length, 8), (H, length, 6), (H, H)
    inputs = [rand(*shape, seed=n).double().requires_grad_() for n, shape in enumerate(shapes)]
    calls = program().calls
    one = RowProgram((1, None, None, None), (True,) * 4, Ref("size", 0), calls, program().results[:1]).to_json()
    grad = rand(H, length, 6).double()
    saved = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x)

    def step():
        (out,) = torch.ops.attnfx.attention_rows(inputs, [H * length, 6], None, one)
        torch.autograd.grad(out, inputs, grad)

    monkeypatch.setattr(rows, "TILE_ELEMENTS", {"cpu": 1})
    peaks = {}
    for n in (128, 64, 32):
        monkeypatch.setattr(rows, "ROWS", n)
        step()
        peaks[n] = max(live_peak(step) for _ in range(3))  # events with equal timestamps are unordered
    assert 1.8 < (peaks[128] - peaks[64]) / (peaks[64] - peaks[32]) < 2.2
    with keep:
        torch.ops.attnfx.attention_rows(inputs, [H * length, 6], None, one)
    assert sum(saved) == sum(x.nbytes for x in inputs)


def test_freed_memory_goes_back_between_chunks(monkeypatch):
    """The heap is trimmed only if the process has grown."""
    given, resident = [], iter([0, 50, 150, 20, 100, 121, 30])
    monkeypatch.setattr(heap, "_malloc_trim", lambda: given.append)
    monkeypatch.setattr(heap, "_resident", lambda: next(resident))
    held = heap.Heap(growth=100)
    counts = []
    for _ in range(4):
        held.trim()
        counts.append(len(given))
    assert counts == [0, 1, 1, 2]


def test_it_is_an_operator_as_pytorch_wants_it():
    inputs = operands()
    torch.library.opcheck(torch.ops.attnfx.attention_rows.default, (inputs, [H * S, 6], None, program().to_json()))


def test_it_has_no_second_derivative():
    inputs = operands()
    (grad,) = torch.autograd.grad(call(inputs)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


def test_autocast_adds_no_casts():
    inputs = [x.detach().float() for x in operands()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(inputs)[0]
    torch.testing.assert_close(got, by_hand(*inputs)[0].double(), check_dtype=False, rtol=1e-5, atol=1e-5)


def test_operands_that_do_not_fit_are_named():
    inputs = operands()
    with pytest.raises(ValueError, match="inputs has 3 tensors, expected 4"):
        call(inputs[:3])
    with pytest.raises(ValueError, match="seed is None"):
        call(inputs, 0.5)
    with pytest.raises(ValueError, match="its rows should be dim 1"):
        call([inputs[0][0, 0], *inputs[1:]])
