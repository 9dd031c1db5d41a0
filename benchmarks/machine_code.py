"""Reads the machine code of a kernel that Triton compiled for an NVIDIA GPU, which need not be there: its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?(\S+?)(?:\s+(.*?))?\s*;")
MATRIX = re.compile(r"HGMMA|HMMA|UTC\wMMA")
KINDS = {
    "matrix": MATRIX.pattern, "exp2": r"MUFU\.EX2", "ffma": "FFMA", "fmul_fadd": "FMUL|FADD", "spills": "STL|LDL",
    "shared": "LDS|STS", "barriers": "BAR|SYNCS|WARPGROUP", "copies": "LDGSTS|UTMALDG|UBLKCP",
}  # fmt: skip


class Instruction(NamedTuple):
    address: int
    conditional: bool
    op: str
    operands: str


def listing(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and what the kernel uses: REG, STACK and others. By the tools of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], text=True, capture_output=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    code = []
    for found in filter(None, map(LINE.search, sass.splitlines())):
        address, predicate, op, operands = found[1], found[2], found[3], found[4] or ""
        # a branch is also conditional by a predicate among its operands
        conditional = bool(predicate) or re.search(r"\bU?P\d", operands.split("0x")[0]) is not None
        code.append(Instruction(int(address, 16), conditional, op, operands))
    return code, {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", usage)}


def loops(code: list[Instruction]) -> list[list[str]]:
    """The opcodes of each innermost natural loop that holds a matrix instruction; what waits for a barrier out of line
    belongs to its loop."""
    at = {x.address: n for n, x in enumerate(code)}
    flow = nx.DiGraph()
    flow.add_node(0)
    for n, x in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", x.operands) if x.op.startswith("BRA") else None
        jump = at.get(int(target[1], 16)) if target else None
        if jump is not None:
            flow.add_edge(n, jump)
        if n + 1 < len(code) and (x.conditional or (jump is None and x.op != "EXIT")):
            flow.add_edge(n, n + 1)
    flow = flow.subgraph(nx.descendants(flow, 0) | {0})
    above = nx.immediate_dominators(flow, 0)
    bodies: dict[int, set[int]] = {}
    for tail, head in flow.edges:
        if head <= tail and _dominates(head, tail, above):
            rest = flow.subgraph(flow.nodes - {head})
            inside = {tail} | nx.ancestors(rest, tail) if tail != head else set()
            bodies.setdefault(head, {head}).update(inside)
    some = [b for b in bodies.values() if any(MATRIX.match(code[n].op) for n in b)]
    return [[code[n].op for n in sorted(b)] for b in some if not any(other < b for other in some)]


def _dominates(head: int, node: int, above: dict[int, int]) -> bool:
    while node > head and above.get(node, node) != node:
        node = above[node]
    return node == head


def matrix_flops(op: str) -> int:
    """Of one warp; four share an instruction of a warp group. 0 on Blackwell, where the shape is not in the opcode."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
        return int(found[1]) * int(found[2]) * int(found[3]) // 2
    found = re.match(r"HMMA\.168(8|16|32)\b", op)
    return 2 * 16 * 8 * int(found[1]) if found else 0


def describe(ops: list[str]) -> dict[str, Any]:
    """One trip of a loop: instructions, those of each kind, and how many there are for 1000 matrix FLOPs."""
    flops = sum(map(matrix_flops, ops))
    row: dict[str, Any] = {"instrs": len(ops)} | {k: sum(bool(re.match(p, x)) for x in ops) for k, p in KINDS.items()}
    return row | {"kflop": flops / 1e3, "instrs_per_kflop": round(len(ops) / flops * 1e3, 3) if flops else None}


def read(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, and the steady loop: of those within 10% of the most matrix FLOPs (instructions, where these
    are not known) the one with the fewest instructions for each, which is the one without a mask."""
    code, used = listing(cubin)
    rows = [describe(ops) for ops in loops(code)]
    top = max((row["kflop"] for row in rows), default=0)
    steady = min(
        (row for row in rows if row["kflop"] >= 0.9 * top),
        default=None,
        key=lambda row: row["instrs_per_kflop"] or row["instrs"],
    )
    return {
        "registers": used["REG"], "stack": used["STACK"], "instructions": len(code), "loop": steady,
        "loops": [[row["instrs"], row["matrix"], row["instrs_per_kflop"]] for row in rows],
    }  # fmt: skip
