"""Choose the fastest timed candidate, and reuse the cached answer only for the case that it was measured for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx import symbolic_trace

import attnfx
from attnfx.cost import Question, select
from attnfx.ir import algebra as A
from attnfx.options import Options
from attnfx.spec import AttentionSpec, I, J
from attnfx.tuning import timing
from attnfx.tuning import tune as tuning
from tests.support import check, compiled, new_reports, rand

CPU = torch.device("cpu")
CAUSAL = AttentionSpec(score=A.where(A.ge(I, J), A.mul(A.const(0.125), A.DOT), A.const(float("-inf"))))
OPTIONS = Options.make({"tune": True, "inner": "eager"})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))


def ask(T=512, dtype="float32", training=False, **dims):
    sizes = dict(B=1, H=8, G=8, T=T, S=T, D=64, Dv=64) | dims
    return Question(CAUSAL, sizes, dtype, training=training, refused={"flash": "no GPU", "decode": "no GPU"})


class Bench:
    """A counting build function and a counting timer with given answers."""

    def __init__(self, **times):
        self.times, self.built, self.timed = times, [], 0

    def build(self, candidate):
        self.built.append(candidate.tier)
        graph = symbolic_trace(lambda x: (x + 1,))
        next(iter(graph.graph.nodes)).meta["example_value"] = torch.empty(2)
        return graph

    def timer(self, runs, device):
        self.timed += 1
        for run in runs.values():
            run()
        return {name: self.times[name] for name in runs if name in self.times}

    def tune(self, question, options=OPTIONS):
        return tuning.tune(question, select(question, options), options, CPU, self.build, self.timer)


@pytest.mark.parametrize("fastest", ["kept", "library", "chunked"])
def test_the_fastest_measured_is_chosen_and_all_times_are_told(fastest):
    bench = Bench(**{"kept": 3.0, "library": 3.0, "chunked": 3.0, fastest: 1.25})
    decision = bench.tune(ask())
    assert decision.tier == fastest and decision.measured_ms == 1.25
    assert decision.code == ("slower" if fastest == "kept" else "")
    assert decision.reason.startswith(f"measured: {fastest} 1.25 ms, ")
    assert {c.tier: c.measured_ms for c in decision.alternatives if c.tier != "flex"} == {
        tier: 3.0 for tier in ("kept", "library", "chunked") if tier != fastest
    }


def test_always_never_takes_the_original_and_tiers_that_are_not_allowed_are_not_timed():
    bench = Bench(kept=1.0, library=2.0, chunked=3.0)
    assert bench.tune(ask(), Options.make({"tune": True, "inner": "eager", "rewrite": "always"})).tier == "library"
    only = Options.make({"tune": True, "inner": "eager", "tiers": ["chunked"]})
    bench.built.clear()
    assert bench.tune(ask(), only).tier == "kept" and sorted(bench.built) == ["chunked", "kept"]


def test_an_answer_is_kept_and_again_replaces_it():
    bench = Bench(kept=2.0, library=1.0, chunked=3.0)
    bench.tune(ask())
    bench.times["kept"] = 0.5
    assert bench.tune(ask()).tier == "library" and bench.timed == 1
    again = Options.make({"tune": "again", "inner": "eager"})
    assert bench.tune(ask(), again).tier == "kept" and bench.timed == 2
    assert bench.tune(ask()).tier == "kept" and bench.timed == 2


def test_lengths_of_one_class_share_an_answer():
    bench = Bench(kept=2.0, library=1.0, chunked=3.0)
    bench.tune(ask(T=512))
    assert bench.tune(ask(T=400)).tier == "library" and bench.timed == 1


@pytest.mark.parametrize(
    "other", [dict(T=513), dict(dtype="bfloat16"), dict(training=True), dict(H=4, G=4), dict(D=32), dict(B=2)]
)
def test_another_shape_dtype_or_direction_is_measured_for_itself(other):
    bench = Bench(kept=2.0, library=1.0, chunked=3.0)
    bench.tune(ask())
    bench.tune(ask(**other))
    assert bench.timed == 2


def test_other_versions_and_threads_are_measured_for_themselves(monkeypatch):
    bench = Bench(kept=2.0, library=1.0, chunked=3.0)
    bench.tune(ask())
    found = tuning.fingerprint(CPU)
    for changed in ({**found, "versions": {"torch": "0"}}, {**found, "threads": 99}, {**found, "device": "another"}):
        monkeypatch.setattr(tuning, "fingerprint", lambda _, changed=changed: changed)
        bench.tune(ask())
    assert bench.timed == 4


def test_known_answers_are_taken_and_nothing_is_timed():
    bench = Bench(kept=2.0, library=1.0, chunked=3.0)
    known = Options.make({"tune": "known", "inner": "eager"})
    assert bench.tune(ask(), known) == select(ask(), known) and bench.built == []
    bench.tune(ask())
    bench.built.clear()
    assert bench.tune(ask(), known).measured_ms == 1.0 and bench.built == []


@pytest.mark.parametrize("answer", [3, {}, {"kept": 1.0}, {"kept": "x", "library": 1.0}, {"kept": 1.0, "other": 1.0}])
def test_an_answer_that_makes_no_sense_is_measured_again(answer):
    bench = Bench(kept=2.0, library=1.0, chunked=3.0)
    bench.tune(ask())
    (key,) = tuning.ANSWERS.entries()
    tuning.ANSWERS.put(key, answer)
    assert bench.tune(ask()).tier == "library" and bench.timed == 2


def test_what_cannot_be_run_is_left_out_and_where_nothing_can_the_prediction_stands():
    bench = Bench(kept=2.0, chunked=1.0)
    assert bench.tune(ask()).tier == "chunked"
    bench = Bench(library=1.0)
    decision = bench.tune(ask(T=4096))
    assert decision.tier == select(ask(T=4096), OPTIONS).tier
    assert "not measured: fewer than two candidates could be timed" in decision.reason
    assert len(tuning.ANSWERS.entries()) == 1


def test_generators_are_left_as_they_were():
    before = torch.get_rng_state()
    Bench(kept=2.0, library=1.0, chunked=3.0).tune(ask())
    assert torch.equal(torch.get_rng_state(), before)


def causal(q, k, v):
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.125).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def padded(q, k, v, pad, bias):
    score = (q @ k.mT * 0.125 + bias).masked_fill(pad[:, None, None, :] == 0, float("-inf"))
    return torch.dropout(score.softmax(-1), 0.1, True) @ v


def in_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return (q @ k.mT * 0.125).softmax(-1) @ v


def masked(q, k, v, seen):
    return torch.where(seen, q @ k.mT * 0.125, float("-inf")).softmax(-1) @ v


def with_sums(q, k, v):
    weight = (q @ k.mT * 0.125).softmax(-1)
    return weight @ v, weight.mean(1)


QKV = [rand(2, 2, 24, 8) for _ in range(3)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fn, args",
    [
        (causal, QKV),
        (padded, [*QKV, torch.ones(2, 24, dtype=torch.int64), rand(2, 24, 24)]),
        (in_autocast, QKV),
        (masked, [*QKV, torch.ones(2, 1, 1, 24, dtype=torch.bool).expand(2, 1, 24, 24)]),
        (with_sums, QKV),
    ],
    ids=["causal", "padded", "autocast", "expanded", "sums"],
)
def test_every_candidate_of_a_real_site_computes_what_the_original_does(fn, args, dynamic, monkeypatch):
    """Run a site's extracted graphs in training, on the same random tensors."""
    found = {}

    def outputs(names, options, device, build, timer):
        torch.manual_seed(0)
        inputs = None
        for name, candidate in names.items():
            graph = build(candidate)
            inputs = tuning.made_up(graph) if inputs is None else inputs
            found[name] = graph(*inputs), [x.requires_grad for x in inputs]
        return {}

    monkeypatch.setattr(tuning, "measure", outputs)
    args = [x.detach().requires_grad_(x.is_floating_point()) for x in args]
    compiled(fn, dynamic=dynamic, tune=True, inner="eager")(*args)
    want, taught = found.pop("kept")
    assert sum(taught) == sum(x.requires_grad for x in args) and found
    assert len(want) == (2 if fn is with_sums else 1)
    for outs, _ in found.values():
        assert [(x.shape, x.dtype) for x in outs] == [(x.shape, x.dtype) for x in want]
        if fn is not padded:  # each candidate samples its own dropout
            torch.testing.assert_close(outs, want, atol=2e-2 if fn is in_autocast else 1e-5, rtol=1e-2)


