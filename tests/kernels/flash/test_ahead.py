"""Machine code for GPUs that are not there: it compiles, uses the matrix unit, fits, and spills nothing that counts."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

# bytes of shared memory that a block may use: CUDA programming guide, technical specifications by compute capability
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX = {80: {"mma.sync"}, 86: {"mma.sync"}, 90: {"wgmma.mma_async", "mma.sync"}, 100: {"tcgen05.mma", "mma.sync"}}


@lru_cache
def compiled(*arguments):
    """What ahead.py prints: for a compute capability and head dims, or for "lengths"."""
    script = Path(__file__).with_name("ahead.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script), *arguments], env=env, cwd="/", text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_every_kernel_compiles_to_matrix_instructions_and_fits(capability):
    for row in compiled(str(capability), "64,128,256"):
        assert row["matrix"] and set(row["matrix"]) <= MATRIX[capability], row
        if row["name"].startswith("forward"):
            assert MATRIX[capability] - {"mma.sync"} <= set(row["matrix"]), row
        assert row["shared"] <= SHARED[capability], row


@pytest.mark.parametrize("capability", [80, 90])
def test_the_steady_loop_does_not_spill(capability):
    allowed = {"backward keys plain": 45}
    for row in compiled(str(capability), "64,128,256"):
        if row["head_dim"] <= 128:
            assert row["spills"] <= allowed.get(row["name"], 0), row


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_that_walk_over_lists_of_tiles_compile_and_do_not_spill(capability):
    """In the steady loop; on sm_80 a few values: the same mask without lists spills up to 11 there. A whole matrix of
    floats that is added takes a pointer for each score of a tile, with which these kernels spill without lists as well:
    34 values in sm_80's forward kernel, 1727 in its pass over keys, 39 in sm_90's pass over rows."""
    some = {80: 6} | {(80, "forward added"): 34, (80, "backward keys added"): 200, (90, "backward rows added"): 64}
    some |= {(90, "forward kept"): 2, (90, "forward added"): 4}
    found = {row["name"]: row for row in compiled(str(capability), "0")}
    assert len(found) == 14
    for name, row in found.items():
        assert row["shared"] <= SHARED[capability], row
        if name.startswith(("forward", "backward", "decode")):
            assert row["matrix"] and row["loops"] >= (1 if name.startswith("decode") else 2), row
            assert row["spills"] <= some.get((capability, name), some.get(capability, 0)), row


def test_a_new_length_compiles_nothing():
    assert compiled("lengths") == [1, 1, 1, 1]
