"""Registers that the flash kernels spill to memory, by program, head dim and GPU, which need not be there.

    python benchmarks/spills.py [--only REGEX] [--tile ROWS,KEYS,WARPS,STAGES] [--out FILE]

One line for each kernel: the loads and stores of spilled registers in each of its loops with matrix instructions, the
steady one first, in which nothing is masked. All of them take an hour; what FILE has of the same kernels already, by
their fingerprint, is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from machine_code import describe, listing, loops

from attnfx.cost.instruction_counts import fingerprint
from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import mask_summary as summarise
from attnfx.kernels.flash.host import tiles
from attnfx.kernels.flash.host.backward import Backward
from attnfx.kernels.flash.host.launch import Launch
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AttentionSpec, B, Capture, H, I, J

ARCHITECTURES, HEAD_DIMS = (80, 86, 90, 100), (64, 128, 256)
CAUSAL, MASK, PADDING = A.ge(I, J), A.load(0, [B, I, J], "b"), A.load(0, [B, J], "b")
FILL = A.const(-3e38)
SIZE = 4096


def programs(head_dim: int) -> dict[str, AttentionSpec]:
    dot = A.mul(A.const(head_dim**-0.5), A.DOT)
    alibi = A.add(dot, A.mul(A.load(0, [H], "f"), A.to_float(A.sub(J, I))))
    apart = A.minimum(A.maximum(A.sub(J, I), A.const(-128)), A.const(128))
    relative = A.add(dot, A.load(0, [A.add(apart, A.const(128)), H], "f"))
    kept = A.and_(CAUSAL, A.eq0(A.sub(A.load(0, [B, I], "i"), A.load(0, [B, J], "i"))))
    capped = A.mul(A.const(50.0), A.unary("tanh", A.mul(A.const(0.02), dot)))
    bias, masked = A.add(dot, A.load(0, [H, I, J], "f")), A.where(MASK, dot, FILL)
    slopes, table = (Capture("f", 1, True),), (Capture("f", 2, True),)
    pairs, mask = (Capture("f", 3, True),), (Capture("b", 3),)
    of = {
        "plain": AttentionSpec(score=dot),
        "causal": AttentionSpec(score=A.where(CAUSAL, dot, FILL)),
        "window": AttentionSpec(score=A.where(A.and_(CAUSAL, A.ge(A.const(1024), A.sub(I, J))), dot, FILL)),
        "soft cap": AttentionSpec(score=A.where(CAUSAL, capped, FILL)),
        "documents": AttentionSpec(score=A.where(kept, dot, FILL), captures=(Capture("i", 2),)),
        "alibi": AttentionSpec(score=A.where(CAUSAL, alibi, FILL), captures=slopes),
        "relative": AttentionSpec(score=relative, captures=table),
        "bias": AttentionSpec(score=bias, captures=pairs),
        "padding": AttentionSpec(score=A.where(PADDING, dot, FILL), captures=(Capture("b", 2),)),
        "mask": AttentionSpec(score=masked, captures=mask),
        "added": AttentionSpec(score=A.add(dot, A.load(0, [B, I, J], "f")), captures=(Capture("f", 3),)),
        "dropout": AttentionSpec(score=dot, dropout=0.1),
        "causal dropout": AttentionSpec(score=A.where(CAUSAL, dot, FILL), dropout=0.1),
        "mask dropout": AttentionSpec(score=masked, captures=mask, dropout=0.1),
    }
    return {name: replace(spec, out_dtype="bfloat16") for name, spec in of.items()}


def call_of(spec: AttentionSpec, head_dim: int, queries: int = SIZE) -> Call:
    """Two of a batch, eight heads; a mask that stands in a tensor has its summary."""
    x = torch.empty(2, 8, SIZE, head_dim, dtype=torch.bfloat16, device="meta")
    shapes = {
        ("f", 1, True): (8,), ("f", 2, True): (257, 8), ("f", 3, True): (8, queries, SIZE),
        ("b", 2, False): (2, SIZE), ("i", 2, False): (2, SIZE),
        ("b", 3, False): (2, queries, SIZE), ("f", 3, False): (2, queries, SIZE),
    }  # fmt: skip
    types = {"f": torch.bfloat16, "b": torch.bool, "i": torch.int64}
    captures = [torch.empty(shapes[c.kind, c.ndim, c.grad], dtype=types[c.kind], device="meta") for c in spec.captures]
    seed = torch.empty(1, dtype=torch.int64, device="meta") if spec.random else None
    found, states = summary.of(spec), None
    if found is not None and queries == SIZE:
        over = summarise.call_of([captures[n] for n in found.slots], (2, 8, queries, SIZE), found.spec)
        states = torch.empty(summary.shape(found.spec, over.sizes), dtype=torch.uint8, device="meta")
    return Call(spec, x[:, :, :queries], x, x, captures, (), seed, summary=states)


def launches(
    spec: AttentionSpec, head_dim: int, capability: int, tile: tiles.Tile | None
) -> Iterator[tuple[str, Launch]]:
    call = call_of(spec, head_dim)
    logsumexp = torch.empty(call.query.shape[:3], device="meta")
    at = tile or tiles.pick(tiles.forward_table(spec), capability, head_dim)
    yield "forward", launch.forward_launch(call, call.query, logsumexp, at, capability)
    pair = tiles.pick(tiles.backward_table(spec), capability, head_dim)
    back = Backward(call, call.query, call.query, logsumexp, (tile, tile) if tile else pair, capability)
    yield "keys", back.keys_launch(call.key, call.value)
    yield "rows", back.rows_launch(call.query)
    one = call_of(spec, head_dim, 1)
    at = tile or tiles.pick(tiles.DECODE, capability, head_dim)
    yield "decode", split.launches(one, one.query, logsumexp[:, :, :1], at, 132, capability)[0]


def spilled(made: Launch, capability: int) -> dict[str, Any]:
    built = made.compile(capability)
    code, used = listing(built.asm["cubin"])
    found = sorted((describe(ops) for ops in loops(code)), key=lambda row: row["instrs"])
    return {
        "tile": list(made.tile), "registers": used["REG"], "shared": built.metadata.shared,
        "spills": [row["spills"] for row in found], "instructions": [row["instrs"] for row in found],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression over names such as 'mask dropout-keys-80-64'")
    parser.add_argument("--tile", help="rows,keys,warps,stages instead of the table's")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tile = tiles.Tile(*map(int, options.tile.split(","))) if options.tile else None
    known: dict[str, dict] = {}
    if options.out is not None and options.out.exists():
        found = json.loads(options.out.read_text())
        if (found["triton"], found["fingerprint"]) == (triton.__version__, fingerprint()):
            known = {row["kernel"]: row for row in found["rows"]}
    for capability, head_dim in product(ARCHITECTURES, HEAD_DIMS):
        for program, spec in programs(head_dim).items():
            for kernel, made in launches(spec, head_dim, capability, tile):
                name = f"{program}-{kernel}-{capability}-{head_dim}"
                if not re.search(options.only, name) or name in known:
                    continue
                row: dict[str, Any] = {"kernel": name} | spilled(made, capability)
                known[name] = row
                print(f"{'SPILLS' if row['spills'][:1] > [0] else '':6} {row}", flush=True)
                if options.out is not None:
                    write(options.out, list(known.values()))


def write(path: Path, rows: list[dict]) -> None:
    head = {"made by": "python benchmarks/spills.py", "triton": triton.__version__, "fingerprint": fingerprint()}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
