"""Machine code of the flash kernels for GPUs that need not be there: registers, spills, instructions per kflop.

    python benchmarks/sass.py --probe PATH/TO/sass_probe.py [--only REGEX] [--out benchmarks/results/sass.json]

The program is the plain one: bf16, a constant scale, no mask. The probe's own help says what the fields mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path

import torch

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash import launch, split, tiles
from attnfx.kernels.flash.gradients import Backward
from attnfx.spec import AttentionSpec

ARCHITECTURES, HEAD_DIMS = (80, 90, 100), (64, 128, 256)
# instructions per kflop of the best open Triton kernel, for the same program
GOALS = {
    "forward-90-64": 0.996, "forward-90-128": 0.475, "forward-80-128": 1.07,
    "backward-90-64": 0.57, "backward-90-128": 0.36,
}  # fmt: skip


def plain(head_dim: int, queries: int = 4096) -> Call:
    x = torch.empty(2, 8, 4096, head_dim, dtype=torch.bfloat16, device="meta")
    q = x[:, :, :queries]
    score = A.mul(A.const(head_dim**-0.5), A.DOT)
    return Call(AttentionSpec(score=score, out_dtype="bfloat16"), q, x, x, (), (), None)


def launches(head_dim: int, capability: int, tile: tiles.Tile | None = None) -> dict[str, tuple]:
    """For each kernel, what to compile and the multiply-adds of one step."""
    call = plain(head_dim)
    logsumexp = torch.empty(call.query.shape[:3], device="meta")
    at = tile or tiles.pick(tiles.FORWARD, capability, head_dim)
    found = {
        "forward": (
            launch.forward_launch(call, call.query, logsumexp, at, capability),
            2 * at.rows * at.keys * head_dim,
        )
    }
    pair = (tile, tile) if tile else tiles.pick(tiles.BACKWARD, capability, head_dim)
    run = Backward(call, call.query, call.query, logsumexp, pair, capability)
    keys, rows = (t.rows * t.keys * head_dim for t in pair)
    found["backward"] = (run.keys_launch(call.key, call.value), 4 * keys)
    found["backward-rows"] = (run.rows_launch(call.query), 3 * rows)
    one = plain(head_dim, queries=1)
    out = one.query
    found["decode"] = (split.launches(one, out, logsumexp[:, :, :1], processors=132, target=capability,
                                      tile=tiles.pick(tiles.DECODE, capability, head_dim))[0], 0)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--only", default="", help="a regular expression over names such as forward-90-128")
    parser.add_argument("--tile", help="rows,keys,warps,stages instead of the table's")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("sass_probe", options.probe)
    assert spec is not None and spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    rows = []
    for capability in ARCHITECTURES:
        for head_dim in HEAD_DIMS:
            names = [
                f"{kernel}-{capability}-{head_dim}" for kernel in ("forward", "backward", "backward-rows", "decode")
            ]
            if not any(re.search(options.only, name) for name in names):
                continue
            tile = tiles.Tile(*map(int, options.tile.split(","))) if options.tile else None
            for kernel, (made, macs) in launches(head_dim, capability, tile).items():
                name = f"{kernel}-{capability}-{head_dim}"
                if not re.search(options.only, name):
                    continue
                probe.compile_kernel = lambda *_, made=made, capability=capability: made.compile(capability)
                row = probe.probe(made.kernel, capability, {}, {}, {}, macs, name)
                row |= {"tile": list(made.tile), "goal": GOALS.get(name)}
                rows.append(row)
                loop = row["loop"] or {}
                print(f"{name:20} {row['tile']} regs {row['regs']} stack {row['stack']} smem {row['smem']} "
                      f"instr/kflop {loop.get('instrs_per_kflop')} goal {row['goal']} loops {row['mma_loops']} "
                      f"{row['compile_s']} s", flush=True)  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
