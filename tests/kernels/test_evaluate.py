"""Compare the evaluation of expressions as tensors with the interpreter, and check the gradients of loads."""

import itertools
import math

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.ir.expr import FLOAT_UNARY, node
from attnfx.ir.interpret import evaluate
from attnfx.kernels.evaluate import Axis, Evaluator, block_axes, diagonal_sums, toeplitz
from attnfx.spec import B, H, I, J

SIZES = dict(B=2, H=3, T=6, S=7, n0=5)
BLOCK = dict(b=(0, 2), h=(0, 3), i=(2, 5), j=(1, 6))
x, y = A.load(0, [H, I], "f"), A.load(1, [J], "f")
n = A.sub(A.mul(A.const(3), I), A.mul(J, H))
flag = A.load(2, [B, J], "b")


def captures(dtype=torch.float64):
    torch.manual_seed(0)
    return [
        torch.rand(3, 6, dtype=dtype) + 0.1,
        torch.rand(7, dtype=dtype) + 0.1,
        torch.rand(2, 7) < 0.5,
        torch.randint(0, 9, (4,)),
        torch.randn(9, 3, dtype=dtype),
    ]


def evaluator(tensors, dtype=torch.float64, block=BLOCK, leaves=None, sizes=SIZES):
    return Evaluator(tensors, sizes, block_axes(**block), dtype, torch.device("cpu"), leaves)


def check(e, tensors=None, tolerance=1e-12):
    """Compare the block's values with the interpreter's, index by index."""
    tensors = captures() if tensors is None else tensors
    dot = torch.randn(2, 3, 3, 5, dtype=torch.float64)
    values = evaluator(tensors, leaves={A.DOT: dot})
    got = values.tensor(e).to(torch.float64).expand(2, 3, 3, 5)
    for index in itertools.product(*(range(*BLOCK[name]) for name in "bhij")):
        at = tuple(m - BLOCK[name][0] for m, name in zip(index, "bhij"))
        env = dict(zip("bhij", index)) | SIZES | {"dot": dot[at].item()}
        want = float(evaluate(e, env, lambda slot, where: tensors[slot][where].item()))
        assert got[at].item() == pytest.approx(want, rel=tolerance, abs=tolerance, nan_ok=True), (e, index)


@pytest.mark.parametrize("op", sorted(FLOAT_UNARY) + ["abs", "sign", "half", "detach", "float", "int", "not"])
def test_every_unary_operator_is_the_interpreters(op):
    if op == "float":
        check(A.mul(A.to_float(n), x))
    elif op == "int":
        check(node("int", "i", (A.mul(A.const(-9.7), x, y),)))
    elif op == "not":
        check(node("not", "b", (flag,)))
    elif op == "abs":
        check(A.unary("abs", n))
        check(A.unary("abs", A.sub(x, y)))
    elif op in ("half", "detach"):
        check(node(op, "f", (A.mul(A.const(3.3), x),)))
    else:
        check(node(op, "f", (A.add(x, y) if op in ("sqrt", "recip", "log", "log2") else A.sub(x, y),)))


@pytest.mark.parametrize(
    "e",
    [
        A.add(x, y, A.const(1.5)),
        A.mul(A.const(-2.0), x, y),
        n,
        A.add(A.size("n0"), A.mul(I, J)),
        node("floordiv", "i", (n, A.const(4))),
        node("mod", "i", (n, A.const(4))),
        A.floordiv(A.size("n0"), A.const(2)),
        A.minimum(n, A.const(3)),
        A.maximum(n, J, A.const(2)),
        node("min", "f", (x, y)),
        node("max", "f", (x, y)),
        node("pow", "f", (x, y)),
        A.lt(x, y),
        A.le(x, y),
        node("eq", "b", (x, x)),
        A.ge(I, J),
        A.eq(I, J),
        A.and_(A.ge(I, J), flag),
        A.or_(A.ge(I, J), flag),
        A.where(flag, x, y),
        A.where(A.ge(I, J), n, A.const(-5)),
        A.where(flag, A.const(1.0), A.const(0.0)),
        A.where(flag, A.lt(x, y), A.ge(I, J)),
        A.where(A.ge(I, J), A.mul(A.const(0.5), A.DOT), A.const(-math.inf)),
        A.to_float(A.size("n0")),
        A.add(A.to_float(flag), y),
    ],
    ids=str,
)
def test_every_other_operator_is_the_interpreters(e):
    check(e)


