"""Read the machine code of the flash kernels, compiled ahead of time for GPUs that need not be present.

    python benchmarks/machine_code.py counts [--only REGEX] [--tile ROWS,KEYS,WARPS,STAGES] [--out FILE] [--probe FILE]
    python benchmarks/machine_code.py spills [--only REGEX] [--tile ROWS,KEYS,WARPS,STAGES] [--out FILE]
    python benchmarks/machine_code.py table [--only REGEX] [--out attnfx/cost/instructions.json]

"counts" prints the registers, spills and instructions per kflop of the plain program (bfloat16, constant scale,
unmasked). A run over all kernels is written to results/sass.json. --probe names another reader of machine code, to
check this one.

"spills" prints the spilled registers by program: one line per kernel, with the loads and stores of spilled registers in
each of its loops with matrix instructions. The main loop over unmasked tiles comes first. All kernels take an hour; a
kernel that FILE already has, by its fingerprint, is skipped.

"table" writes the cost model's table. A row (kernel, architecture, head width and tile) has registers, shared memory,
and the instructions of one warp in one iteration of the innermost loops with matrix instructions. "full" is the loop
over unmasked tiles, "checked" the loop that tests bounds. Rows use the plain program. Rows named "dropout" add dropout;
rows named "loads" have the tiles of programs that load a value per score. This takes minutes. With --only, the file's
other rows stay unchanged. Run it again whenever a kernel changes: a test compares the kernels' fingerprint with the
file's.

The script needs only the tools of Triton's wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import networkx as nx
import torch
import triton
from kernel_sources import fingerprint

from attnfx.cost.instruction_counts import TABLE
from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import mask_summary as summarise
from attnfx.kernels.flash.host import tiles
from attnfx.kernels.flash.host.backward import Backward
from attnfx.kernels.flash.host.launch import Launch
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AttentionSpec, B, Capture, H, I, J

HERE = Path(__file__).resolve().parent
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES, HEAD_DIMS = (80, 86, 90, 100), (64, 128, 256)
SIZE = 4096  # queries and keys

# -- machine code -------------------------------------------------------------------------------
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?(\S+?)(?:\s+(.*?))?\s*;")
MATRIX = re.compile(r"HGMMA|HMMA|UTC\wMMA")
KINDS = {
    "matrix": MATRIX.pattern, "exp2": r"MUFU\.EX2", "ffma": "FFMA", "fmul_fadd": "FMUL|FADD", "spills": "STL|LDL",
    "shared": "LDS|STS", "barriers": "BAR|SYNCS|WARPGROUP", "copies": "LDGSTS|UTMALDG|UBLKCP",
}  # fmt: skip
CLASSES = {
    "matrix": MATRIX.pattern, "special": "MUFU", "float": "FFMA|FMUL|FADD|FMNMX|FSETP|FSEL",
    "loads": "LDSM|LDS|LDTM|LDL",  # from shared, tensor and local memory, which share one port
    "stores": "STSM|STS|STTM|STL",
}  # fmt: skip


class Instruction(NamedTuple):
    address: int
    conditional: bool
    op: str
    operands: str


class Compiled(NamedTuple):
    """A kernel's instructions, its resource usage (REG, STACK and others), and its shared memory in bytes."""

    code: list[Instruction]
    used: dict[str, int]
    shared: int


