"""Run the benchmark of plans on a CPU instead of a GPU, and check its evaluation of the results."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu_plan(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("gpu_plan")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    yield module
    for name in ("gpu_plan", "plan", "models", "peak"):
        sys.modules.pop(name, None)


def test_a_step_is_planned_and_run(gpu_plan, monkeypatch):
    plan = gpu_plan.planned("bert", 1, 32, 2, True, "1GiB")
    assert plan.peak_bytes > 0 and plan.max_batch > 2
    seen = []
    monkeypatch.setattr(torch, "compile", lambda module, **how: seen.append(how) or module)
    step, whole = gpu_plan.step_of("bert", 1, 32, 2, True, "1GiB")
    step()
    assert all(p.grad is not None for n, p in whole.named_parameters() if "pooler" not in n)
    assert seen[0]["backend"] == "attnfx" and seen[0]["options"] == {"memory_budget": "1GiB"}


def test_a_limit_is_true_where_it_runs_and_a_tenth_more_does_not(gpu_plan, monkeypatch):
    asked = []

    def run(job, *arguments):
        asked.append((job, arguments[3]))
        if job == "peak":
            return {"predicted": 104, "measured": 100, "error": 0.04}
        return {"max_batch": 11} if job == "largest" else {"fits": arguments[3] <= 12}

    monkeypatch.setattr(gpu_plan, "run", run)
    row = gpu_plan.measure(gpu_plan.STEPS[0], True, "4GiB")
    assert asked == [("peak", 4), ("largest", 4), ("fits", 11), ("fits", 13)]
    assert row["fits"] and not row["more_fits"] and row["train"]
    found = gpu_plan.summary([row, row | {"error": -0.06, "more_fits": True}, {"failed": "no"}])
    assert found == {"steps": 2, "limits": 2, "mean": 0.05, "worst": 0.06, "limits_true": 1}


def test_a_job_that_fails_says_why(gpu_plan, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "peak: Error: no GPU" in gpu_plan.run("peak", "bert", 1, 32, 2, True)["failed"]
    monkeypatch.setattr(gpu_plan, "LIMIT", 0.01)
    assert gpu_plan.run("peak", "bert", 1, 32, 2, True) == {"failed": "peak took more than 0.01 s"}
