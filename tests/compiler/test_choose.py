"""Decide for a device that is not present: `explain` decides for it, a compiled model runs on a present device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnfx
from attnfx import Options, Target
from attnfx.compiler import choose as deciding
from attnfx.kernels.flash import tier as flash_tier
from attnfx.report.records import Candidate
from attnfx.spec import AttentionSpec
from tests.support import compiled, new_reports, rand

ROOT = Path(__file__).resolve().parents[2]


def causal(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT * 0.125).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def plain(q, k, v):
    return (q @ k.mT * 0.125).softmax(-1) @ v


def capped(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return (torch.tanh(q @ k.mT * 0.125) * 20).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def site(target, length=512, queries=None, fn=causal, batch=1, width=64):
    torch._dynamo.reset()
    k = torch.randn(batch, 8, length, width, dtype=torch.bfloat16)
    q = k if queries is None else k[:, :, :queries]
    (found,) = attnfx.explain(fn, target=target)(q, k, k).sites
    return found


def test_explain_decides_for_the_gpu_that_is_named():
    found = site("H100 SXM", 2048, fn=capped)
    assert found.decision.tier == "flash" and found.decision.tile and found.decision.warps and found.decision.stages
    by_tier = {c.tier for c in (found.decision, *found.decision.alternatives)}
    assert by_tier == {"flash", "kept", "flex", "chunked"}
    assert all(c.predicted_ms > 0 for c in found.decision.alternatives)
    assert not any(note.startswith("decided for") for note in found.notes)  # explain runs nothing
    assert site("h100-sxm", 8192, queries=1, fn=plain).decision.tier == "decode"


@pytest.mark.parametrize("target", ["h100-sxm", "a100-80gb", "rtx4090", "b200"])
@pytest.mark.parametrize("fn", [plain, causal])
def test_pytorchs_fused_operator_is_a_candidate_where_it_computes_the_same(target, fn):
    found = site(target, 4096, fn=fn, batch=4, width=128)
    every = (found.decision, *found.decision.alternatives)
    (library,) = [c for c in every if c.tier == "library"]
    assert library.kernel == ("cudnn" if target in ("h100-sxm", "b200") else "flash-attention-2")
    assert (found.decision is library) == (library.predicted_ms <= min(c.predicted_ms for c in every))
    assert found.decision.tier == "library" or fn is causal
    assert not any(note.startswith("decided for") for note in found.notes)


@pytest.mark.parametrize("target", ["v100", "t4", "mi300x"])
def test_a_target_that_the_kernels_do_not_run_on_gets_none_of_them(target):
    decision = site(target).decision
    assert {c.tier for c in (decision, *decision.alternatives)} == {"kept", "chunked"}


@pytest.mark.slow
def test_a_model_compiled_for_another_device_runs_on_this_one():
    q, k, v = (rand(1, 2, 256, 16, seed=n) for n in range(3))
    with new_reports() as filed:
        got = compiled(causal, target="h100-sxm", rewrite="always")(q, k, v)
    torch.testing.assert_close(got, causal(q, k, v), rtol=1e-4, atol=1e-5)
    (found,) = filed[0].sites
    assert found.decision.tier == "flash" and "the present cpu device runs tier" in " ".join(found.notes)


def test_sums_of_dropped_weights_are_kept_in_blocks_for_any_target():
    def fn(q, k, v):
        w = torch.nn.functional.dropout((q @ k.mT * 0.25).softmax(-1), 0.5)
        return w @ v, w.mean(1)

    q, k, v = (rand(1, 2, 64, 16, seed=n) for n in range(3))
    with new_reports() as filed:
        compiled(fn, target="h100-sxm", rewrite="always")(q, k, v)
    (found,) = filed[0].sites
    assert found.decision.tier == "flash"
    assert "decided for h100-sxm; the present cpu device runs tier chunked instead" in found.notes


@pytest.mark.parametrize(("fn", "tier"), [(causal, "library"), (capped, "chunked")])
def test_a_graph_compiled_for_another_device_notes_the_tier_that_runs(fn, tier):
    q, k, v = (rand(1, 2, 64, 16, seed=n) for n in range(3))
    with new_reports() as filed:
        compiled(fn, target="h100-sxm", rewrite="always")(q, k, v)
    assert f"decided for h100-sxm; the present cpu device runs tier {tier} instead" in filed[0].sites[0].notes


def test_more_batches_than_a_launch_has_programs_for_run_in_blocks():
    some = [rand(1, 1, 2, 4).expand(70_000, 1, 2, 4) for _ in range(3)]

    def fn(q, k, v):
        return (q @ k.mT * 0.25).softmax(-1) @ v

    (found,) = attnfx.explain(fn, target="h100-sxm", rewrite="always")(*some).sites
    assert found.decision.tier == "chunked"
    assert "70000 batches" in str(flash_tier.beyond(*some[0].shape[:2]))
    out = torch.ops.attnfx.attention(*some, [], [], None, AttentionSpec().to_json(), "decode,flash,chunked")[0]
    assert out.shape == (70_000, 1, 2, 4)


def test_a_device_that_is_known_by_its_architecture_alone_is_said_to_be(monkeypatch):
    guessed = replace(Target.by_name("rtx4090"), note="it has no record")
    monkeypatch.setattr(deciding, "target_of", lambda options, device: guessed)
    assert "it has no record" in site("auto").notes


def test_what_the_device_at_hand_cannot_run_is_followed_by_what_it_can():
    chosen = Candidate("flash", "triton", tile=(128, 64), warps=8, stages=3)
    here = {"flash": "no GPU", "decode": "no GPU"}
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert deciding.tiers_of(chosen, here, cpu) == ["flash:128x64/8/3", "library", "chunked"]
    assert deciding.tiers_of(chosen, {}, gpu) == ["flash:128x64/8/3", "chunked"]
    assert deciding.tiers_of(Candidate("chunked", "blocks"), {}, cpu) == ["chunked"]


def test_auto_is_the_device_at_hand():
    assert deciding.target_of(Options(), torch.device("cpu")) is None
    given = Options(target=Target.by_name("l4"))
    assert deciding.target_of(given, torch.device("cpu")) == Target.by_name("l4")
