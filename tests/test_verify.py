"""`verify="first"`: wrong rewrites are caught and undone, right ones pass, and nothing else of the call changes."""

from __future__ import annotations

import dataclasses
import math
import runpy
import subprocess
import sys
import warnings

import pytest
import torch

from attnfx import pipeline, spec, verify
from attnfx.ir import algebra as A
from attnfx.ir.expr import rebuild, substitute
from attnfx.kernels import operator
from attnfx.passes import regions
from attnfx.passes.match import Match
from tests.passes.programs import CHOICES, Program, Spelling, arrange, tensors, write
from tests.support import compiled, error, new_reports, qkv, rand, run

T = 40
BIAS, PER_HEAD = rand(4, T, T, seed=1), rand(4, seed=2)
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()


def plain(q, k, v):
    return ((q @ k.mT) * 0.25).masked_fill(~CAUSAL, -math.inf).softmax(-1) @ v


def biased(q, k, v):
    return ((q @ k.mT) * 0.25 + BIAS).softmax(-1) @ v


def per_head(q, k, v):
    return ((q @ k.mT) * 0.25 - PER_HEAD.view(4, 1, 1) * (torch.arange(T)[:, None] - torch.arange(T)).abs()).softmax(
        -1
    ) @ v


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
    """The program with `change(load, args)` for each load."""
    return rebuild(program, lambda old, args: change(old, args) if old.op == "load" else None)


# -- wrong rewrites: each takes a spec and gives a wrong one ---------------------------------------------------
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
    """Runs `fn` compiled under `verify`: what it gives is eager's, one warning names a script that shows the mismatch.
    Gives the site and the script."""
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
    """What the script prints; it must say that the two differ."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1
    return capsys.readouterr().out


@pytest.mark.parametrize(("fn", "wrong"), PLANTED, ids=lambda x: x.__name__)
def test_a_wrong_rewrite_is_caught_and_undone(fn, wrong, tmp_path, monkeypatch, capsys):
    original = pipeline.rewrite

    def planted(gm, match, *rest):
        match.spec = wrong(match.spec)
        return original(gm, match, *rest)

    monkeypatch.setattr(pipeline, "rewrite", planted)
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
    original = pipeline.rewrite

    def planted(gm, match, *rest):
        *rest, reductions = rest
        assert reductions
        wrong = [dataclasses.replace(r, spec=mask_shifted(no_scale(r.spec))) for r in reductions]
        return original(gm, match, *rest, wrong)

    monkeypatch.setattr(pipeline, "rewrite", planted)
    assert "mean: an error of" in shows(caught(with_sums, qkv(t=T), tmp_path)[1], capsys)


def test_a_wrong_row_program_is_caught(tmp_path, monkeypatch, capsys):
    original = regions._program

    def planted(*args):
        program, *rest = original(*args)
        calls = [
            dataclasses.replace(c, args=(c.args[0], 4, *c.args[2:])) if c.op.startswith("topk") else c
            for c in program.calls
        ]
        assert calls != list(program.calls)
        return dataclasses.replace(program, calls=tuple(calls)), *rest

    monkeypatch.setattr(regions, "_program", planted)
    shows(caught(best_keys, qkv(t=T), tmp_path, train=False)[1], capsys)


def test_the_script_runs_by_itself(tmp_path, monkeypatch):
    original = pipeline.rewrite

    def planted(gm, match, *rest):
        match.spec = no_scale(match.spec)
        return original(gm, match, *rest)

    monkeypatch.setattr(pipeline, "rewrite", planted)
    _, script = caught(plain, qkv(t=T), tmp_path)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and "an error of" in done.stdout, done.stderr


# -- right rewrites ---------------------------------------------------------------------------------------------
def passes(fn, operands, train=True, sites=1, **options):
    """Compiled under `verify`, every site is rewritten and says that it was verified; nothing warns. Gives the notes."""
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
    """Of the masks and factors that a program makes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


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
        if dtype == BF16:  # products refuse what is upcast for them
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
