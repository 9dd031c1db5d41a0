"""Catch and undo wrong rewrites with `verify="first"`, accept correct ones, and leave the rest of a call unchanged."""

from __future__ import annotations

import dataclasses
import math
import runpy
import subprocess
import sys
import warnings

import pytest
import torch

from attnfx import spec
from attnfx.compiler import apply
from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild, substitute
from attnfx.kernels.operators import attention as operator
from attnfx.passes.match.results import Match
from attnfx.passes.rows import replace_region as region_rewrite
from attnfx.verify import verify
from tests.passes.programs import Program, Spelling, arrange, tensors, write
from tests.support import compiled, error, new_reports, qkv, rand, run

T = 40
BIAS, PER_HEAD = rand(4, T, T, seed=1), rand(4, seed=2)
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()


def plain(q, k, v):
    return ((q @ k.mT) * 0.25).masked_fill(~CAUSAL, -math.inf).softmax(-1) @ v


def biased(q, k, v):
    return ((q @ k.mT) * 0.25 + BIAS).softmax(-1) @ v


def per_head(q, k, v):
    far = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    return ((q @ k.mT) * 0.25 - PER_HEAD.view(4, 1, 1) * far).softmax(-1) @ v


def capped(q, k, v):
    return (2.0 * torch.tanh((q @ k.mT) / 2.0)).softmax(-1) @ v


def grouped(q, k, v):
    return ((q @ k.repeat_interleave(2, 1).mT) * 0.25).softmax(-1) @ v.repeat_interleave(2, 1)


def dropped(q, k, v):
    return torch.dropout(((q @ k.mT) * 0.25).softmax(-1), 0.2, True) @ v


def with_sums(q, k, v):
    weights = ((q @ k.mT) * 0.25).softmax(-1)
    return weights @ v, weights.mean(1)


def best_keys(q, k, v):
    scores = (q @ k.mT) * 0.25
    least = scores.topk(5, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -math.inf).softmax(-1) @ v


def loads(program, change):
    """Replace each load of a program by `change(load, args)`."""
    return rebuild(program, lambda old, args: change(old, args) if old.op == "load" else None)


# -- wrong rewrites: each takes a spec and returns a wrong one -------------------------------------------------
def no_scale(s):
    return dataclasses.replace(s, score=substitute(s.score, {A.DOT: A.mul(A.const(4.0), A.DOT)}))


def mask_shifted(s):
    return dataclasses.replace(s, score=substitute(s.score, {spec.I: A.add(spec.I, A.ONE)}))


def mask_transposed(s):
    return dataclasses.replace(s, score=substitute(s.score, {spec.I: spec.J, spec.J: spec.I}))


def heads_swapped(s):
    return dataclasses.replace(s, score=substitute(s.score, {spec.H: A.mod(A.add(spec.H, A.ONE), A.const(4))}))


def other_cap(s):
    return dataclasses.replace(s, score=A.mul(A.const(1.5), s.score))


def no_bias(s):
    return dataclasses.replace(s, score=loads(s.score, lambda old, args: A.const(0.0)))


def bias_negated(s):
    return dataclasses.replace(
        s, score=loads(s.score, lambda old, args: A.mul(A.const(-1.0), A.load(old.value, args, old.kind)))
    )


def bias_transposed(s):
    return dataclasses.replace(
        s, score=loads(s.score, lambda old, args: A.load(old.value, (*args[:-2], args[-1], args[-2]), old.kind))
    )


def last_key_lost(s):
    keep = A.lt(spec.J, A.add(A.size("S"), A.const(-1)))
    return dataclasses.replace(s, score=A.where(keep, s.score, A.const(-math.inf)))


def no_dropout_scale(s):
    return dataclasses.replace(s, weight=A.mul(A.const(1 - s.dropout), s.weight))


def less_dropout(s):
    return dataclasses.replace(s, dropout=s.dropout / 2)


PLANTED = [
    (plain, no_scale), (plain, mask_shifted), (plain, mask_transposed), (per_head, heads_swapped),
    (capped, other_cap), (biased, no_bias), (biased, bias_negated), (biased, bias_transposed), (plain, last_key_lost),
    (dropped, no_dropout_scale), (dropped, less_dropout),
]  # fmt: skip


