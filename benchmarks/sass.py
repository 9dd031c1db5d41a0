"""Machine code of the flash kernels for GPUs that need not be there: registers, spills, instructions per kflop.

    python benchmarks/sass.py [--only REGEX] [--tile ROWS,KEYS,WARPS,STAGES] [--out FILE] [--probe FILE]

No GPU is needed, and no tool but those of Triton's wheel. The program is the plain one: bf16, a constant scale, no
mask. --probe names another reader of machine code with the same loop in mind, to check this one by.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from pathlib import Path
from types import ModuleType

import torch
import triton
from machine_code import read

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import tiles
from attnfx.kernels.flash.host.backward import Backward
from attnfx.kernels.flash.host.launch import Launch
from attnfx.spec import AttentionSpec

HERE = Path(__file__).resolve().parent
ARCHITECTURES, HEAD_DIMS = (80, 90, 100), (64, 128, 256)
KERNELS = ("forward", "backward", "backward-rows", "decode")
ABOUT = """All instructions that one trip of the steady loop issues for a warp, over its matrix FLOPs / 1000; fewer are
better. `backward` is the pass over keys: four products, for dk and dv. `backward-rows` is the pass over rows: three,
for dq. The goals are Triton's tutorial kernels: of its one backward kernel the goal counts the loop for dk and dv, with
the most matrix FLOPs; so it compares with `backward`, and the loop for dq is in neither number. Nothing is timed."""
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


def launches(head_dim: int, capability: int, tile: tiles.Tile | None = None) -> dict[str, Launch]:
    """What to compile, by the names in KERNELS."""
    call = plain(head_dim)
    logsumexp = torch.empty(call.query.shape[:3], device="meta")
    at = tile or tiles.pick(tiles.FORWARD, capability, head_dim)
    pair = (tile, tile) if tile else tiles.pick(tiles.BACKWARD, capability, head_dim)
    run = Backward(call, call.query, call.query, logsumexp, pair, capability)
    one = plain(head_dim, queries=1)
    over_splits, _ = split.launches(
        one, one.query, logsumexp[:, :, :1], processors=132, target=capability,
        tile=tiles.pick(tiles.DECODE, capability, head_dim),
    )  # fmt: skip
    made = (
        launch.forward_launch(call, call.query, logsumexp, at, capability),
        run.keys_launch(call.key, call.value), run.rows_launch(call.query), over_splits,
    )  # fmt: skip
    return dict(zip(KERNELS, made))


def by_another(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("probe", path)
    assert spec is not None and spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    return probe


def check(row: dict, probe: ModuleType, made: Launch, capability: int) -> None:
    """Raises ValueError where the other reader finds another steady loop."""
    probe.compile_kernel = lambda *_: made.compile(capability)
    other = probe.probe(made.kernel, capability, {}, {}, {})
    ours, theirs = (x["loop"] and x["loop"]["instrs"] for x in (row, other))
    if (ours, row["registers"], row["stack"]) != (theirs, other["regs"], other["stack"]):
        raise ValueError(f"{row['kernel']}: {ours} instructions in the loop here, {theirs} by the other reader")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", type=Path)
    parser.add_argument("--only", default="", help="a regular expression over names such as forward-90-128")
    parser.add_argument("--tile", help="rows,keys,warps,stages instead of the table's; nothing is written by default")
    parser.add_argument("--out", type=Path, help="default: results/sass.json, where everything is measured")
    options = parser.parse_args()
    tile = tiles.Tile(*map(int, options.tile.split(","))) if options.tile else None
    probe = by_another(options.probe) if options.probe else None
    rows = []
    for capability in ARCHITECTURES:
        for head_dim in HEAD_DIMS:
            names = {kernel: f"{kernel}-{capability}-{head_dim}" for kernel in KERNELS}
            names = {kernel: name for kernel, name in names.items() if re.search(options.only, name)}
            made = launches(head_dim, capability, tile) if names else {}
            for kernel, name in names.items():
                start = time.time()
                built = made[kernel].compile(capability)
                row = {"kernel": name, "tile": list(made[kernel].tile), "shared": built.metadata.shared}
                row |= read(built.asm["cubin"]) | {"goal": GOALS.get(name)}
                if probe is not None:
                    check(row, probe, made[kernel], capability)
                rows.append(row)
                loop = row["loop"] or {}
                print(f"{name:20} {row['tile']} registers {row['registers']} stack {row['stack']} shared "
                      f"{row['shared']} instr/kflop {loop.get('instrs_per_kflop')} goal {row['goal']} loops "
                      f"{row['loops']} {time.time() - start:.1f} s", flush=True)  # fmt: skip
    out = options.out or (None if options.only or tile else HERE / "results" / "sass.json")
    if out is not None:
        record = {"about": " ".join(ABOUT.split()), "triton": triton.__version__, "rows": rows}
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
