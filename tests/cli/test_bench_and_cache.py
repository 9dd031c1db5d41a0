"""Check the output, the stored corrections and the errors of `attnfx bench` and `attnfx cache`."""

import json

import pytest
import torch
from click.testing import CliRunner

from attnfx import cache
from attnfx.cli import bench, main
from attnfx.tuning import calibrate as calibration


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """Benchmark two tiny sites without code generation."""
    monkeypatch.setenv("ATTNFX_INNER", "eager")
    sites = [bench.Site("causal", 1, 2, 16, 8, "float32", False), bench.Site("softcap", 1, 2, 16, 8, "float32", True)]
    monkeypatch.setattr(bench, "standard", lambda device, many: sites)
    monkeypatch.setattr(bench.timing, "undisturbed", lambda device: True)


@pytest.fixture
def steady(small, monkeypatch):
    """Run each candidate, but report the same time for all, even on a busy machine."""

    def shortest(contenders, device):
        for run in contenders.values():
            run()
        return dict.fromkeys(contenders, 0.05)

    monkeypatch.setattr("attnfx.tuning.timing.shortest", shortest)


def said(*arguments, code=0):
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_bench_gives_every_tier_its_measured_and_predicted_time(small):
    first, second = json.loads(said("bench", "--device", "cpu", "--json"))["sites"]
    assert first["site"] == "causal, 1 x 2 x 16 x 8, float32, forward"
    assert {c["tier"] for c in first["candidates"]} == {"kept", "library", "chunked", "flex"}
    assert {c["tier"] for c in second["candidates"]} == {"kept", "chunked"}  # library operators lack a soft cap
    assert all(c["measured_ms"] > 0 and c["predicted_ms"] > 0 for c in first["candidates"] + second["candidates"])
    assert first["fastest"] == min(first["candidates"], key=lambda c: c["measured_ms"])["tier"]
    assert calibration.CORRECTIONS.entries() == {}


def test_bench_prints_a_table(small):
    text = said("bench", "--device", "cpu")
    assert "library" in text and "softcap" in text and "corrections" not in text


def test_calibrating_keeps_a_factor_for_each_tier_and_direction(steady):
    found = json.loads(said("bench", "--device", "cpu", "--calibrate", "--json"))
    names = {"kept/forward", "library/forward", "chunked/forward", "flex/forward", "kept/training", "chunked/training"}
    assert set(found["corrections"]) == names
    assert calibration.CORRECTIONS.entries() != {}
    assert "corrections" in said("bench", "--device", "cpu", "--calibrate")


def test_a_busy_processor_s_times_correct_nothing(small, monkeypatch):
    calibration.store(torch.device("cpu"), {"kept/forward": 2.0})
    monkeypatch.setattr(bench.timing, "undisturbed", lambda device: False)
    text = said("bench", "--device", "cpu", "--calibrate", code=1)
    assert "is left out, because other programs kept the processor busy" in text
    assert "no site was timed, so the previous corrections are kept" in text
    assert calibration.corrections(torch.device("cpu")) == {"kept/forward": 2.0}


def test_calibrating_starts_no_site_that_would_end_too_late():
    sites = bench.standard(torch.device("cpu"), True)
    now = iter([0, *range(0, 1000, 10)])  # each site takes ten seconds
    assert list(bench.in_time(sites, 45, lambda: next(now))) == sites[:4]
    assert {s.training for s in sites[:2]} == {s.training for s in bench.in_time(sites, 0)} == {False, True}


def test_calibrating_leaves_a_damaged_or_missing_cache_behind(steady, own_cache, monkeypatch):
    (own_cache / "calibration.json").write_text("{")
    with pytest.warns(RuntimeWarning, match="cannot be read and is rebuilt"):
        said("bench", "--device", "cpu", "--calibrate")
    assert "kept/forward" in calibration.corrections(torch.device("cpu"))
    (own_cache / "file").touch()
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(own_cache / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        said("bench", "--device", "cpu", "--calibrate")
    assert "kept/forward" in calibration.corrections(torch.device("cpu"))


def test_calibrating_twice_corrects_the_model_and_not_its_corrections(small, monkeypatch):
    monkeypatch.setattr(bench.timing, "shortest", lambda runs, device: dict.fromkeys(runs, 1.0))
    first, second = (json.loads(said("bench", "--device", "cpu", "--calibrate", "--json")) for _ in range(2))
    assert first["corrections"] == second["corrections"]


def test_the_standard_sites_cover_every_program_and_direction():
    for device in ("cpu", "cuda"):
        sites = bench.standard(torch.device(device), True)
        assert len(sites) >= 12 and {s.program for s in sites} == set(bench.PROGRAMS)
        assert {s.training for s in sites} == {True, False}


@pytest.mark.parametrize("device", ["tpu", "gpu0", "meta"])
def test_a_device_that_is_none_is_refused_in_a_sentence(device):
    assert f"'{device}' is not a supported device; give cpu or cuda" in said("bench", "--device", device, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_cuda_device_that_is_not_there_is_refused():
    assert "this machine has no CUDA device" in said("bench", "--device", "cuda", code=2)


def test_the_cache_is_listed_and_cleared(own_cache):
    assert said("cache", "path").strip() == str(own_cache)
    cache.JsonCache("tuning").put("a", {"kept": 1.0})
    cache.JsonCache("calibration").put("b", {})
    (own_cache / "triton").mkdir()
    (own_cache / "triton" / "made.py").touch()
    assert "tuning.json" in said("cache", "list")
    assert json.loads(said("cache", "list", "--json")) == {"tuning": {"a": {"kept": 1.0}}, "calibration": {"b": {}}}
    assert said("cache", "clear", "tuning") == "tuning: 1 removed\n"
    assert cache.JsonCache("calibration").get("b") == {}
    assert said("cache", "clear") == "tuning: 0 removed\ncalibration: 1 removed\ntriton: 1 removed\n"
    assert not (own_cache / "triton").exists()


def test_a_name_that_is_not_kept_is_refused():
    assert "tunning" in said("cache", "clear", "tunning", code=2)


def test_commands_are_listed_without_importing_them():
    text = said("--help")
    assert "bench" in text and "cache" in text
