"""Keep device records complete, with sources, find them by any spelling of a name, and detect the present devices."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch

from attnfx import OptionError, Options, Target
from attnfx.targets import detect, detection
from attnfx.targets import measure_cpu as cpu
from attnfx.targets.target import FOLDER, RANGES

WANTED = (
    "v100 t4 a10 a100-40gb a100-80gb l4 l40s rtx3090 rtx4090 rtx5090 h100-pcie h100-sxm h200 b200 mi300x"
).split()  # fmt: skip
OWN = json.loads((FOLDER / "l4.json").read_text())


def own(**changes):
    """Return the text of a user's record; a change to None drops the field."""
    return json.dumps({name: value for name, value in (OWN | changes).items() if value is not None})


@pytest.mark.parametrize("name", Target.names())
def test_a_record_has_a_source_for_every_number(name):
    target = Target.by_name(name)
    assert sorted(target.sources) == sorted(RANGES)
    assert all(len(text) > 5 for text in target.sources.values())
    assert target.sources["launch"].startswith("estimate: ")


@pytest.mark.parametrize("name", Target.names())
def test_a_record_s_numbers_agree_with_each_other(name):
    """A typo in one value contradicts the others: operations per multiprocessor and clock are a power of two."""
    target = Target.by_name(name)
    clocks = target.multiprocessors * target.clock / 1e3
    per_clock = target.rate("float16") / clocks
    nearest = min((512, 1024, 2048, 4096, 8192), key=lambda n: abs(n - per_clock))
    assert per_clock == pytest.approx(nearest, rel=0.03)
    lanes = target.fp32 / clocks / 2
    assert lanes == pytest.approx(64 if target.capability in (70, 75, 80) else 128, rel=0.16)
    assert target.exponentials / clocks / 1e3 == pytest.approx(16, rel=0.01)
    assert target.matrix.get("tf32", 0) <= 0.51 * target.rate("float16")


def test_the_devices_that_people_ask_for_are_there():
    assert set(WANTED) <= set(Target.names())


@pytest.mark.parametrize(
    ("said", "name"),
    [("H100 SXM", "h100-sxm"), ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("RTX_4090", "rtx4090"), ("a100", "a100-40gb"),
     ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("Tesla V100-SXM2-16GB", "v100"),
     ("AMD Instinct MI300X", "mi300x"), ("NVIDIA H100 PCIe", "h100-pcie")],
)  # fmt: skip
def test_a_name_is_found_however_it_is_written(said, name):
    assert Target.by_name(said).name == name


def test_an_unknown_name_lists_the_nearest_and_all():
    says = r"unknown target 'rtx 4080'; did you mean 'rtx4090'\? Valid targets: a10, .*mi300x"
    with pytest.raises(OptionError, match=says):
        Target.by_name("rtx 4080")


def test_a_file_and_its_text_give_the_same_target(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(own(name="mine", sources=None))
    target = Target.from_json(file)
    assert target == Target.from_json(file.read_text()) and target.name == "mine" and target.sources == {}
    assert hash(target) == hash(pickle.loads(pickle.dumps(target)))
    assert (target.cudnn, target.flash_attention) == (92000, "FA2")
    named = Target.from_json(own(cudnn=93100, flash_attention="FA3"))
    assert (named.cudnn, named.flash_attention) == (93100, "FA3")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (own(bandwidth=None), "the field 'bandwidth' of the target is missing"),
        (own(bandwith=3), "unknown field 'bandwith' of a target; did you mean 'bandwidth'?"),
        (own(bandwidth="300 GB/s"), "field 'bandwidth' is '300 GB/s', expected a number from 0.1 to 100,000 (GB/s)"),
        (own(clock=2040), "field 'clock' is 2040, expected a number from 0.05 to 20 (GHz)"),
        (own(memory=24), "field 'memory' is 24, expected a whole number from 134,217,728"),
        (own(warps=True), "field 'warps' is True"),
        (own(l2=float("nan")), "field 'l2' is nan"),
        (own(multiprocessors=58.5), "field 'multiprocessors' is 58.5, expected a whole number"),
        (own(matrix={"float16": -1, "float32": 1}), "field 'matrix' is -1"),
        (own(matrix={"fp16": 1, "float32": 1}), "field 'matrix' is 'fp16', expected dtypes among"),
        (own(matrix={"float16": 1}), "expected a rate for 'float32' at least"),
        (own(kind="gpu"), "field 'kind' is 'gpu', expected one of 'cuda', 'hip', 'cpu'"),
        (own(cudnn="9.20"), "field 'cudnn' is '9.20', expected a version as a whole number, such as 92000"),
        (own(flash_attention="fa3"), "field 'flash_attention' is 'fa3', expected one of 'FA2', 'FA3', 'FA4'"),
        ("{", "is not valid JSON"),
        ("[]", "cannot be read"),
        ("missing.json", "'missing.json' cannot be read"),
    ],
)
def test_a_bad_record_is_refused_with_the_field_s_name(text, sentence):
    with pytest.raises(OptionError) as caught:
        Target.from_json(text)
    assert sentence in str(caught.value)


