"""What the GPU benchmark compares: the model's own code and the reference are one function, and it is lifted."""

import importlib.util
from pathlib import Path

import pytest
import torch

import attnfx
from tests.support import rand

_path = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_programs.py"
_spec = importlib.util.spec_from_file_location("gpu_programs", _path)
assert _spec is not None and _spec.loader is not None
gpu_programs = importlib.util.module_from_spec(_spec)


@pytest.fixture(scope="module", autouse=True)
def programs():
    import sys

    sys.modules["gpu_programs"] = gpu_programs  # dataclasses look there
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
