"""Check that each GPU benchmark's hand-written code matches its reference and is recognized as attention.

The benchmarks' own code runs here on a CPU instead of a GPU, at sizes that suit Triton's interpreter.
"""

import importlib
import importlib.util
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import attnfx
from tests.support import rand

pytestmark = pytest.mark.slow

_path = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_programs.py"
_spec = importlib.util.spec_from_file_location("gpu_programs", _path)
assert _spec is not None and _spec.loader is not None
gpu_programs = importlib.util.module_from_spec(_spec)


@pytest.fixture(scope="module", autouse=True)
def programs():
    sys.modules["gpu_programs"] = gpu_programs  # dataclasses look it up there
    _spec.loader.exec_module(gpu_programs)
    yield
    del sys.modules["gpu_programs"]


NAMES = ["full", "causal", "window", "alibi", "soft cap", "documents", "padding", "t5 bias", "grouped 8:1", "decode"]


@pytest.mark.parametrize("name", NAMES)
def test_the_code_by_hand_is_the_reference_and_is_lifted(name, monkeypatch):
    monkeypatch.setattr(gpu_programs, "WINDOW", 50)
    every = {p.name: p for p in [*gpu_programs.PROGRAMS, gpu_programs.DECODE]}
    assert list(every) == NAMES
    program, heads, length = every[name], 8, 100
    x = program.make(2, heads, length)
    q = rand(2, heads, 1 if name == "decode" else length, 16)
    k, v = (rand(2, heads // program.groups, length, 16) for _ in range(2))
    rows = torch.tensor([0]) if name == "decode" else torch.tensor([0, 3, 77, 99])
    want = gpu_programs.reference(program, q, k, v, x, rows)
    torch.testing.assert_close(program.by_hand(q, k, v, x)[-1, -1, rows].double(), want, rtol=1e-5, atol=1e-5)
    report = attnfx.explain(lambda q, k, v: program.by_hand(q, k, v, x), rewrite="always")(q, k, v)
    assert [site.rewritten for site in report.sites] == [True], str(report)
    assert 0 < gpu_programs.live_share(program, x, length, q.device) <= 1


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(_path.parent))
    module = importlib.import_module("gpu")

    def contenders(program, x, q, k):
        options = {"rewrite": "always", "tiers": ["decode", "flash"], "inner": "eager"}
        return {
            "attnfx": partial(module.by_hand, program, x, "attnfx", options=options),
            "inductor": partial(module.by_hand, program, x, "eager"),
            "broken": partial(module.by_hand, program, x, "no such backend"),
        }

    def milliseconds(run):
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    for name, value in dict(
        DEVICE="cpu", TOKENS=64, WIDTH=128, FLUSH=1, contenders=contenders, milliseconds=milliseconds
    ).items():
        monkeypatch.setattr(module, name, value)
    yield module
    del sys.modules["gpu"]


@pytest.mark.parametrize("case", [("causal", 48, 16, True), ("documents", 48, 16, False), ("decode", 64, 16, False)])
def test_a_case_is_measured_checked_and_predicted(gpu, case):
    row = gpu.measure(gpu.Case(*case), 0.0, 1.0, 1.0)
    assert set(row["by"]) == {"attnfx", "inductor", "broken"} and "error" in row["by"]["broken"]
    for name in ("attnfx", "inductor"):
        by = row["by"][name]
        assert set(by["errors"]) == ({"out", "dq"} if case[3] else {"out"}) and max(by["errors"].values()) < 3e-2, by
        assert by["min_ms"] > 0 and by["rounds"] >= 5
    assert row["predicted"]["tier"] in row["predicted"]["ms"]
    assert row["ratios"]["attnfx"] == 1.0 and 0 < row["live"] <= 1
    assert "inductor" in gpu.line(row) and "failed" in gpu.line(row)
    assert gpu.choice([row])["cases"] <= 1


def test_the_cases_cover_every_program_length_and_width_the_most_telling_first(gpu):
    some = gpu.cases()
    assert len(some) == len(set(some))
    shapes = {(c.program, c.length, c.head_dim, c.train) for c in some}
    for name in gpu.EVERY:
        for length in (512, 1024, 2048, 4096, 8192, 16384):
            for way in (False, True):
                assert {(name, length, 64, way), (name, length, 128, way)} <= shapes
    assert some[0] == gpu.Case("full", 16384, 128, False)
    assert {c.program for c in some[:25]} == set(NAMES) and {c.train for c in some[:25]} == {False, True}


def test_the_choice_is_held_against_the_fastest_way(gpu):
    def row(tier, attnfx, inductor, flash):
        by = {"attnfx": {"min_ms": attnfx}, "inductor": {"min_ms": inductor}, "flex": {"error": "no"}}
        return {"by": by, "predicted": {"tier": tier, "ms": {"flash": flash, "kept": 9.0}}}

    found = gpu.choice([row("flash", 1.0, 2.0, 1.1), row("kept", 1.0, 2.0, 0.8), row("flash", 3.0, 2.0, 3.0)])
    assert found["cases"] == 3 and found["p95"] == 2.0 and found["over_original"] == 1.5
    assert found["mean"] == pytest.approx((1 + 2 + 1.5) / 3, abs=1e-4)
    assert found["error_mean"] == pytest.approx(0.1, abs=1e-4) and found["error_p95"] == 0.2
    assert gpu.choice([]) == {"cases": 0}


def test_a_case_that_takes_its_process_down_or_never_ends_loses_no_other(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(_path.parent))
    apart = importlib.import_module("apart")
    script = tmp_path / "jobs.py"
    script.write_text(
        f"import os, sys, time; sys.path.insert(0, {str(_path.parent)!r}); from apart import serve\n"
        "def answer(job):\n"
        "    print('a library says something')\n"
        "    return {'die': lambda: os._exit(3), 'hang': lambda: time.sleep(600)}.get(job, lambda: {'x': 1 / job})()\n"
        "asked = []\n"
        "def sound():\n"
        "    asked.append(0)\n"
        "    assert len(asked) < 3, 'a fault'\n"
        "serve(answer, sound)\n"
    )
    process = apart.Apart([sys.executable, str(script)], 20)
    told = [process.ask(job) for job in (1, 0, 2, 4, "die", 8)]
    assert [t.get("x") for t in told] == [1, None, 0.5, 0.25, None, 0.125]
    assert [t.get("error") for t in told] == [
        None, "ZeroDivisionError: division by zero", "AssertionError: a fault", None, "took the process down", None
    ]  # fmt: skip
    process.limit = 0.5
    assert process.ask("hang") == {"error": "took more than 0.5 s"}
    process.close()
    del sys.modules["apart"]