@pytest.mark.parametrize("op", ["rsum", "rmax"])
def test_reductions_run_over_their_own_variable(op):
    extent = A.const(4)
    inner = A.var("m", extent)
    body = A.mul(A.load(1, [inner], "f"), A.add(y, A.to_float(A.mul(inner, I))))
    check(A.reduction(op, "m", extent, body))
    check(A.reduction(op, "m", extent, A.mul(y, y)))
    nested = A.reduction("rsum", "p", A.const(3), A.mul(A.load(1, [A.var("p", A.const(3))], "f"), A.to_float(inner)))
    check(A.reduction(op, "m", extent, nested))


@pytest.mark.parametrize(
    "index",
    [
        [A.add(J, A.const(1))],
        [A.sub(J, A.const(1))],
        [A.sub(A.const(6), J)],
        [A.const(2)],
        [A.sub(A.size("n0"), A.const(1))],
        [A.floordiv(A.add(I, J), A.const(2))],
        [A.load(3, [A.mod(J, A.const(4))], "i")],
        [A.add(A.load(3, [A.const(0)], "i"), A.const(-2))],
    ],
    ids=str,
)
def test_loads_at_any_index(index):
    tensors = captures()
    tensors[3] = torch.tensor([3, 6, 0, 2])
    check(A.load(1, index, "f"), tensors)


def test_loads_of_several_dims_in_any_order():
    tensors = captures()
    tensors[1] = torch.randn(7, 3, 2, 6, dtype=torch.float64)
    check(A.load(1, [J, H, B, I], "f"), tensors)
    check(
        A.load(1, [J, A.const(1), B, J], "f"),
        [*tensors[:1], torch.randn(7, 3, 2, 7, dtype=torch.float64), *tensors[2:]],
    )


def test_an_index_outside_under_a_dead_branch_is_not_read():
    ahead = A.add(J, A.const(3))
    e = A.where(A.lt(ahead, A.const(7)), A.load(1, [ahead], "f"), A.const(0.0))
    values = evaluator(captures()).tensor(e).expand(1, 1, 1, 5)
    assert values.flatten().tolist() == [*captures()[1][4:].tolist(), 0.0, 0.0]
    behind = A.sub(J, A.const(3))
    e = A.where(A.ge(behind, A.ZERO), A.load(1, [behind], "f"), A.const(0.0))
    assert evaluator(captures()).tensor(e).flatten().tolist() == [0.0, 0.0, *captures()[1][:3].tolist()]


def test_what_does_not_depend_on_an_index_has_size_one_there():
    values = evaluator(captures())
    assert values.tensor(A.mul(y, y)).shape == (5,)
    assert values.tensor(A.mul(x, x)).shape == (3, 3, 1)
    assert values.tensor(A.load(0, [A.ZERO, A.ZERO], "f")).shape == ()


def test_constants_beyond_float32_are_infinite():
    values = evaluator(captures(torch.float32), torch.float32)
    e = A.where(flag, A.load(1, [J], "f"), A.const(-1e300))
    assert values.tensor(e).min().item() == -math.inf
    assert values.tensor(A.mul(A.const(1e39), y)).min().item() == math.inf


def test_floats_are_computed_in_the_compute_type():
    values = evaluator(captures(torch.bfloat16), torch.float32)
    assert values.tensor(A.unary("exp", y)).dtype == torch.float32
    assert values.tensor(A.to_float(n)).dtype == torch.float32


bucket = A.to_int(A.mul(A.const(2.0), A.unary("log", A.to_float(A.add(A.unary("abs", A.sub(J, I)), A.ONE)))))
DIAGONAL = [
    A.ge(I, J),
    A.and_(A.ge(I, J), A.lt(A.sub(I, J), A.const(3))),
    bucket,
    A.load(4, [bucket, H], "f"),
    A.mul(A.to_float(A.sub(J, I)), A.load(0, [H, A.ZERO], "f")),
]


