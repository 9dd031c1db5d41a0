"""What the flash kernels' machine code holds, for the cost model: compiled ahead of time, no GPU is needed.

    python benchmarks/instructions.py [--only REGEX] [--out attnfx/cost/instructions.json]

For each kernel, architecture, head width and tile: registers, shared memory, and the instructions of one trip of its
innermost loops with matrix instructions, of one warp. "full" is the loop over tiles in which nothing is masked,
"checked" the one that tests bounds. The program is the plain one: bfloat16, a constant scale, no mask; that of the
rows named "dropout" draws besides, and those named "loads" have the tiles of programs that read a value for each score.
Takes minutes.
With --only, the other rows stay as they are in the file. Run it again whenever a kernel changes: a test compares the
kernels' fingerprint with the one written here.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from attnfx.cost.instruction_counts import TABLE, fingerprint
from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import tiles
from attnfx.kernels.flash.host.backward import Backward
from attnfx.kernels.flash.host.launch import Launch
from attnfx.spec import AttentionSpec

ARCHITECTURES, WIDTHS = (80, 86, 90, 100), (64, 128, 256)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?(\S+)([^;]*);")
MATRIX = re.compile(r"HGMMA|HMMA|UTC\wMMA")
CLASSES = {
    "special": r"MUFU",
    "float": r"FFMA|FMUL|FADD|FMNMX|FSETP|FSEL",
    "loads": r"LDSM|LDS|LDTM|LDL",  # of shared, tensor and local memory: one port serves all of them
    "stores": r"STSM|STS|STTM|STL",
}


def plain(width: int, queries: int = 4096, dropout: float = 0.0) -> Call:
    x = torch.empty(2, 8, 4096, width, dtype=torch.bfloat16, device="meta")
    spec = AttentionSpec(score=A.mul(A.const(width**-0.5), A.DOT), out_dtype="bfloat16", dropout=dropout)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout else None
    return Call(spec, x[:, :, :queries], x, x, (), (), seed)


def launches(capability: int, width: int) -> Iterator[tuple[str, tiles.Tile, Launch, int]]:
    """(kernel, tile, what to compile, multiply-adds of one step) for every tile that the cost model may choose."""
    others = tiles.OTHERS.get((tiles.SMALL if capability in tiles.OF_SMALL else capability, width), ())
    tables = {
        "": (tiles.FORWARD, tiles.BACKWARD),
        " loads": (tiles.FORWARD_LOADS, tiles.BACKWARD_LOADS),
        " dropout": (tiles.FORWARD_DROPOUT, tiles.BACKWARD_DROPOUT),
    }
    for kind, (forward, backward) in tables.items():
        call = plain(width, dropout=0.1 if kind == " dropout" else 0.0)
        logsumexp = torch.empty(call.query.shape[:3], device="meta")
        first = tiles.pick(forward, capability, width)
        for tile in [first] if kind else dict.fromkeys((first, *others)):
            made = launch.forward_launch(call, call.query, logsumexp, tile, capability)
            yield "forward" + kind, tile, made, 2 * tile.rows * tile.keys * width
        pair = tiles.pick(backward, capability, width)
        run = Backward(call, call.query, call.query, logsumexp, pair, capability)
        yield "keys" + kind, pair[0], run.keys_launch(call.key, call.value), 4 * pair[0].rows * pair[0].keys * width
        yield "rows" + kind, pair[1], run.rows_launch(call.query), 3 * pair[1].rows * pair[1].keys * width
    one = plain(width, queries=1)
    tile = tiles.pick(tiles.DECODE, capability, width)
    made, _ = split.launches(one, one.query, logsumexp[:, :, :1], tile, processors=132, target=capability)
    yield "decode", made.tile, made, 2 * made.tile.rows * tile.keys * width


def flops(op: str) -> int:
    """Matrix FLOPs of one warp through one instruction (four warps share a warp group's); 0 where the name hides it."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
        return 2 * int(found[1]) * int(found[2]) * int(found[3]) // 4
    found = re.match(r"HMMA\.168(8|16|32)\b", op)
    return 2 * 16 * 8 * int(found[1]) if found else 0


def matrix_work(op: str) -> int:
    return flops(op) or bool(MATRIX.match(op))


def loops(listing: str) -> tuple[list[list[str]], int]:
    """The opcodes of each innermost backward jump that holds a matrix instruction, and of how many the kernel is."""
    code = [(int(address, 16), op, rest) for address, op, rest in LINE.findall(listing)]
    at = {address: n for n, (address, _, _) in enumerate(code)}
    spans = []
    for n, (_, op, rest) in enumerate(code):
        jump = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        target = at.get(int(jump[1], 16)) if jump else None
        if target is not None and target < n:
            spans.append((target, n))
    bodies = [[op for _, op, _ in code[a : b + 1]] for a, b in spans]
    kept = [any(MATRIX.match(op) for op in body) for body in bodies]
    inner = [
        body
        for (a, b), body, good in zip(spans, bodies, kept)
        if good and not any(g and (a, b) != s and a <= s[0] and s[1] <= b for s, g in zip(spans, kept))
    ]
    return inner, len(code)


def describe(body: list[str], warps: int, macs: int) -> dict[str, float]:
    """The instructions of one warp in one step of the kernel."""
    matrix = [op for op in body if MATRIX.match(op)]
    done = sum(map(flops, matrix)) * warps / (2 * macs)
    steps = max(1, round(done)) if done else 1  # Blackwell's shapes are not in the opcode
    row = {"instructions": len(body), "matrix": len(matrix)}
    row |= {name: sum(bool(re.match(rx, op)) for op in body) for name, rx in CLASSES.items()}
    return {name: round(count / steps, 1) for name, count in row.items()}


def row(kernel: str, capability: int, width: int, tile: tiles.Tile, made: Launch, macs: int) -> dict:
    start = time.time()
    built = made.compile(capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        listing, usage = (
            subprocess.run([str(CUOBJDUMP), flag, file.name], text=True, capture_output=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    bodies, total = loops(listing)
    most = max((sum(map(matrix_work, body)) for body in bodies), default=0)
    bodies = [body for body in bodies if sum(map(matrix_work, body)) > most / 2]  # the others are of rarer rows
    described = sorted((describe(body, tile.warps, macs) for body in bodies), key=lambda d: d["instructions"])
    if not described:
        raise SystemExit(f"no loop with matrix instructions in {kernel} {capability} {width} {tile}")
    found = {
        "kernel": kernel, "capability": capability, "width": width, "tile": list(tile),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "shared": built.metadata.shared,  # type: ignore[index]
        "total": total, "full": described[0], "checked": described[-1],
    }  # fmt: skip
    print(f"{name_of(found):28} {found['registers']} registers, {found['shared']} bytes, {len(bodies)} loops, "
          f"{found['full']} {time.time() - start:.1f} s", flush=True)  # fmt: skip
    return found


def name_of(found: dict) -> str:
    return f"{found['kernel']}-{found['capability']}-{found['width']}-{'x'.join(map(str, found['tile']))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression over names such as forward-90-128-128x128x8x2")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    rows = {}
    if options.only and options.out.exists():
        rows = {name_of(found): found for found in json.loads(options.out.read_text())["rows"]}
    for capability in ARCHITECTURES:
        for width in WIDTHS:
            for kernel, tile, made, macs in launches(capability, width):
                head = {"kernel": kernel, "capability": capability, "width": width, "tile": list(tile)}
                same = rows.get(name_of(head | {"kernel": kernel.removesuffix(" loads")}))
                if kernel.endswith(" loads") and same is not None:
                    rows[name_of(head)] = same | {"kernel": kernel}
                elif re.search(options.only, name_of(head)):
                    rows[name_of(head)] = row(kernel, capability, width, tile, made, macs)
    data = {
        "made by": "python benchmarks/instructions.py",
        "unit": "instructions of one warp in one step of the kernel's loop; registers of a thread; bytes of a program",
        "triton": triton.__version__, "fingerprint": fingerprint(),
    }  # fmt: skip
    lines = ",\n  ".join(json.dumps(found) for found in rows.values())
    options.out.write_text(json.dumps(data, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
