"""Compile the calls of flex_attention for GPUs that are not present, from the graph that attnfx hands on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# bytes of shared memory of a program: CUDA programming guide
SHARED = {80: 163 << 10, 90: 227 << 10}
PROGRAMS = {"unmasked", "capped", "alibi", "documents", "dense", "ragged", "grouped", "decode"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="ahead.py assumes a device in Inductor 2.13")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_functions_of_a_call_compile_in_triton_for_an_absent_gpu(capability):
    """Scores and masks with tensors, block masks that the graph computes, and single queries; forward alone."""
    script = Path(__file__).with_name("ahead.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script), str(capability)], env=env, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found, flash = json.loads(run.stdout.splitlines()[-1])
    assert {row["name"] for row in found} == PROGRAMS
    for row in found:
        assert row["shared"] <= SHARED[capability], row
        wide = capability == 90 and row["name"] != "decode"
        assert row["matrix"] == ["wgmma.mma_async" if wide else "mma.sync"], row
    # Inductor writes the same functions for FlashAttention-4; a call without a mask gets none, which 10.x requires
    masked = ["_flash_attn_fwd(", "def score_mod(", "def mask_mod(", "block_size=(128, 128)"]
    assert set(flash) == (PROGRAMS if capability == 90 else set())
    plain = ("unmasked", "dense")  # dense: rows without a live key average the values, so the score holds the mask
    assert all(given == (masked[:2] if name in plain else masked) for name, given in flash.items()), flash
