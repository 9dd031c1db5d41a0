"""Compile for GPUs that are not present, and check the machine code's matrix instructions, memory and spills."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

# most bytes of shared memory per block: CUDA programming guide, technical specifications by compute capability
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX = {80: {"mma.sync"}, 86: {"mma.sync"}, 90: {"wgmma.mma_async", "mma.sync"}, 100: {"tcgen05.mma", "mma.sync"}}


def compiled(*arguments):
    """Return the output of ahead.py for a compute capability and head dims, or for "lengths"."""
    script = Path(__file__).with_name("ahead.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script), *arguments], env=env, cwd="/", text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


OLDER = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
# by (kernel, capability, head dim)
SPILLED_BY_OLDER = {("backward keys masked", 100, 64): 1}


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_every_kernel_uses_matrix_instructions_fits_and_spills_nothing_in_its_steady_loop(capability):
    """One test checks all three, because another process would compile the same kernels again."""
    known = SPILLED_BY_OLDER if OLDER else {}
    for row in compiled(str(capability), "64,128,256"):
        assert row["matrix"] and set(row["matrix"]) <= MATRIX[capability], row
        if row["name"].startswith("forward"):
            assert MATRIX[capability] - {"mma.sync"} <= set(row["matrix"]), row
        assert row["shared"] <= SHARED[capability], row
        if capability == 86:  # its small tiles only have to fit
            continue
        assert row["spills"] <= known.get((row["name"], capability, row["head_dim"]), 0), row
        if row["name"].startswith(("forward", "backward keys", "backward rows")):
            assert row["loops"] >= 2, row  # masked tiles have their own loop


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_that_read_a_value_for_each_score_compile_and_do_not_spill(capability):
    found = {row["name"]: row for row in compiled(str(capability), "loads")}
    assert len(found) == 17
    for name, row in found.items():
        assert row["shared"] <= SHARED[capability], row
        if name.startswith(("forward", "backward", "decode")):
            assert row["matrix"] and row["loops"] >= (1 if name.startswith("decode") else 2), row
            assert row["spills"] == 0, row


# Spills by (kernel, capability, head dim): addresses, recomputed or reloaded for every tile. Tiles without spills need
# more instructions per kflop: on sm_80 at 128 1.20 instead of 1.07; on sm_90 at 256 0.72 instead of 0.57 (keys,
# causal), 0.75 instead of 0.66 (keys, padding) and 0.93 instead of 0.66 (forward, by distance).
MASKED = {
    ("forward causal", 80, 128): 2, ("forward padding", 80, 128): 4,
    ("forward padding", 80, 256): 1, ("forward relative", 80, 256): 2,
    ("backward rows relative", 90, 128): 3, ("backward keys causal", 90, 256): 1,
    ("backward keys padding", 90, 256): 24, ("forward relative", 90, 256): 35,
}  # fmt: skip
MASKED_BY_OLDER = {  # Triton before 3.7
    ("forward causal", 80, 128): 4, ("forward padding", 80, 128): 6,
    ("forward causal", 80, 256): 8, ("forward padding", 80, 256): 5, ("forward relative", 80, 256): 22,
    ("backward keys padding", 80, 256): 8,
    ("backward keys padding", 90, 128): 4, ("backward keys alibi", 90, 128): 20, ("backward rows relative", 90, 128): 3,
    ("backward keys padding", 90, 256): 26, ("forward relative", 90, 256): 35,
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("capability", [80, 90])
def test_masks_and_biases_leave_the_steady_loop_without_spills(capability, head_dim):
    found = {row["name"]: row for row in compiled(str(capability), f"masks {head_dim}")}
    assert len(found) == (15 if head_dim == 128 else 9)
    known = MASKED_BY_OLDER if OLDER else MASKED
    for name, row in found.items():
        assert row["matrix"] and row["loops"] >= 2 and row["shared"] <= SHARED[capability], row
        assert row["spills"] <= known.get((name, capability, head_dim), 0), row


def test_kernels_compile_for_an_amd_gpu():
    """A work group has 64 KiB of shared memory (AMD, CDNA 3 instruction set architecture, section 2.3)."""
    for row in compiled("gfx942"):
        assert row["matrix"] and row["shared"] <= 64 << 10 and row["spills"] == 0, row


def test_a_new_length_compiles_nothing():
    assert compiled("lengths") == [1, 1, 1, 1]