def test_the_cut_original_holds_the_transposition_that_inductors_patterns_look_for(monkeypatch):
    cuts = []
    monkeypatch.setattr(tuning, "measure", lambda names, _, __, build, ___: cuts.append(build(names["kept"])) or {})
    compiled(causal, tune=True, inner="eager")(*QKV)
    assert "mT" in cuts[0].code


def test_a_tuned_function_is_right_in_training_and_its_report_has_the_times(capfd):
    (site,) = check(causal, *QKV, tune=True, inner="aot_eager")
    assert site.decision.measured_ms is not None and site.decision.reason.startswith("measured: ")
    assert "timing" not in capfd.readouterr().err, "a progress bar where no terminal is"


@pytest.mark.slow
def test_another_process_takes_the_answer_and_explaining_times_nothing(tmp_path):
    source = (
        "import attnfx, torch\n"
        "def causal(q, k, v):\n"
        "    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)\n"
        "    return (q @ k.mT * 0.125).masked_fill(hidden, float('-inf')).softmax(-1) @ v\n"
        "operands = [torch.randn(1, 2, 32, 8) for _ in range(3)]\n"
    )
    file = tmp_path / "explained.py"
    file.write_text(
        source + "torch.set_num_threads(1)\n"
        "print(attnfx.explain(causal, tune=True)(*operands).sites[0].decision.reason)\n"
    )
    environment = {"ATTNFX_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}

    def explained():
        run = subprocess.run([sys.executable, str(file)], check=True, capture_output=True, text=True, env=environment)
        return run.stdout

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        namespace: dict = {}
        exec(source, namespace)
        with new_reports() as filed:
            compiled(causal, tune=True, rewrite="cost", inner="eager")(*namespace["operands"])
    finally:
        torch.set_num_threads(threads)
    assert explained().strip() == filed[0].sites[0].decision.reason
    tuning.ANSWERS.clear()
    assert "measured" not in attnfx.explain(causal, tune=True)(*namespace["operands"]).sites[0].decision.reason
    assert tuning.ANSWERS.entries() == {}


def test_the_shortest_time_counts_and_what_raises_is_left_out():
    def fails():
        raise RuntimeError("no memory")

    calls = []
    found = timing.shortest({"a": lambda: calls.append(1), "b": fails}, CPU, seconds=0.0, least=2)
    assert list(found) == ["a"] and found["a"] >= 0 and len(calls) > 3


@pytest.mark.parametrize("terminal", [False, True])
def test_a_progress_bar_is_for_terminals(terminal, monkeypatch, capfd):
    from rich.console import Console

    monkeypatch.setattr(Console, "is_terminal", property(lambda self: terminal))
    assert list(timing.with_progress([1, 2], "timing candidates")) == [1, 2]
    said = capfd.readouterr()
    assert said.out == "" and ("timing candidates" in said.err) == terminal


def test_the_cache_holds_no_path_of_this_machine():
    Bench(kept=2.0, library=1.0, chunked=3.0).tune(ask())
    assert str(Path.home()) not in tuning.ANSWERS.path.read_text()
