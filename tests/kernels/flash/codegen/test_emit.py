"""Compare generated Triton functions with the interpreter of the IR, by operation and on random programs."""

import math
import os
import stat
import sys

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attnfx.kernels.flash.triton.functions as f
from attnfx.ir import algebra as A
from attnfx.ir.expr import BOOL, FLOAT_UNARY, Expr, node, walk
from attnfx.ir.interpret import evaluate
from attnfx.kernels.flash.codegen import import_source as module
from attnfx.kernels.flash.codegen.emit import emit
from attnfx.kernels.flash.codegen.expressions import NotEmitted
from attnfx.kernels.flash.codegen.program import LOG2E, Program, program_of
from attnfx.kernels.flash.host.forward import never_outside
from attnfx.spec import AttentionSpec, B, Capture, H, I, J

T, S = 5, 7
CAPTURES = (Capture("f", 2), Capture("f", 2), Capture("b", 2), Capture("i", 2))
SPEC = AttentionSpec(captures=CAPTURES, sizes=("n0",))
SIZES = dict(B=2, H=3, T=T, S=S, n0=4)


def element(slot, index):
    mix = math.sin(1.7 * slot + sum((n + 1) * 0.83 * i for n, i in enumerate(index)))
    return mix > 0 if slot == 2 else int(3 * mix) if slot == 3 else mix


def tensors():
    shapes = ((2, 7), (5, 3), (2, 7), (2, 5))
    made = [[[element(n, (a, b)) for b in range(q)] for a in range(p)] for n, (p, q) in enumerate(shapes)]
    kinds = (torch.float32, torch.float32, torch.uint8, torch.int64)
    return [torch.tensor(x, dtype=kind) for x, kind in zip(made, kinds)]


@triton.jit
def run(dots, out, captures, sizes, b, h, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        FUNCTION: tl.constexpr):  # fmt: skip
    row, column = tl.arange(0, 8)[:, None], tl.arange(0, 8)[None, :]
    i, j = f.clamped(row, sizes[2] >> 1), f.clamped(column, sizes[3] >> 1)
    values = HEADS(captures, sizes, b, h)
    rows, columns = ROWS(captures, sizes, values, b, h, i), COLUMNS(captures, sizes, values, b, h, j)
    dot = tl.load(dots + 8 * row + column)
    x = FUNCTION(captures, sizes, values, rows, columns, dot, dot, b, h, i, j)
    tl.store(out + 8 * row + column, tl.broadcast_to(tl.cast(x, tl.float32), [8, 8]))


def emitted(e: Expr, b=1, h=2, wide=frozenset(), inside=frozenset()):
    """Compute a float or bool expression over (i, j) with the generated functions."""
    name = "keep" if e.kind == BOOL else "score"
    score, keep = (A.DOT, e) if e.kind == BOOL else (A.to_float(e), None)
    made = Program(True, 1.0, score, keep, None, None, A.const(1.0), None, None, (), (), ())
    functions = module.load(emit(SPEC, made, wide, inside).text)
    dots = torch.tensor([[dot_at(i, j) for j in range(8)] for i in range(8)])
    out, captures = torch.empty(8, 8), tensors()
    sizes = tuple(2 * n + 1 for n in (*SIZES.values(), *(n for x in captures for n in x.shape)))
    run[(1,)](dots, out, tuple((x, *x.stride()) for x in captures), sizes, b, h,
              functions.heads, functions.rows, functions.columns, getattr(functions, name))  # fmt: skip
    return out[:T, :S].tolist()


def dot_at(i, j):
    return 0.37 - 0.61 * ((3 * i + j) % 4)


def check(e: Expr, tolerance=2e-6, b=1, h=2, **how):
    got = emitted(e, b, h, **how)
    for i in range(T):
        for j in range(S):
            want = float(evaluate(e, {**SIZES, "b": b, "h": h, "i": i, "j": j, "dot": dot_at(i, j)}, loader))
            assert got[i][j] == pytest.approx(want, rel=tolerance, abs=tolerance, nan_ok=True), (e, i, j)


def loader(slot, index):
    shape = ((2, 7), (5, 3), (2, 7), (2, 5))[slot]
    return element(slot, tuple(min(max(i, 0), n - 1) for i, n in zip(index, shape)))