def caught(fn, operands, folder, train=True, **options):
    """Run `fn` compiled under `verify`, and require eager's results and one warning that names a reproducing script.
    Return the site and the script."""
    with new_reports() as filed, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.manual_seed(3)
        got = run(compiled(fn, verify="first", inner="eager", dump_dir=folder, **options), operands, train)
    torch.manual_seed(3)
    assert error(got, run(fn, operands, train)) < 1e-6
    (message,) = [str(w.message) for w in told if issubclass(w.category, RuntimeWarning)]
    (script,) = (folder / "verify").glob("*/repro.py")
    assert str(script) in message and "test_verify.py" in message
    (site,) = filed[-1].sites
    assert not site.rewritten and str(script) in site.decision.reason
    return site, script


def shows(script, capsys) -> str:
    """Run the script, which must find a mismatch, and return its output."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1
    return capsys.readouterr().out


def planted(monkeypatch, wrong):
    """Replace the spec of every match by a wrong one before the rewrite."""
    original = apply.rewrite

    def rewrite(graph, facts, match, *rest, **more):
        match.spec = wrong(match.spec)
        return original(graph, facts, match, *rest, **more)

    monkeypatch.setattr(apply, "rewrite", rewrite)


@pytest.mark.parametrize(("fn", "wrong"), PLANTED, ids=lambda x: x.__name__)
def test_a_wrong_rewrite_is_caught_and_undone(fn, wrong, tmp_path, monkeypatch, capsys):
    planted(monkeypatch, wrong)
    _, script = caught(fn, qkv(t=T), tmp_path)
    monkeypatch.undo()
    assert "error" in shows(script, capsys)
    assert (script.parent / "spec.json").exists()


def test_wrong_groups_are_caught(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Match, "axes", property(lambda m: [*m.kv_axes[:-1], *m.group_axes, m.kv_axes[-1]]))
    shows(caught(grouped, qkv(t=T, g=2), tmp_path)[1], capsys)


@pytest.mark.parametrize("train", [True, False])
def test_a_wrong_gradient_is_caught_in_training_alone(train, tmp_path, monkeypatch, capsys):
    def planted(tier):
        def backward(*args):
            query, key, value, rest = tier.backward(*args)
            return query, -key, value, rest

        return tier._replace(backward=backward)

    for name, tier in operator.TIERS.items():
        monkeypatch.setitem(operator.TIERS, name, planted(tier))
    if train:
        out = shows(caught(plain, qkv(t=T), tmp_path)[1], capsys)
        assert out.count("the same") == 3 and "gradient of m_t: an error of" in out
    else:
        passes(plain, qkv(t=T), train=False)


def test_wrong_sums_of_the_weights_are_caught(tmp_path, monkeypatch, capsys):
    original = apply.rewrite

    def planted(graph, facts, match, *rest, **more):
        *rest, reductions = rest
        assert reductions
        wrong = [dataclasses.replace(r, spec=mask_shifted(no_scale(r.spec))) for r in reductions]
        return original(graph, facts, match, *rest, wrong, **more)

    monkeypatch.setattr(apply, "rewrite", planted)
    assert "mean: an error of" in shows(caught(with_sums, qkv(t=T), tmp_path)[1], capsys)


def test_a_wrong_row_program_is_caught(tmp_path, monkeypatch, capsys):
    original = region_rewrite._program

    def planted(*args):
        program, *rest = original(*args)
        calls = [
            dataclasses.replace(c, args=(c.args[0], 4, *c.args[2:])) if c.op.startswith("topk") else c
            for c in program.calls
        ]
        assert calls != list(program.calls)
        return dataclasses.replace(program, calls=tuple(calls)), *rest

    monkeypatch.setattr(region_rewrite, "_program", planted)
    shows(caught(best_keys, qkv(t=T), tmp_path, train=False)[1], capsys)


@pytest.mark.slow
def test_the_script_runs_by_itself(tmp_path, monkeypatch):
    planted(monkeypatch, no_scale)
    _, script = caught(plain, qkv(t=T), tmp_path)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and "an error of" in done.stdout, done.stderr


# -- right rewrites ---------------------------------------------------------------------------------------------
def passes(fn, operands, train=True, sites=1, **options):
    """Compile under `verify`, and require that every site is rewritten and noted as verified, without warnings. Return
    the notes."""
    with new_reports() as filed, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("error", message="attnfx")
        run(compiled(fn, verify="first", **{"inner": "eager", **options}), operands, train)
    found = [s for report in filed for s in report.sites]
    assert len(found) == sites and all(s.rewritten for s in found), "\n".join(map(str, filed))
    notes = [" ".join(s.notes) for s in found]
    assert all("verified on the first call: forward error" in n for n in notes), notes
    assert all(("gradient error" in n) == train for n in notes), notes
    return notes


BF16 = torch.bfloat16
FREE = Program()
BUSY = Program(cap=1.5, bias=("pair",), masks=("causal", "padding"), groups=2)
RIGHT = [
    (FREE, Spelling(layout="bthd", softmax="by_hand")),
    (FREE, Spelling(layout="bmm", scale="query", softmax="divided_later")),
    (Program(masks=("causal",)), Spelling(layout="einsum", masking="where", softmax="log_softmax")),
    (Program(masks=("causal", "window")), Spelling(masking="add", causal="tril", layout="fused")),
    (Program(masks=("padding",), fill=torch.finfo(torch.float32).min), Spelling(masking="product")),
    (Program(masks=("document",)), Spelling(masking="in_place", scale="in_place")),
    (BUSY, Spelling(repeat="five_dims")),
    (BUSY, Spelling(repeat="expand", upcast="float", masking="where")),
    (Program(bias=("alibi",), masks=("causal",)), Spelling(layout="baddbmm", causal="triu")),
    (Program(bias=("row", "full")), Spelling(bias="alpha", scale="divide")),
    (Program(sink=True, head_mask=True), Spelling(sink="column")),
    (Program(sink=True), Spelling(sink="by_hand", layout="stored_transposed")),
]


@pytest.fixture
def default_dtype(request):
    """Set the default dtype, that of the masks and factors that a program creates."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("default_dtype", "train", "every"),
    [(torch.float32, True, 1), (BF16, False, 1), (torch.float32, False, 4), (BF16, True, 2)],
    ids=["float32-training", "bfloat16-inference", "float32-inference", "bfloat16-training"],
    indirect=["default_dtype"],
)
def test_right_rewrites_pass(default_dtype, train, every):
    dtype = default_dtype
    for n, (program, spelling) in list(enumerate(RIGHT))[::every]:
        torch._dynamo.reset()
        given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors(program, seed=n).items()}
        given = arrange(given, spelling)
        if dtype == BF16:  # matrix products reject an upcast operand
            spelling = dataclasses.replace(spelling, upcast="none")
        passes(named(write(program, spelling), list(given)), list(given.values()), train)