def test_the_option_takes_a_name_a_path_and_a_target(tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    file.write_text(own(name="mine"))
    assert Options.make({"target": "H100 SXM"}).target == Target.by_name("h100-sxm")
    assert Options.make({"target": str(file)}).target == Options.make({"target": file}).target == Target.from_json(file)
    options = Options.make({"target": Target.by_name("l4")})
    assert hash(options) == hash(Options.make({"target": "L4"})) and options == Options.make({"target": "L4"})
    monkeypatch.setenv("ATTNFX_TARGET", "rtx 4090")
    assert Options.make().target == Target.by_name("rtx4090")
    monkeypatch.setenv("ATTNFX_TARGET", "rtx 4091")
    with pytest.raises(OptionError, match="ATTNFX_TARGET: unknown target 'rtx 4091'; did you mean 'rtx4090'"):
        Options.make()


def properties(name, **fields):
    """Create properties in the form of `torch.cuda.get_device_properties`."""
    usual = dict(major=8, minor=9, total_memory=24 << 30, multi_processor_count=128, L2_cache_size=72 << 20,
                 shared_memory_per_multiprocessor=100 << 10, regs_per_multiprocessor=65536, warp_size=32,
                 max_threads_per_multi_processor=1536)  # fmt: skip
    return SimpleNamespace(name=name, **(usual | fields))


def test_a_present_gpu_with_a_record_gets_it_with_its_own_memory():
    found = detection.of_properties(properties("NVIDIA GeForce RTX 4090", total_memory=23 << 30))
    assert found.matrix == Target.by_name("rtx4090").matrix and found.memory == 23 << 30 and not found.note


def test_an_unknown_gpu_falls_back_to_its_architecture_and_says_so():
    found = detection.of_properties(
        properties("NVIDIA GeForce RTX 4070", multi_processor_count=46, clock_rate=2475e3, memory_clock_rate=10501e3,
                   memory_bus_width=192)
    )  # fmt: skip
    assert found.note == (
        "NVIDIA GeForce RTX 4070 has no record, so its rates are those of rtx4090, scaled by multiprocessors and clock"
    )
    assert found.rate("bfloat16") == pytest.approx(165.2 * 46 / 128 * 2.475 / 2.52)
    assert found.bandwidth == pytest.approx(504, rel=0.01)
    assert found.sources["matrix"].startswith("estimate: rtx4090's")


def test_a_slice_of_a_gpu_is_not_taken_for_the_whole():
    found = detection.of_properties(properties("NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=16))
    assert found.multiprocessors == 16 and found.rate("bfloat16") == pytest.approx(989.4 * 16 / 132)


def test_a_cpu_is_measured_once(monkeypatch, tmp_path):
    calls = []
    real = cpu.measure
    monkeypatch.setattr(cpu, "_measured", {})
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu, "measure", lambda name: calls.append(name) or real(name))
    first = detect("cpu")
    assert first.kind == "cpu" and first is detect(torch.device("cpu")) and len(calls) == 1
    assert sorted(first.sources) == sorted(RANGES)
    monkeypatch.setattr(cpu, "_measured", {})  # as in another process
    assert detect("cpu") == first and len(calls) == 1
    (tmp_path / "targets.json").write_text((tmp_path / "targets.json").read_text().replace('"cpu"', '"toaster"'))
    monkeypatch.setattr(cpu, "_measured", {})
    assert detect("cpu").kind == "cpu" and len(calls) == 2


@pytest.mark.parametrize("device", ["meta", "gpu"])
def test_what_is_no_gpu_and_no_cpu_is_refused(device):
    with pytest.raises(OptionError, match=device):
        detect(device)
