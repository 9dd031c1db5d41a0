"""Check the operators as PyTorch sees them: schema, autograd, autocast, Inductor, refusals."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.operators.attention import TIERS, attention, choose
from attnfx.spec import AttentionSpec, Capture, H, I, J

DOT = A.mul(A.const(0.3), A.DOT)
CAUSAL = A.ge(I, J)
slope = A.load(0, [H], "f")
DOUBLE = dict(compute="float64", out_dtype="float64")


def masked(score=DOT, keep=CAUSAL):
    return A.where(keep, score, A.const(-math.inf))


def tensors(T=9, S=11, D=4, Dv=4, size_b=2, heads=4, groups=2, dtype=torch.float32, grad=True):
    torch.manual_seed(0)
    shapes = (size_b, heads, T, D), (size_b, groups, S, D), (size_b, groups, S, Dv)
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


BIASED = AttentionSpec(score=masked(A.add(DOT, A.mul(slope, A.to_float(J)))), captures=(Capture("f", 1, True),))
SPECS = {
    "plain": (AttentionSpec(score=DOT), 0, (), None),
    "captured": (BIASED, 1, (), None),
    "random": (AttentionSpec(score=masked(), dropout=0.3), 0, (), torch.tensor([5])),
    "sized": (AttentionSpec(score=masked(keep=A.lt(A.sub(J, I), A.size("n0"))), sizes=("n0",)), 0, (3,), None),
    "halves": (AttentionSpec(score=DOT, out_dtype="bfloat16"), 0, (), None),
}


@pytest.mark.parametrize("name", SPECS)
def test_pytorchs_own_checks_of_an_operator_pass(name):
    """The checks cover the schema, autograd registration, fake kernel, and AOTAutograd with dynamic shapes."""
    spec, count, sizes, seed = SPECS[name]
    query, key, value = tensors()
    captures = [torch.randn(4, requires_grad=True)] * count
    args = captures, list(sizes), seed, spec.to_json(), "auto"
    torch.library.opcheck(torch.ops.attnfx.attention.default, (query, key, value, *args))
    out, logsumexp = torch.ops.attnfx.attention(query, key, value, *args)
    grad = torch.randn_like(out)
    inputs = [x.detach() for x in (grad, query, key, value, out, logsumexp)]
    torch.library.opcheck(
        torch.ops.attnfx.attention_backward.default,
        (*inputs, [c.detach() for c in captures], *args[1:]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


bucket = A.minimum(A.unary("abs", A.sub(I, J)), A.const(2))
WITH_GRADIENTS = {
    "nothing": (dict(score=masked()), ()),
    "a dense bias": (dict(score=A.add(DOT, A.load(0, [H, I, J], "f")), captures=(Capture("f", 3, True),)), [(4, 3, 5)]),
    "a gathered table": (
        dict(score=A.add(DOT, A.load(0, [bucket, H], "f")), captures=(Capture("f", 2, True),)),
        [(3, 4)],
    ),
    "slopes": (
        dict(score=masked(A.add(DOT, A.mul(slope, A.to_float(A.sub(J, I))))), captures=(Capture("f", 1, True),)),
        [(4,)],
    ),
    "sinks": (dict(score=masked(), extra=(slope,), captures=(Capture("f", 1, True),)), [(4,)]),
    "a head mask": (dict(score=DOT, weight=A.mul(A.PROB, slope), captures=(Capture("f", 1, True),)), [(4,)]),
    "two, one of them frozen": (
        dict(
            score=A.add(A.mul(DOT, A.load(1, [], "f")), slope),
            captures=(Capture("f", 1, False), Capture("f", 0, True)),
        ),
        [(4,), ()],
    ),
    "dropout": (dict(score=DOT, dropout=0.4), ()),
}


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_are_numerically_right_with(name):
    fields, shapes = WITH_GRADIENTS[name]
    spec = AttentionSpec(**fields, **DOUBLE)
    inputs = tensors(T=3, S=5, D=2, Dv=3, size_b=1, dtype=torch.float64)
    captures = [torch.randn(s, dtype=torch.float64, requires_grad=c.grad) for s, c in zip(shapes, spec.captures)]
    seed = torch.tensor([3]) if spec.random else None

    def run(query, key, value, *captures):
        return attention(query, key, value, spec, captures, seed=seed)

    assert torch.autograd.gradcheck(run, (*inputs, *captures))


def test_a_capture_keeps_its_dtype_and_shape_in_the_backward_pass():
    capture = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    attention(*tensors(), BIASED, [capture]).sum().backward()
    assert capture.grad.dtype == torch.bfloat16 and capture.grad.shape == (4,)


def test_a_second_derivative_is_an_error_and_not_a_zero():
    query, key, value = tensors()
    out = attention(query, key, value, AttentionSpec(score=DOT))
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice: .* without torch.compile"):
        torch.autograd.grad(grad.sum(), key)


def test_the_logsumexp_is_the_natural_logarithm_of_the_denominator_and_has_a_gradient():
    query, key, value = tensors(groups=4)
    spec = AttentionSpec(score=DOT, extra=(A.const(0.5),))
    _, logsumexp = torch.ops.attnfx.attention(query, key, value, [], [], None, spec.to_json(), "auto")
    scores = 0.3 * query @ key.mT
    want = torch.cat([scores, torch.full((2, 4, 9, 1), 0.5)], -1).logsumexp(-1)
    torch.testing.assert_close(logsumexp, want)
    slope = torch.randn(want.shape)
    found, expected = (torch.autograd.grad(x, (query, key), slope) for x in (logsumexp, want))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dynamic"), [("captured", False), ("sized", True)], ids=["static", "dynamic"])
def test_inductor_compiles_both_passes(name, dynamic):
    spec, count, sizes, _ = SPECS[name]
    text = spec.to_json()

    def run(query, key, value, *captures):
        out = torch.ops.attnfx.attention(query * 2, key, value, list(captures), list(sizes), None, text, "auto")[0]
        return (out * 2).sin()

    torch._dynamo.reset()
    compiled = torch.compile(run, dynamic=dynamic, fullgraph=True)
    for T in (9, 12) if dynamic else (9,):
        inputs = [*tensors(T=T), *[torch.randn(4, requires_grad=True)] * count]
        want, got = run(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, want)
        grad = torch.randn_like(want)
        for x, y in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad)):
            torch.testing.assert_close(x, y)


def test_compiled_dropout_draws_anew_on_each_call_and_repeats_from_a_seed():
    spec, inputs = AttentionSpec(score=DOT, dropout=0.5), tensors(grad=False)
    compiled = torch.compile(lambda query, key, value: attention(query, key, value, spec), backend="aot_eager")
    for run in (compiled, lambda *inputs: attention(*inputs, spec)):
        torch.manual_seed(1)
        first, second = run(*inputs), run(*inputs)
        torch.manual_seed(1)
        assert torch.equal(first, run(*inputs)) and not torch.equal(first, second)


def test_autocast_casts_what_is_all_float32_and_leaves_the_rest():
    spec = AttentionSpec(score=DOT, out_dtype="bfloat16")
    query, key, value = tensors(grad=False)
    rounded = [x.to(torch.bfloat16) for x in (query, key, value)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(query, key, value, spec)
        same = attention(*rounded, spec)
        double = attention(*(x.double() for x in (query, key, value)), AttentionSpec(score=DOT, **DOUBLE))
    assert torch.equal(got, attention(*rounded, spec)) and torch.equal(same, got)
    assert double.dtype == torch.float64
    leaves = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(*leaves, spec).sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


def test_floating_point_operations_are_counted():
    query, key, value = tensors()
    with FlopCounterMode(display=False) as counter:
        attention(query, key, value, AttentionSpec(score=DOT)).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 4 * 9 * 11 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(query=a["query"][0]), "query has 3 dims, expected 4"),
        (lambda a: a.update(key=a["key"].double()), "key is torch.float64, but query is torch.float32"),
        (lambda a: a.update(query=a["query"].long()), "query is torch.int64, expected a floating type"),
        (lambda a: a.update(key=a["key"][:1]), "key has batch 1, but query has 2"),
        (lambda a: a.update(key=a["key"][..., :2]), "key has head_dim 2, but query has 4"),
        (lambda a: a.update(value=a["value"][:, :, 1:]), "value has batch, heads and length"),
        (lambda a: a.update(query=a["query"][:, :3]), "query has 3 heads, not a multiple of key's 2"),
        (lambda a: a.update(captures=[]), "captures has 0 tensors, expected 1"),
        (lambda a: a.update(captures=[torch.ones(4, 1)]), "captures[0] has 2 dims, expected 1"),
        (lambda a: a.update(captures=[torch.ones(4).long()]), "captures[0] is torch.int64"),
        (lambda a: a.update(sizes=[1]), "sizes has 1 numbers, expected 0"),
        (lambda a: a.update(seed=torch.ones(2)), "seed is torch.float32 with 2 elements"),
        (lambda a: a.update(tier="fast"), "unknown tier 'fast'; valid tiers: auto"),
        (lambda a: a.update(tier="library"), "the library tier cannot run this call: the attention has dropout"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(change, message):
    query, key, value = tensors(grad=False)
    given = dict(query=query, key=key, value=value, captures=[torch.ones(4)], sizes=(), tier="auto")
    change(given)
    spec = AttentionSpec(score=BIASED.score, captures=BIASED.captures, dropout=0.1)
    with pytest.raises(ValueError) as caught:
        attention(spec=spec, **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_dropout_needs_a_seed_where_the_operator_is_called_itself():
    with pytest.raises(ValueError, match="seed is None"):
        spec = AttentionSpec(dropout=0.1).to_json()
        torch.ops.attnfx.attention(*tensors(grad=False), [], [], None, spec, "auto")


def test_auto_takes_the_library_where_it_can():
    inputs = tensors(grad=False)
    assert choose("auto", Call(AttentionSpec(score=masked()), *inputs)) is TIERS["library"]
    assert choose("auto", Call(AttentionSpec(score=A.unary("tanh", A.DOT)), *inputs)) is TIERS["chunked"]
    empty = tensors(S=0, grad=False)
    assert choose("auto", Call(AttentionSpec(score=masked()), *empty)) is TIERS["chunked"]
    assert not attention(*empty, AttentionSpec(score=masked())).any()


def test_a_spec_may_be_given_as_its_text():
    inputs = tensors(grad=False)
    spec = AttentionSpec(score=masked())
    assert torch.equal(attention(*inputs, spec), attention(*inputs, spec.to_json()))
