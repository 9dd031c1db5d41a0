"""Compare the choices of the CPU's cost rule with stored measurements (benchmarks/results/grid.json)."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from attnfx.cost import cpu

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def grid():
    spec = importlib.util.spec_from_file_location("grid", BENCHMARKS / "grid.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["grid"] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["grid"]


def stored(name):
    return json.loads((BENCHMARKS / "results" / name).read_text())["points"]


@pytest.fixture(scope="module")
def points():
    return stored("grid.json")


def test_the_grid_covers_what_the_rule_is_asked(points):
    assert len(points) >= 60
    assert len({p["program"] for p in points}) >= 10
    assert {p["dtype"] for p in points} == {"float32", "bfloat16"} and {p["train"] for p in points} == {True, False}
    assert min(p["T"] for p in points) == 1 and max(p["T"] for p in points) == 4096


def test_every_point_of_the_grid_is_measured(grid, points):
    of = {"grid.json": grid.points, "grid_held_out.json": grid.held_out}
    for name, wanted in of.items():
        assert {grid.key_of(p) for p in stored(name)} == {grid.key_of(vars(p)) for p in wanted()}, name
    assert not {grid.key_of(p) for p in points} & {grid.key_of(p) for p in stored("grid_held_out.json")}


@pytest.mark.parametrize("name", ["grid.json", "grid_held_out.json"])
def test_the_chosen_is_near_the_best_and_never_much_slower_than_the_original(grid, name):
    found = grid.regret(stored(name))
    assert found["mean"] <= 1.08 and found["p95"] <= 1.25
    assert found["over_original"] <= 1.05


def test_the_rates_are_those_that_the_fit_gives(grid, points):
    """If the model counts work in another way, its rates must be fitted again."""
    for train, table in ((False, cpu.FORWARD), (True, cpu.TRAINING)):
        for way, rates in grid.fit(points, train).items():
            assert vars(table[way]) == pytest.approx(vars(rates), rel=0.05, abs=1e-3), (way, train)


def test_the_fit_finds_rates_that_made_the_times(grid):
    rows = [[1.0, n, 0.0] for n in range(1, 9)]
    times = [3.0 + 0.5 * n for n in range(1, 9)]
    found = grid.not_negative([[x / t for x in row] for row, t in zip(rows, times)])
    assert found == pytest.approx([3.0, 0.5, 0.0], rel=0.02)