def compiled(made: Launch, capability: int) -> Compiled:
    built = made.compile(capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], text=True, capture_output=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    code = []
    for found in filter(None, map(LINE.search, sass.splitlines())):
        address, predicate, op, operands = found[1], found[2], found[3], found[4] or ""
        # a predicate among its operands also makes a branch conditional
        conditional = bool(predicate) or re.search(r"\bU?P\d", operands.split("0x")[0]) is not None
        code.append(Instruction(int(address, 16), conditional, op, operands))
    return Compiled(code, {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", usage)}, built.metadata.shared)


def jumps(code: list[Instruction]) -> dict[int, int]:
    """Return the target of each branch, by positions in the code."""
    at = {x.address: n for n, x in enumerate(code)}
    found = ((n, re.search(r"0x([0-9a-f]+)", x.operands)) for n, x in enumerate(code) if x.op.startswith("BRA"))
    return {n: at[int(to[1], 16)] for n, to in found if to is not None and int(to[1], 16) in at}


def spans(code: list[Instruction]) -> list[set[int]]:
    """Return the ranges from the target of a backward jump to the jump. The cost model's table counts these."""
    return [set(range(head, n + 1)) for n, head in jumps(code).items() if head < n]


def natural_loops(code: list[Instruction]) -> list[set[int]]:
    """Return the natural loops. Out-of-line waits for a barrier belong to their loop, the code of an exit does not."""
    flow, to = nx.DiGraph(), jumps(code)
    flow.add_node(0)
    for n, x in enumerate(code):
        if n in to:
            flow.add_edge(n, to[n])
        if n + 1 < len(code) and (x.conditional or (n not in to and x.op != "EXIT")):
            flow.add_edge(n, n + 1)
    flow = flow.subgraph(nx.descendants(flow, 0) | {0})
    above = nx.immediate_dominators(flow, 0)
    bodies: dict[int, set[int]] = {}
    for tail, head in flow.edges:
        if head <= tail and _dominates(head, tail, above):
            rest = flow.subgraph(flow.nodes - {head})
            inside = {tail} | nx.ancestors(rest, tail) if tail != head else set()
            bodies.setdefault(head, {head}).update(inside)
    return list(bodies.values())


def _dominates(head: int, node: int, above: dict[int, int]) -> bool:
    while node > head and above.get(node, node) != node:
        node = above[node]
    return node == head


def innermost(code: list[Instruction], bodies: Iterable[set[int]]) -> list[list[str]]:
    """Return the opcodes of each innermost loop with matrix instructions."""
    some = [b for b in bodies if any(MATRIX.match(code[n].op) for n in b)]
    return [[code[n].op for n in sorted(b)] for b in some if not any(other < b for other in some)]


def matrix_flops(op: str) -> int:
    """Return the FLOPs per warp of a matrix instruction; the four warps of a warp group share one. Return 0 on
    Blackwell, whose opcodes lack the shape."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
        return int(found[1]) * int(found[2]) * int(found[3]) // 2
    found = re.match(r"HMMA\.168(8|16|32)\b", op)
    return 2 * 16 * 8 * int(found[1]) if found else 0


def matrix_work(op: str) -> int:
    return matrix_flops(op) or bool(MATRIX.match(op))


def of_kinds(ops: list[str], kinds: Mapping[str, str]) -> dict[str, int]:
    return {name: sum(bool(re.match(pattern, op)) for op in ops) for name, pattern in kinds.items()}


def describe(ops: list[str]) -> dict[str, Any]:
    """Count the instructions of one iteration of a loop, in all, by kind and per 1000 matrix FLOPs."""
    flops = sum(map(matrix_flops, ops))
    row: dict[str, Any] = {"instrs": len(ops)} | of_kinds(ops, KINDS)
    return row | {"kflop": flops / 1e3, "instrs_per_kflop": round(len(ops) / flops * 1e3, 3) if flops else None}


# -- kernels ------------------------------------------------------------------------------------
def plain(head_dim: int, dropout: float = 0.0) -> AttentionSpec:
    return AttentionSpec(score=A.mul(A.const(head_dim**-0.5), A.DOT), out_dtype="bfloat16", dropout=dropout)


def call_of(spec: AttentionSpec, head_dim: int, queries: int = SIZE) -> Call:
    """Create a call on the meta device, batch 2 and 8 heads. A mask in a tensor has its summary."""
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


def logsumexp(call: Call) -> torch.Tensor:
    return torch.empty(call.query.shape[:3], device="meta")


def forward_launch(call: Call, tile: Tile, capability: int) -> Launch:
    return launch.forward_launch(call, call.query, logsumexp(call), tile, capability)


def backward_launches(call: Call, pair: tuple[Tile, Tile], capability: int) -> tuple[Launch, Launch]:
    """Create the launches of the passes over keys and over rows."""
    run = Backward(call, call.query, call.query, logsumexp(call), pair, capability)
    return run.keys_launch(call.key, call.value), run.rows_launch(call.query)


def decode_launch(spec: AttentionSpec, head_dim: int, tile: Tile, capability: int) -> Launch:
    one = call_of(spec, head_dim, queries=1)
    return split.launches(one, one.query, logsumexp(one), tile, processors=132, target=capability)[0]


def launches(spec: AttentionSpec, head_dim: int, capability: int, tile: Tile | None) -> Iterator[tuple[str, Launch]]:
    """Yield the four kernels of a program, with the tables' tiles or with `tile`."""
    call = call_of(spec, head_dim)
    at = tile or tiles.pick(tiles.forward_table(spec), capability, head_dim)
    yield "forward", forward_launch(call, at, capability)
    pair = (tile, tile) if tile else tiles.pick(tiles.backward_table(spec), capability, head_dim)
    yield from zip(("keys", "rows"), backward_launches(call, pair, capability))
    yield "decode", decode_launch(spec, head_dim, tile or tiles.pick(tiles.DECODE, capability, head_dim), capability)


def write(path: Path, head: dict[str, Any], rows: Iterable[dict]) -> None:
    head |= {"triton": triton.__version__, "fingerprint": fingerprint()}
    lines = ",\n  ".join(map(json.dumps, rows))
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


# -- counts -------------------------------------------------------------------------------------
NAMES = {"forward": "forward", "keys": "backward", "rows": "backward-rows", "decode": "decode"}
ABOUT = """All instructions that one trip of the steady loop issues for a warp, over its matrix FLOPs / 1000; fewer are
better. `backward` is the pass over keys: four products, for dk and dv. `backward-rows` is the pass over rows: three,
for dq. The goals are Triton's tutorial kernels: of its one backward kernel the goal counts the loop for dk and dv, with
the most matrix FLOPs; so it compares with `backward`, and the loop for dq is in neither number. Nothing is timed."""
# instructions per kflop of the best open-source Triton kernel for the same program
GOALS = {
    "forward-90-64": 0.996, "forward-90-128": 0.475, "forward-80-128": 1.07,
    "backward-90-64": 0.57, "backward-90-128": 0.36,
}  # fmt: skip


def steady(loops: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the main loop, the one without a mask. Among the loops within 10% of the most matrix FLOPs, it has the
    fewest instructions per FLOP (the fewest instructions if FLOPs are unknown)."""
    top = max((row["kflop"] for row in loops), default=0)
    most = [row for row in loops if row["kflop"] >= 0.9 * top]
    return min(most, default=None, key=lambda row: row["instrs_per_kflop"] or row["instrs"])


def another_reader(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("probe", path)
    assert spec is not None and spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    return probe


def check(row: dict, probe: ModuleType, made: Launch, capability: int) -> None:
    """Raise ValueError if the other reader finds another main loop."""
    probe.compile_kernel = lambda *_: made.compile(capability)
    other = probe.probe(made.kernel, capability, {}, {}, {})
    ours, theirs = (x["loop"] and x["loop"]["instrs"] for x in (row, other))
    if (ours, row["registers"], row["stack"]) != (theirs, other["regs"], other["stack"]):
        raise ValueError(f"{row['kernel']}: {ours} instructions in the loop here, {theirs} by the other reader")


def counts(options: argparse.Namespace) -> None:
    probe = another_reader(options.probe) if options.probe else None
    rows = []
    for capability, head_dim in product((80, 90, 100), HEAD_DIMS):
        for kernel, made in launches(plain(head_dim), head_dim, capability, options.tile):
            name, start = f"{NAMES[kernel]}-{capability}-{head_dim}", time.time()
            if not re.search(options.only, name):
                continue
            code, used, shared = compiled(made, capability)
            found = [describe(ops) for ops in innermost(code, natural_loops(code))]
            row = {
                "kernel": name, "tile": list(made.tile), "shared": shared, "registers": used["REG"],
                "stack": used["STACK"], "instructions": len(code), "loop": steady(found),
                "loops": [[loop["instrs"], loop["matrix"], loop["instrs_per_kflop"]] for loop in found],
                "goal": GOALS.get(name),
            }  # fmt: skip
            if probe is not None:
                check(row, probe, made, capability)
            rows.append(row)
            loop = row["loop"] or {}
            print(f"{name:20} {row['tile']} registers {row['registers']} stack {row['stack']} shared {shared} "
                  f"instr/kflop {loop.get('instrs_per_kflop')} goal {row['goal']} loops {row['loops']} "
                  f"{time.time() - start:.1f} s", flush=True)  # fmt: skip
    out = options.out or (None if options.only or options.tile else HERE / "results" / "sass.json")
    if out is not None:
        record = {"about": " ".join(ABOUT.split()), "triton": triton.__version__, "rows": rows}
        out.write_text(json.dumps(record, indent=1) + "\n")


# -- spills -------------------------------------------------------------------------------------
CAUSAL, MASK, PADDING = A.ge(I, J), A.load(0, [B, I, J], "b"), A.load(0, [B, J], "b")
FILL = A.const(-3e38)


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


def spills(options: argparse.Namespace) -> None:
    known: dict[str, dict] = {}
    if options.out is not None and options.out.exists():
        found = json.loads(options.out.read_text())
        if (found["triton"], found["fingerprint"]) == (triton.__version__, fingerprint()):
            known = {row["kernel"]: row for row in found["rows"]}
    for capability, head_dim in product(ARCHITECTURES, HEAD_DIMS):
        for program, spec in programs(head_dim).items():
            for kernel, made in launches(spec, head_dim, capability, options.tile):
                name = f"{program}-{kernel}-{capability}-{head_dim}"
                if not re.search(options.only, name) or name in known:
                    continue
                code, used, shared = compiled(made, capability)
                loops = sorted(map(describe, innermost(code, natural_loops(code))), key=lambda loop: loop["instrs"])
                known[name] = row = {
                    "kernel": name, "tile": list(made.tile), "registers": used["REG"], "shared": shared,
                    "spills": [loop["spills"] for loop in loops], "instructions": [loop["instrs"] for loop in loops],
                }  # fmt: skip
                print(f"{'SPILLS' if row['spills'][:1] > [0] else '':6} {row}", flush=True)
                if options.out is not None:
                    write(options.out, {"made by": "python benchmarks/machine_code.py spills"}, known.values())


# -- table --------------------------------------------------------------------------------------
# More shapes that the cost model may choose if there are few tiles, or if many programs can share a multiprocessor.
# The table of `tiles.FORWARD` stays the default.
OTHERS = {
    (90, 64): (Tile(64, 64, 4, 3), Tile(128, 128, 8, 2)),
    (90, 128): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    (90, 256): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    (80, 64): (Tile(64, 64, 4, 3), Tile(128, 32, 4, 3)),
    (80, 128): (Tile(64, 64, 4, 3), Tile(128, 32, 4, 3)),
    (80, 256): (Tile(128, 32, 8, 2), Tile(32, 32, 4, 2)),
    (100, 64): (Tile(64, 64, 4, 2), Tile(128, 128, 8, 2)),
    (100, 128): (Tile(64, 64, 4, 2), Tile(128, 128, 8, 2)),
    (100, 256): (Tile(64, 64, 4, 2),),
    (tiles.SMALL, 64): (Tile(64, 64, 4, 2), Tile(128, 32, 4, 3)),
    (tiles.SMALL, 128): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    (tiles.SMALL, 256): (Tile(32, 32, 4, 2),),
}


def tabled(capability: int, width: int) -> Iterator[tuple[str, Tile, Launch, int]]:
    """Yield (kernel, tile, launch, multiply-adds of one step) for every tile that the cost model may choose."""
    others = OTHERS.get((tiles.SMALL if capability in tiles.OF_SMALL else capability, width), ())
    tables = {
        "": (tiles.FORWARD, tiles.BACKWARD),
        " loads": (tiles.FORWARD_LOADS, tiles.BACKWARD_LOADS),
        " dropout": (tiles.FORWARD_DROPOUT, tiles.BACKWARD_DROPOUT),
    }
    for kind, (forward, backward) in tables.items():
        call = call_of(plain(width, dropout=0.1 if kind == " dropout" else 0.0), width)
        first = tiles.pick(forward, capability, width)
        for tile in [first] if kind else dict.fromkeys((first, *others)):
            yield "forward" + kind, tile, forward_launch(call, tile, capability), 2 * tile.rows * tile.keys * width
        pair = tiles.pick(backward, capability, width)
        passes = zip(("keys", "rows"), pair, backward_launches(call, pair, capability), (4, 3))
        for kernel, tile, made, products in passes:
            yield kernel + kind, tile, made, products * tile.rows * tile.keys * width
    made = decode_launch(plain(width), width, tiles.pick(tiles.DECODE, capability, width), capability)
    yield "decode", made.tile, made, 2 * made.tile.rows * made.tile.keys * width


def step(ops: list[str], warps: int, macs: int) -> dict[str, float]:
    """Count the instructions of one warp in one step of the kernel."""
    done = sum(map(matrix_flops, ops)) * warps / (2 * macs)
    steps = max(1, round(done)) if done else 1  # Blackwell's opcodes lack the shape
    row = {"instructions": len(ops)} | of_kinds(ops, CLASSES)
    return {name: round(count / steps, 1) for name, count in row.items()}


def measured(head: dict, made: Launch, macs: int) -> dict:
    """Compile a kernel and return its row of the table. Raise SystemExit if no loop has matrix instructions."""
    start = time.time()
    code, used, shared = compiled(made, head["capability"])
    bodies = innermost(code, spans(code))
    most = max((sum(map(matrix_work, body)) for body in bodies), default=0)
    bodies = [body for body in bodies if sum(map(matrix_work, body)) > most / 2]  # smaller loops are for rare rows
    loops = sorted((step(body, head["tile"][2], macs) for body in bodies), key=lambda loop: loop["instructions"])
    if not loops:
        raise SystemExit(f"no loop with matrix instructions in {name_of(head)}")
    padding = next(n for n, x in enumerate(reversed(code)) if x.op != "NOP") // 2  # two NOPs at the end count as one
    found = head | {
        "registers": used["REG"], "shared": shared, "total": len(code) - padding, "full": loops[0],
        "checked": loops[-1],
    }  # fmt: skip
    print(f"{name_of(found):28} {found['registers']} registers, {shared} bytes, {len(loops)} loops, "
          f"{found['full']} {time.time() - start:.1f} s", flush=True)  # fmt: skip
    return found


def name_of(row: dict) -> str:
    return f"{row['kernel']}-{row['capability']}-{row['width']}-{'x'.join(map(str, row['tile']))}"


def table(options: argparse.Namespace) -> None:
    rows = {}
    if options.only and options.out.exists():
        rows = {name_of(row): row for row in json.loads(options.out.read_text())["rows"]}
    for capability, width in product(ARCHITECTURES, HEAD_DIMS):
        for kernel, tile, made, macs in tabled(capability, width):
            head = {"kernel": kernel, "capability": capability, "width": width, "tile": list(tile)}
            same = rows.get(name_of(head | {"kernel": kernel.removesuffix(" loads")}))
            if kernel.endswith(" loads") and same is not None:
                rows[name_of(head)] = same | {"kernel": kernel}
            elif re.search(options.only, name_of(head)):
                rows[name_of(head)] = measured(head, made, macs)
    about = {
        "made by": "python benchmarks/machine_code.py table",
        "unit": "instructions of one warp in one step of the kernel's loop; registers of a thread; bytes of a program",
    }
    write(options.out, about, rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, example in (
        (counts, "forward-90-128"), (spills, "'mask dropout-keys-80-64'"), (table, "forward-90-128-128x128x8x2"),
    ):  # fmt: skip
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("--only", default="", help=f"a regular expression over names such as {example}")
        command.add_argument("--out", type=Path, default=TABLE if run is table else None)
        if run is not table:
            command.add_argument(
                "--tile", type=lambda text: Tile(*map(int, text.split(","))),
                help="rows,keys,warps,stages instead of the tables'",
            )  # fmt: skip
        if run is counts:
            command.add_argument("--probe", type=Path)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
