"""Compile the body of a chunk once, with the results of the calls, in any context of compilation."""

import logging
from dataclasses import replace

import pytest
import torch

from attnfx.kernels.rows import compiled_body as bodies
from attnfx.kernels.rows import run as rows
from attnfx.spec.rows import Call, Ref, Result, RowProgram
from tests.kernels.rows.test_run import H, S, operands, program
from tests.support import rand

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def chunks_of_seven_rows(monkeypatch):
    """Configure chunks of seven rows, so that three chunks share one body."""
    monkeypatch.setattr(rows, "ROWS", 7)
    monkeypatch.setattr(rows, "TILE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(bodies, "BODIES", bodies.Bodies())


def step(made, seed=None, inputs=None):
    """Compute results and gradients."""
    inputs = operands() if inputs is None else inputs
    out, weights = torch.ops.attnfx.attention_rows(inputs, [H * S, 6], seed, made.to_json())
    ((out * 2).sum() + weights.square().sum()).backward()
    return [out.detach(), weights.detach(), *(x.grad for x in inputs)]


def made_bodies():
    return list(bodies.BODIES.made.values())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_body_gives_what_the_calls_give_with_the_same_draws(dropout):
    seed = torch.tensor([5]) if dropout else None
    for got, want in zip(step(replace(program(dropout), compiled=True), seed), step(program(dropout), seed)):
        torch.testing.assert_close(got, want)
    assert len(made_bodies()) == 2 and None not in made_bodies()


def test_all_chunks_of_all_steps_share_a_body_and_a_shorter_one_runs_without():
    made = replace(program(), compiled=True)
    for length in (21, 21, 20):
        inputs = operands()
        inputs[0] = inputs[0].detach()[:, :length].requires_grad_()
        own = [x.detach().clone().requires_grad_() for x in inputs]
        for got, want in zip(step(made, inputs=inputs), step(program(), inputs=own)):
            torch.testing.assert_close(got, want)
    assert len(made_bodies()) == 3  # gradients of 20 rows have other strides


def triangles():
    """Build softmax(s masked to i - 4 <= j <= i + 2), with the queries along dim 1."""
    calls = [
        Call("einsum.default", ("hid,hjd->hij", (Ref("value", 0), Ref("value", 1)))),
        Call("ones_like.default", (Ref("value", 3),)),
        Call("tril.default", (Ref("value", 4), Ref("start", 2))),
        Call("triu.default", (Ref("value", 5), Ref("start", -4))),
        Call("mul.Tensor", (Ref("value", 3), Ref("value", 6))),
        Call("softmax.int", (Ref("value", 7), -1)),
        Call("einsum.default", ("hij,hjd->hid", (Ref("value", 8), Ref("value", 2)))),
    ]
    result = Result(9, 1, (H, Ref("rows", 0), Ref("size", 1)), "float64")
    return RowProgram((1, None, None), (True,) * 3, Ref("size", 0), tuple(calls), (result,))


def test_a_triangle_follows_the_chunk():
    found = []
    for compiled in (True, False):
        inputs = operands()[:3]
        text = replace(triangles(), compiled=compiled).to_json()
        (out,) = torch.ops.attnfx.attention_rows(inputs, [H * S, 6], None, text)
        out.square().sum().backward()
        found.append([out.detach(), *(x.grad for x in inputs)])
    q, k, value = operands()[:3]
    s = torch.einsum("hid,hjd->hij", q, k)
    want = (s * torch.ones_like(s).tril(2).triu(-4)).softmax(-1) @ value
    torch.testing.assert_close(found[0][0], want)
    for got, want in zip(*found):
        torch.testing.assert_close(got, want)
    assert len(made_bodies()) == 2 and None not in made_bodies()


def test_what_does_not_compile_runs_call_by_call_and_says_so(monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(bodies, "compiled", fails)
    with caplog.at_level(logging.WARNING, "attnfx"):
        got = step(replace(program(), compiled=True))
    for x, want in zip(got, step(program())):
        torch.testing.assert_close(x, want)
    assert [r.getMessage().count("no compiler here") for r in caplog.records] == [1, 1]
    assert made_bodies() == [None, None]


def test_a_body_that_gives_something_else_is_not_used_and_says_so(monkeypatch, caplog):
    own = bodies.compiled

    def wrong(*args, **kwargs):
        run = own(*args, **kwargs)
        return lambda *operands: [x * 1.1 for x in run(*operands)]

    monkeypatch.setattr(bodies, "compiled", wrong)
    with caplog.at_level(logging.WARNING, "attnfx"):
        got = step(replace(program(), compiled=True))
    for x, want in zip(got, step(program())):
        torch.testing.assert_close(x, want)
    assert ["of the compiled body differs from the calls'" in r.getMessage() for r in caplog.records] == [True, True]
    assert made_bodies() == [None, None]


def transposed_scores():
    """Build an attention over transposed scores that also returns its weights, whose gradient is the same for all rows.
    Inductor of PyTorch 2.13 computes wrong gradients for it on a CPU with AVX-512 (pytorch/pytorch#185702)."""
    calls = [
        Call("matmul.default", (Ref("value", 0), Ref("value", 1))),
        Call("mT.default", (Ref("value", 3),)),
        Call("softmax.int", (Ref("value", 4), -1)),
        Call("mean.dim", (Ref("value", 5), (0,), True)),
        Call("add.Tensor", (Ref("value", 5), Ref("value", 6))),
        Call("matmul.default", (Ref("value", 7), Ref("value", 2))),
        Call("max.dim", (Ref("value", 7), -1)),
        Call("getitem", (Ref("value", 9), 0)),
    ]
    shapes = (7, (4, Ref("rows", 0), 12)), (8, (4, Ref("rows", 0), 8)), (10, (4, Ref("rows", 0)))
    results = tuple(Result(n, 1, shape, "float32") for n, shape in shapes)
    return RowProgram((None, 2, None), (True,) * 3, 48, tuple(calls), results)


def test_what_inductor_gets_wrong_is_computed_by_the_calls(monkeypatch):
    monkeypatch.setattr(rows, "ROWS", 16)
    found = []
    for compiled in (True, False):
        key, value = (rand(4, 12, 8, seed=n).requires_grad_() for n in (1, 2))
        query = rand(4, 16, 8, seed=0).requires_grad_()
        text = replace(transposed_scores(), compiled=compiled).to_json()
        weights, out, largest = torch.ops.attnfx.attention_rows([key, query.mT, value], [], None, text)
        products = (weights.sum(-2) * rand(4, 12, seed=3), out * rand(4, 16, 8, seed=4), largest * rand(4, 16, seed=5))
        sum(x.sum() for x in products).backward()
        found.append([x.grad for x in (query, key, value)])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want)


def test_bodies_of_a_program_are_bounded(monkeypatch):
    monkeypatch.setattr(bodies, "CLASSES", 0)
    step(replace(program(), compiled=True))
    assert not made_bodies()


def test_a_body_is_made_under_whatever_mode_asks():
    """The caller's inference mode, autocast, dispatch mode and no_grad do not affect the body."""
    from torch.utils.flop_counter import FlopCounterMode

    text = replace(program(), compiled=True).to_json()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), FlopCounterMode(display=False):
        out, _ = torch.ops.attnfx.attention_rows(operands(), [H * S, 6], None, text)
    torch.testing.assert_close(out, step(program())[0])
    assert len(made_bodies()) == 1 and None not in made_bodies()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_body_is_made_inside_a_compiled_step(mode, monkeypatch):
    from attnfx.cost import row_chunks as model

    monkeypatch.setattr(model, "CACHE", 0)

    def attention(q, k, v):
        s = q @ k.mT
        s = s.masked_fill(s < s.topk(4).values[..., -1:], float("-inf"))
        return s.softmax(-1) @ v

    own = [rand(1, H, 21, 8, seed=n).requires_grad_() for n in range(3)]
    mine = [x.detach().clone().requires_grad_() for x in own]
    torch._dynamo.reset()
    options = {"options": {"rewrite": "always"}} if mode is None else {"mode": mode}
    run = torch.compile(attention, backend="attnfx", **options)
    for _ in range(2):
        out, want = run(*mine), attention(*own)
        torch.testing.assert_close(out, want)
        out.sum().backward()
        want.sum().backward()
        for got, x in zip(mine, own):
            torch.testing.assert_close(got.grad, x.grad)
    assert mode is not None or (len(made_bodies()) == 2 and None not in made_bodies())