ROW, TABLE, PAD = A.load(0, [B, J], "f"), A.load(1, [A.size("n0"), H], "f"), A.load(2, [B, J], "b")
DOCUMENT = A.load(3, [B, I], "i")
MIXED = A.add(A.DOT, ROW)  # of both signs, some near zero


@pytest.mark.parametrize("op", sorted(FLOAT_UNARY | {"abs", "sign"}))
def test_every_unary_function_has_the_interpreters_values(op):
    positive = op in ("log", "log2", "log1p", "sqrt", "recip")
    for x in (MIXED, A.mul(A.const(0.01), MIXED), A.mul(A.const(7.0), MIXED)):
        check(A.unary(op, A.add(A.const(0.1), A.mul(x, x)) if positive else x), tolerance=4e-6)


@pytest.mark.parametrize("op", ["floor", "ceil", "round", "trunc"])
def test_halves_round_as_the_interpreter_has_it(op):
    check(A.unary(op, A.mul(A.const(0.5), A.to_float(A.sub(I, J)))) if op != "round" else
          node("round", "f", (A.mul(A.const(0.5), A.to_float(A.sub(I, J))),)))  # fmt: skip


D = A.sub(I, J)
INTEGERS = {
    "floordiv": node("floordiv", "i", (D, A.const(3))),
    "mod": node("mod", "i", (D, A.const(3))),
    "floordiv of a loaded number": node("floordiv", "i", (A.add(DOCUMENT, D), A.size("n0"))),
    "nonnegative": A.floordiv(A.add(I, A.mul(J, A.const(2))), A.const(3)),
    "product": A.mul(I, J),
    "min": A.minimum(I, J, A.const(3)),
    "max": A.maximum(I, J, DOCUMENT),
    "abs": A.unary("abs", D),
    "sign": A.unary("sign", D),
    "truncated": A.to_int(A.mul(A.const(2.6), MIXED)),
    "choice": A.where(PAD, I, A.mul(A.const(-2), J)),
    "size": A.sub(A.mul(A.size("n0"), J), A.size("T")),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_round_to_minus_infinity(name):
    check(INTEGERS[name])


TRUTHS = {
    "causal": A.ge(I, J),
    "shifted": A.ge(A.add(I, A.const(2)), J),
    "equal": A.eq(I, J),
    "bounded": A.and_(A.ge(I, J), A.lt(D, A.const(3)), PAD),
    "any": A.or_(A.eq(D, A.const(1)), A.not_(PAD), A.lt(J, A.const(2))),
    "documents": A.eq(DOCUMENT, A.load(3, [B, J], "i")),
    "floats": A.lt(MIXED, A.const(0.25)),
    "at most": A.le(A.const(0.0), ROW),
    "equal floats": A.eq(A.unary("floor", ROW), A.const(0.0)),
    "chosen": A.where(PAD, A.ge(I, J), A.le(I, J)),
    "not a load": A.not_(PAD),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_truth_values_are_the_interpreters(name):
    check(TRUTHS[name])


FLOATS = {
    "sum": A.add(A.mul(A.const(0.125), A.DOT), ROW, TABLE, A.to_float(D)),
    "product": A.mul(A.DOT, ROW, TABLE),
    "min": A.minimum(MIXED, A.const(0.2)),
    "max": A.maximum(MIXED, ROW, A.const(-0.5)),
    "power": A.power(A.add(A.const(2.0), A.unary("tanh", MIXED)), A.const(2.5)),
    "power of a negative number": A.power(MIXED, A.const(5.0)),
    "half": A.half(A.mul(A.const(1.7), MIXED)),
    "half overflows": A.half(A.mul(A.const(60000.0), MIXED)),
    "detach": A.mul(A.const(2.0), A.detach(MIXED)),
    "choice": A.where(PAD, MIXED, A.const(-3.0)),
    "tiny": A.mul(A.const(1e30), A.mul(A.const(1e-40), node("float", "f", (I,)))),
    "mask as a number": A.mul(A.const(2.0), A.to_float(PAD)),
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_the_interpreters(name):
    check(FLOATS[name])


def test_captures_beyond_32_bits_are_addressed_with_64():
    check(FLOATS["sum"], wide=frozenset((0, 1)))
    text = emit(SPEC, Program(True, 1.0, ROW, None, None, None, ROW, None, None, (), (), ()), frozenset((0,))).text
    assert "tl.int64" in text


def test_an_index_that_never_points_outside_is_not_drawn_in():
    shifted = A.load(1, [A.sub(A.sub(A.size("T"), A.ONE), I), A.const(2)], "f")
    for e in (ROW, shifted, A.load(0, [B, A.minimum(A.mul(A.const(2), J), A.const(6))], "f")):
        check(A.add(A.DOT, e), inside=frozenset((0, 1)))
    made = Program(True, 1.0, A.add(A.DOT, shifted), None, None, None, A.const(1.0), None, None, (), (), ())
    assert "tl.minimum" not in emit(SPEC, made, inside=frozenset((1,))).text
    assert "tl.minimum" in emit(SPEC, made).text


def test_which_captures_no_index_points_outside_of_is_known_by_the_sizes():
    captures = (Capture("f", 1), Capture("f", 1), Capture("i", 2), Capture("f", 1))
    distance = A.add(A.sub(J, I), A.sub(A.size("T"), A.ONE))
    tables = [A.load(0, [distance], "f"), A.load(1, [A.minimum(A.add(I, J), A.const(9))], "f")]
    tables.append(A.load(3, [A.load(2, [B, I], "i")], "f"))
    spec = AttentionSpec(score=A.add(A.DOT, *tables), captures=captures)
    sizes = dict(B=2, H=3, T=5, S=7)

    def inside(*shapes):
        return never_outside(spec, tuple(sizes.items()), shapes)

    assert inside((11,), (10,), (2, 5), (4,)) == {0, 1, 2}  # a loaded index may be anything
    assert inside((10,), (9,), (2, 4), (4,)) == set()


def test_an_index_outside_is_drawn_in():
    check(A.load(0, [B, A.sub(J, A.const(3))], "f"))
    check(A.load(0, [B, A.add(J, I)], "f"))


many = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def nested(depth, leaf, grow):
    """Return a strategy for leaves, sums, and expressions that `grow` builds from shallower ones."""
    if not depth:
        return leaf
    x = nested(depth - 1, leaf, grow)
    return st.one_of(leaf, st.builds(A.add, x, x, x), *grow(x))


def smooth(depth):
    leaf = st.one_of(st.sampled_from([A.DOT, ROW, TABLE]), st.sampled_from([-2.0, 0.25, 3.0]).map(A.const))
    return nested(depth, leaf, lambda x: [
        st.builds(A.mul, x, x),
        st.builds(lambda op, e: A.unary(op, e), st.sampled_from(["tanh", "sigmoid", "sin", "softplus", "atan"]), x),
        st.builds(A.where, st.sampled_from(list(TRUTHS.values())), x, x),
        st.builds(A.minimum, x, x),
        integers(1).map(A.to_float),
    ])  # fmt: skip


def integers(depth):
    leaf = st.one_of(st.sampled_from([B, H, I, J, A.size("S"), DOCUMENT]), st.integers(-5, 9).map(A.const))
    return nested(depth, leaf, lambda x: [
        st.builds(A.mul, st.integers(-3, 4).map(A.const), x),
        st.builds(A.floordiv, x, st.integers(1, 6).map(A.const)),
        st.builds(A.mod, x, st.integers(1, 6).map(A.const)),
        st.builds(A.maximum, x, x),
    ])  # fmt: skip


@many
@given(st.one_of(smooth(3), integers(3)))
def test_random_programs_have_the_interpreters_values(e):
    check(e, tolerance=2e-5)


# -- refusals, and the place of the file ----------------------------------------------------------
def refused(score, **fields):
    made = program_of(AttentionSpec(score=score, **fields))
    assert isinstance(made, str)
    return made


def test_what_has_no_kernel_is_refused_in_a_sentence():
    m = A.var("m", 4)
    total = A.reduction("rsum", "m", A.const(4), A.load(0, [I, J, m], "f"))
    assert "more than one index" in refused(A.add(A.DOT, total), captures=(Capture("f", 3),))
    assert "float64" in refused(A.DOT, compute="float64")
    assert "multiple of the probability" in refused(A.DOT, weight=A.mul(A.PROB, A.PROB))
    with pytest.raises(NotEmitted, match="32 bits"):
        emitted(A.add(node("float", "f", (A.mul(A.const(2**40), I),)), A.DOT))


def test_an_integer_that_was_computed_through_floats_is_a_table_of_its_own_operators():
    log = node("aten", "f", (node("aten", "f", (A.add(A.unary("abs", D), A.ONE),), "to:float32"),), "log:float32")
    score = A.add(A.DOT, A.to_float(A.to_int(log)))
    made = program_of(AttentionSpec(score=score))
    assert isinstance(made, Program) and len(made.tables) == 1 and made.tables[0].axes == ("w",)
    assert made.tables[0].expr.op == "int"
    both = node("aten", "f", (node("aten", "f", (A.add(A.mul(I, J), A.ONE),), "to:float32"),), "log:float32")
    assert "more than one index" in refused(A.add(A.DOT, A.to_float(A.to_int(both))))


def test_what_is_looked_up_by_distance_is_a_table_with_one_number_for_each_diagonal():
    apart = A.add(A.minimum(A.maximum(A.sub(J, I), A.const(-2)), A.const(2)), A.const(2))
    table = A.load(0, [apart, H], "f")
    score = A.add(A.mul(A.const(0.25), A.DOT), A.mul(A.const(3.0), table))
    made = program_of(
        AttentionSpec(score=A.where(A.ge(I, J), score, A.const(-math.inf)), captures=(Capture("f", 2, True),))
    )
    assert isinstance(made, Program) and made.keep is A.ge(I, J)
    assert [t.axes for t in made.tables] == [("h", "w")]
    (read,) = {e for e in walk(made.score) if e.op == "load"}
    assert read.value == 1 and read.args[0] is H and not {"i", "j"} & A.sub(read.args[1], A.sub(J, I)).free
    assert [x.load for x in made.leaves] == [table] and made.leaves[0].space == "diagonal"


def test_a_table_by_distance_is_read_as_it_is():
    score = A.add(A.DOT, A.load(0, [H, A.add(A.sub(J, I), A.sub(A.size("T"), A.ONE))], "f"))
    made = program_of(AttentionSpec(score=score, captures=(Capture("f", 2),)))
    assert isinstance(made, Program) and not made.tables


def test_the_plain_program_is_one_multiplication_in_the_exponent():
    made = program_of(AttentionSpec(score=A.mul(A.const(0.125), A.DOT)))
    assert isinstance(made, Program) and made.score is A.DOT and made.scale == pytest.approx(0.125 * LOG2E)
    assert "return dot" in emit(AttentionSpec(), made).text
    added = A.add(A.mul(A.const(0.125), A.DOT), A.mul(A.const(2.0), ROW))
    made = program_of(AttentionSpec(score=added, captures=CAPTURES))
    assert isinstance(made, Program) and made.scale == pytest.approx(0.125 * LOG2E)
    assert made.score is A.add(A.DOT, A.mul(A.const(2.0 * LOG2E * (1.0 / made.scale)), ROW))


def test_full_tiles_have_no_mask_code():
    spec = AttentionSpec(score=A.where(A.and_(A.ge(I, J), PAD), A.DOT, A.const(-math.inf)), captures=CAPTURES)
    made = program_of(spec)
    assert isinstance(made, Program) and made.score is A.DOT and made.keep is not None


def test_generated_code_lies_where_only_the_user_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path / "cache"))
    made = module.load("value = 41  # of this test\n")
    assert made.value == 41
    folder = module.directory()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (file,) = folder.glob("*.py")
    assert file.read_text().startswith("value = 41")
    os.chmod(folder, 0o777)
    with pytest.raises(PermissionError, match="other users"):
        module.load("value = 42  # of this test\n")


def test_a_file_with_other_content_is_not_run(tmp_path):
    os.chmod(tmp_path, 0o700)
    text = "value = 43  # of this test\n"
    (tmp_path / "x").mkdir(mode=0o700)
    made = module.load(text, tmp_path / "x")
    file = next((tmp_path / "x").glob("*.py"))
    file.write_text("value = 0\n")
    del sys.modules[made.__name__]
    assert module.load(text, tmp_path / "x").value == 43 and file.read_text() == text
