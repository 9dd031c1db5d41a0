"""Compare the choices of the CPU's cost rule with stored measurements (benchmarks/results/grid.json)."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from attnfx.cost import cpu

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("grid_points", "grid_fit")


@pytest.fixture(scope="module")
def benchmark():
    """Import a script of benchmarks/ by name, for this module's tests alone."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def fits(benchmark):
    return benchmark("grid_fit")


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


def test_every_point_of_the_grid_is_measured(benchmark, points):
    grid = benchmark("grid_points")
    of = {"grid.json": grid.points, "grid_held_out.json": grid.held_out, "grid_decode.json": grid.decode_points}
    for name, wanted in of.items():
        assert {grid.key_of(p) for p in stored(name)} == {grid.key_of(vars(p)) for p in wanted()}, name
    assert not {grid.key_of(p) for p in points} & {grid.key_of(p) for p in stored("grid_held_out.json")}


@pytest.mark.parametrize("name", ["grid.json", "grid_held_out.json"])
def test_the_chosen_is_near_the_best_and_never_much_slower_than_the_original(fits, name):
    found = fits.regret(stored(name))
    assert found["mean"] <= 1.08 and found["p95"] <= 1.25
    assert found["over_original"] <= 1.05


def test_the_rates_are_those_that_the_fit_gives(fits, points):
    """If the model counts work in another way, its rates must be fitted again."""
    for train, table in ((False, cpu.FORWARD), (True, cpu.TRAINING)):
        for way, rates in fits.fit(points, train).items():
            assert vars(table[way]) == pytest.approx(vars(rates), rel=0.05, abs=1e-3), (way, train)


def test_decode_steps_take_nearly_the_best_way(fits):
    found = fits.regret(stored("grid_decode.json"))
    assert found["points"] >= 60
    assert found["mean"] <= 1.05 and found["p95"] <= 1.25 and found["worst"] <= 1.6


def test_the_rates_of_decode_steps_are_those_that_the_fit_gives(fits):
    for way, rates in fits.fit_decoding(stored("grid_decode.json")).items():
        assert vars(cpu.DECODING[way]) == pytest.approx(vars(rates), rel=0.05, abs=1e-3), way


def test_the_fit_finds_rates_that_made_the_times(fits):
    rows = [[1.0, n, 0.0] for n in range(1, 9)]
    times = [3.0 + 0.5 * n for n in range(1, 9)]
    found = fits.not_negative([[x / t for x in row] for row, t in zip(rows, times)])
    assert found == pytest.approx([3.0, 0.5, 0.0], rel=0.02)