@pytest.mark.parametrize("e", DIAGONAL, ids=str)
def test_what_depends_on_j_minus_i_is_evaluated_along_diagonals(e):
    assert toeplitz(e) is not None
    check(e)
    single = {**BLOCK, "i": (4, 5)}
    whole = evaluator(captures()).tensor(e)
    assert torch.equal(evaluator(captures(), block=single).tensor(e).expand_as(whole[..., 2:3, :]), whole[..., 2:3, :])


@pytest.mark.parametrize("e", [A.ge(A.mul(A.const(2), I), J), x, A.mul(A.DOT, A.to_float(A.sub(I, J))), A.add(I, J)])
def test_what_does_not_follow_from_j_minus_i_is_not(e):
    assert toeplitz(e) is None


def test_integers_from_float_logarithms_are_those_of_the_eager_graph():
    """T5's buckets, over 4096 distances, in float32."""
    size = dict(SIZES, T=1, S=4096)
    distance = A.maximum(J, A.const(8))
    log = A.unary("log", A.mul(A.to_float(distance), A.const(1 / 8)))
    e = A.to_int(A.mul(log, A.const(8 / math.log(128 / 8))))
    got = evaluator([], torch.float32, dict(b=(0, 1), h=(0, 1), i=(0, 1), j=(0, 4096)), sizes=size).tensor(e)
    eager = (torch.log(torch.arange(4096).clamp(min=8).float() * (1 / 8)) * (8 / math.log(128 / 8))).long()
    assert torch.equal(got.flatten(), eager)


def test_diagonal_sums_add_up_each_diagonal():
    tile = torch.randn(2, 3, 5)
    got = diagonal_sums(tile)
    for w in range(7):
        want = tile.diagonal(w - 2, -2, -1).sum(-1)
        torch.testing.assert_close(got[:, 0, w], want)


@pytest.mark.parametrize(
    "load",
    [
        A.load(0, [H, I], "f"),
        A.load(1, [J], "f"),
        A.load(1, [A.sub(A.const(6), J)], "f"),
        A.load(1, [A.const(3)], "f"),
        A.load(4, [bucket, H], "f"),
        A.load(0, [H, A.mod(A.add(A.mul(I, J), B), A.const(5))], "f"),
    ],
    ids=str,
)
def test_gradients_of_loads_are_autograds(load):
    tensors = captures()
    wanted = tensors[load.value].requires_grad_()
    slope = torch.randn(2, 3, 3, 5, dtype=torch.float64)
    value = evaluator(tensors).tensor(load).expand(2, 3, 3, 5)
    (want,) = torch.autograd.grad(value, wanted, slope)
    total = torch.zeros_like(wanted)
    evaluator([t.detach() for t in tensors]).add_gradient(load, slope, total)
    torch.testing.assert_close(total, want)


def test_variables_can_be_bound_to_other_axes():
    values = Evaluator([], {}, {"w": Axis(-3, 4, -1)}, torch.float32, torch.device("cpu"))
    w = A.var("w", A.const(9))
    assert values.tensor(A.mul(w, w)).tolist() == [9, 4, 1, 0, 1, 4, 9]


@pytest.mark.parametrize(
    "name", ["min", "max", "minimum", "maximum", "atan2", "fmod", "rsub", "sub", "mul", "clamp_max"]
)
@pytest.mark.parametrize("number_first", [False, True])
def test_an_operator_of_two_tensors_is_replayed_with_a_number_for_a_constant_one(name, number_first):
    """The graph had a tensor filled with one value, which the program has as a constant."""
    if name == "clamp_max" and number_first:
        pytest.skip("it has no such form")
    x, number = torch.arange(5.0) - 2, 1.5
    full = torch.full((5,), number)
    packet = getattr(torch.ops.aten, name)
    want = packet(full, x) if number_first else packet(x, full)
    operands = (A.const(number), A.to_float(J)) if number_first else (A.to_float(J), A.const(number))
    moved = [A.add(e, A.const(-2.0)) if e.op != "const" else e for e in operands]
    e = node("aten", "f", tuple(moved), f"{name}:float32")
    found = Evaluator((), {"S": 5}, {"j": Axis(0, 5, -1)}, torch.float32, torch.device("cpu")).tensor(e)
    torch.testing.assert_close(found.flatten(), want, equal_nan=True)