def named(fn, names):
    return lambda *operands: fn(**dict(zip(names, operands)))


@pytest.mark.parametrize("fn", [dropped, with_sums, best_keys, capped, grouped], ids=lambda f: f.__name__)
def test_dropout_sums_whole_rows_and_grouped_heads_pass(fn):
    passes(fn, qkv(t=T, g=2 if fn is grouped else 4))


def test_the_library_s_own_operator_passes():
    def fn(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    passes(fn, qkv(t=T))


def same_as_eager(fn, operands, train=True, **options):
    """Require that `fn` compiled under `verify` matches eager from the same seed, and return its sites' notes."""
    with new_reports() as filed:
        torch.manual_seed(3)
        got = run(compiled(fn, verify="first", **{"inner": "eager", **options}), operands, train)
    torch.manual_seed(3)
    assert error(got, run(fn, operands, train)) < 1e-5
    return [" ".join(s.notes) for report in filed for s in report.sites]


def test_what_the_model_writes_and_draws_happens_once():
    def fn(q, k, v, count):
        count.add_(1)
        out = plain(q + count, k, v) + torch.rand(1)
        count.mul_(3)
        return out

    results = []
    for f in (fn, compiled(fn, verify="first", inner="eager")):
        torch.manual_seed(3)
        count = torch.zeros(1)
        results.append((f(*qkv(t=T), count), count, torch.rand(1)))
    for want, got in zip(*results):
        assert torch.allclose(got, want, atol=1e-6)


def test_inputs_that_share_memory_share_it_in_the_copies(monkeypatch):
    seen, original = [], verify.repro.differences

    def differences(old, new, inputs, *rest):
        seen.extend(inputs)
        return original(old, new, inputs, *rest)

    def fn(q, k, v, a, whole):
        a.add_(1)
        return plain(q + whole.sum(), k, v)

    monkeypatch.setattr(verify.repro, "differences", differences)
    operands, whole = qkv(t=T), torch.zeros(2)
    compiled(fn, verify="first", inner="eager")(*operands, whole[:1], whole)
    assert not seen and whole.tolist() == [1, 0]  # such a graph is left as it is


@pytest.mark.parametrize("kind", ["checkpoint", "cond"])
def test_a_site_in_the_body_of_a_higher_order_operator_is_verified(kind):
    def checkpoint(q, k, v):
        return torch.utils.checkpoint.checkpoint(plain, q.sin(), k, v, use_reentrant=False)

    def cond(q, k, v):
        return torch.cond(q.sum() > -1e9, plain, lambda q, k, v: q + k + v, (q, k, v))

    assert passes({"checkpoint": checkpoint, "cond": cond}[kind], qkv(t=T), train=kind == "checkpoint")


def test_a_site_in_the_branch_that_was_not_taken_is_said_not_to_be_verified():
    def fn(q, k, v):
        return torch.cond(q.sum() > 1e9, plain, lambda q, k, v: q + k + v, (q, k, v))

    with pytest.warns(RuntimeWarning, match=r"test_verify.py:\d+ not verified: its part of the graph did not run"):
        (notes,) = same_as_eager(fn, qkv(t=T), train=False)
    assert "not verified" in notes


def test_autocast_regions_and_dynamic_shapes_pass():
    def fn(q, k, v):
        with torch.autocast("cpu", BF16):
            return ((q @ k.mT) * 0.25).softmax(-1) @ v

    passes(fn, qkv(t=T))
    passes(lambda q, k, v: ((q @ k.mT) * 0.25).softmax(-1) @ v, qkv(t=T), dynamic=True)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_rows_without_a_live_key_pass(fill):
    def fn(q, k, v):
        return ((q @ k.mT) * 0.25).masked_fill(~CAUSAL.tril(-1), fill).softmax(-1) @ v

    passes(fn, qkv(t=T))


def test_a_nan_in_a_key_that_is_hidden_is_excused():
    q, k, v = qkv(t=T)
    k[:, :, -1] = v[:, :, -1] = math.nan
    seen = torch.arange(T) < T - 1
    passes(lambda q, k, v: ((q @ k.mT) * 0.25).masked_fill(~seen, -math.inf).softmax(-1) @ v, (q, k, v), train=False)


def test_where_memory_is_short_the_site_is_rewritten_and_one_warning_says_that_it_was_not_verified(monkeypatch):
    monkeypatch.setattr(verify, "free_on", lambda device: 1 << 20)
    with pytest.warns(RuntimeWarning, match="not verified: its scores in float64 would take . MiB, and 1 MiB are free"):
        (notes,) = same_as_eager(plain, qkv(b=8, h=8, t=T))
    assert "not verified" in notes


@pytest.mark.parametrize(
    ("problem", "words"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory"), (ValueError("odd"), "ValueError: odd")],
)
def test_a_failure_of_the_comparison_itself_takes_nothing_down(problem, words, monkeypatch):
    def fails(*_):
        raise problem

    monkeypatch.setattr(verify.repro, "differences", fails)
    with pytest.warns(RuntimeWarning, match=f"not verified: {words}"):
        same_as_eager(plain, qkv(t=T))


def test_a_script_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    def fails(*_):
        raise PermissionError("no room")

    planted(monkeypatch, no_scale)
    monkeypatch.setattr(verify.repro, "write", fails)
    with pytest.warns(RuntimeWarning, match="script that reproduces a mismatch could not be written under .*no room"):
        same_as_eager(plain, qkv(t=T), dump_dir=tmp_path)


def test_of_two_sites_the_right_one_stays_rewritten(tmp_path, monkeypatch):
    def planted(graph, facts, match, *rest, original=apply.rewrite, **more):
        if match.spec.score.op == "where":
            match.spec = no_scale(match.spec)
        return original(graph, facts, match, *rest, **more)

    monkeypatch.setattr(apply, "rewrite", planted)
    with new_reports() as filed, pytest.warns(RuntimeWarning, match="a rewrite and its original disagreed"):
        same_as_eager(lambda q, k, v: capped(plain(q, k, v), k, v), qkv(t=T), dump_dir=tmp_path)
    first, second = filed[0].sites
    assert not first.rewritten and second.rewritten and "verified" in " ".join(second.notes)
    assert len(list((tmp_path / "verify").iterdir())) == 1
