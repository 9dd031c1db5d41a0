"""Measure the Triton kernels on a GPU within a time limit, and write results/gpu.json.

Each attention runs in turn with attnfx (on the model's own code), Inductor on the same code, flex_attention, and
PyTorch's fused operator with its flash and cuDNN kernels if these can express it. A row has the time of a call in ms,
the TFLOP/s of the unmasked scores, that rate's share of a matrix product's measured rate, and the largest error against
float64, relative to the largest value, on some rows of one head.

A fault on a GPU ends the process, so the cases run in a child process. If a case crashes it, or takes more than LIMIT
seconds, its row has an "error" and the next case starts in a new process.

The cost model also decides every case. "choice" compares the time of its choices with the best measured one (attnfx's
kernels, and the original code under Inductor), and its predicted times with the measured ones.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from apart import Apart, said, serve
from gpu_programs import DECODE, PROGRAMS, Program, Tensors, live_share, reference
from measure import machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

import attnfx

HERE = Path(__file__).resolve().parent
TOKENS, WIDTH = 16384, 2048  # tokens of a batch, and width of all heads together
DEVICE = "cuda"
FLUSH, FLUSHES = 256 << 20, 16  # bytes, more than any L2 cache; all flushes take about 1 ms, so the host runs ahead
LIMIT = 150  # seconds per case
NAIVE = 8192  # the longest sequence to run under Inductor as well: its scores take gigabytes
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    program: str
    length: int
    head_dim: int
    train: bool


LENGTHS, WIDTHS = (512, 1024, 2048, 4096, 8192, 16384), (128, 64)
EVERY = tuple(p.name for p in PROGRAMS)
KNOWN = ("full", "causal")  # programs with published numbers
FORWARD, BOTH = (False,), (False, True)
# (programs, lengths, head dims, with or without training), the most informative first
ORDER = (
    (KNOWN, (16384,), (128,), BOTH),
    (("decode",), (32768,), (128,), FORWARD),
    (EVERY, (4096,), (128,), BOTH),
    (KNOWN, (16384, 1024), (64,), BOTH),
    (EVERY, (8192,), (64,), FORWARD),
    (EVERY, (1024,), (128, 64), FORWARD),
    (EVERY, (16384,), (128,), FORWARD),
    (KNOWN, (512, 2048, 8192), WIDTHS, BOTH),
    (EVERY, LENGTHS, WIDTHS, BOTH),
    (("decode",), (32768,), (64,), FORWARD),
)


def cases() -> list[Case]:
    """List the cases, the most informative first: if time runs out, the last ones are skipped."""
    every = (
        Case(name, length, head_dim, train)
        for names, lengths, dims, ways in ORDER
        for length, head_dim, train, name in product(lengths, dims, ways, names)
    )
    return list(dict.fromkeys(every))


def program_of(case: Case) -> Program:
    return next(p for p in [*PROGRAMS, DECODE] if p.name == case.program)


def operands(case: Case, program: Program) -> tuple[list[Tensor], Tensors]:
    """Create query, key and value (B, H, T, D) in bfloat16, stored as (B, T, H, D), and the program's tensors."""
    torch.manual_seed(0)
    heads = WIDTH // case.head_dim
    decode = program is DECODE
    batch = 1 if decode else max(1, TOKENS // case.length)

    def make(h: int, rows: int) -> Tensor:
        x = torch.randn(batch, rows, h, case.head_dim, device=DEVICE, dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_(case.train)

    groups = heads // program.groups
    some = [make(heads, 1 if decode else case.length), make(groups, case.length), make(groups, case.length)]
    return some, {n: t.to(DEVICE) for n, t in program.make(batch, heads, case.length).items()}


# -- contenders -----------------------------------------------------------------------------------
def by_hand(program: Program, x: Tensors, backend: str, **options: Any) -> Run:
    fast = torch.compile(program.by_hand, backend=backend, dynamic=False, **options)
    return lambda q, k, v: fast(q, k, v, x)


def flex(program: Program, x: Tensors, q: Tensor, k: Tensor) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    score, keep = program.score, program.keep
    score_mod = None if score is None else lambda s, b, h, i, j: score(s, h, i, j, x)
    mask = None
    if keep is not None:
        batch = q.shape[0] if program.make in (PROGRAMS[5].make, PROGRAMS[6].make) else None
        # not compiled: assembling its sort takes a minute for each length
        mask = create_block_mask(lambda b, h, i, j: keep(b, i, j, x), batch, None, q.shape[2], k.shape[2], DEVICE)
    fast = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: fast(q, k, v, score_mod, mask, enable_gqa=program.groups > 1)  # type: ignore[return-value]


def fused(program: Program, kernel: str) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert program.fused is not None
    backend = getattr(SDPBackend, kernel)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **program.fused)  # type: ignore[arg-type]

    return run


def contenders(program: Program, x: Tensors, q: Tensor, k: Tensor) -> dict[str, Callable[[], Run]]:
    some: dict[str, Callable[[], Run]] = {
        "attnfx": partial(by_hand, program, x, "attnfx", options={"rewrite": "always", "tiers": ["decode", "flash"]}),
        "flex": partial(flex, program, x, q, k),
    }
    if k.shape[2] <= NAIVE or program is DECODE:
        some["inductor"] = partial(by_hand, program, x, "inductor")
    if program.fused is not None:
        some |= {"sdpa flash": partial(fused, program, "FLASH_ATTENTION")}
        some |= {"sdpa cudnn": partial(fused, program, "CUDNN_ATTENTION")}
    return some


# -- measuring ------------------------------------------------------------------------------------
def call(run: Run, some: list[Tensor], grad: Tensor | None) -> Tensor:
    with torch.set_grad_enabled(grad is not None):
        out = run(*some)
        if grad is not None:
            for x in some:
                x.grad = None
            out.backward(grad)
    return out.detach()


def milliseconds(run: Callable[[], object]) -> float:
    start, stop = (torch.Event(DEVICE, enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def times(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Time each contender in turn, in several rounds, with a cold L2 cache. Return the least and the median ms. The
    times are the GPU's. If launching the call takes less time than flushing the cache, they exclude the launch."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device=DEVICE)
    found: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 100 and (rounds < 5 or time.perf_counter() < end):
        rounds += 1
        for name, run in runs.items():
            for _ in range(FLUSHES):
                flush.zero_()
            found[name].append(milliseconds(run))
    return {n: {"min_ms": min(t), "median_ms": statistics.median(t), "rounds": len(t)} for n, t in found.items()}


def errors(program: Program, case: Case, run: Run, some: list[Tensor], x: Tensors) -> dict[str, float]:
    """Return the errors of the output and, in training, the query gradient, on the first and last rows of a head."""
    rows = torch.arange(some[0].shape[2], device=DEVICE)
    rows = torch.cat([rows[:64], rows[64:][-64:]])
    torch.manual_seed(1)
    grad = torch.randn_like(some[0]) if case.train else None
    out = call(run, some, grad)
    with torch.enable_grad():
        query = some[0].detach().double().requires_grad_()
        want = reference(program, query, some[1].detach(), some[2].detach(), x, rows)
        pairs = {"out": (out[-1, -1, rows], want.detach())}
        if grad is not None:
            want.backward(grad[-1, -1, rows].double())
            assert some[0].grad is not None and query.grad is not None
            pairs["dq"] = some[0].grad[-1, -1, rows], query.grad[-1, -1, rows]
    return {n: ((got.double() - w).abs().max() / w.abs().max()).item() for n, (got, w) in pairs.items()}


def measure(case: Case, seconds: float, peak: float, copy: float) -> dict[str, Any]:
    """Measure a case and return its row of the results. A contender that fails has an "error"."""
    torch._dynamo.reset()
    program = program_of(case)
    some, x = operands(case, program)
    q, k, v = some
    grad = torch.randn_like(q) if case.train else None
    live = live_share(program, x, case.length, q.device) if program is not DECODE else 1.0
    flops = 4.0 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * case.head_dim * live * (3.5 if case.train else 1)
    row: dict[str, Any] = {**asdict(case), "batch": q.shape[0], "heads": q.shape[1], "live": round(live, 4), "by": {}}
    ready: dict[str, Callable[[], object]] = {}
    for name, make in contenders(program, x, q, k).items():
        row["by"][name] = {}
        try:
            run = make()
            row["by"][name]["errors"] = errors(program, case, run, some, x)
            call(run, some, grad)
            ready[name] = partial(call, run, some, grad)
        except Exception as problem:
            row["by"][name] = {"error": said(problem)}
        torch.cuda.empty_cache()
    for name, found in times(ready, seconds).items() if ready else ():
        rate = flops / found["min_ms"] / 1e9
        row["by"][name] |= found | {"tflops": round(rate, 1), "share_of_matmul": round(rate / peak, 3)}
        if program is DECODE:
            share = 2 * (k.numel() + v.numel()) / found["min_ms"] / 1e6 / copy
            row["by"][name]["share_of_copy"] = round(share, 3)
    ours = row["by"]["attnfx"].get("min_ms")
    if ours is not None:
        row["ratios"] = {n: round(b["min_ms"] / ours, 3) for n, b in row["by"].items() if "min_ms" in b}
    row["predicted"] = predicted(program, x, some, case.train)
    return row


def predicted(program: Program, x: Tensors, some: list[Tensor], train: bool) -> dict[str, Any]:
    """Return the cost model's choice, and its predicted ms for each tier."""
    with torch.set_grad_enabled(train):
        sites = attnfx.explain(lambda q, k, v: program.by_hand(q, k, v, x))(*some).sites
    if len(sites) != 1 or sites[0].decision is None:
        return {}
    decision = sites[0].decision
    ways: dict[str, float] = {}
    for way in (decision, *decision.alternatives):
        ways[way.tier] = min(way.predicted_ms, ways.get(way.tier, way.predicted_ms))
    return {"tier": decision.tier, "ms": ways}


def choice(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the cost model's choices. The ratios are ms of the chosen over the best, and over the original code.
    The errors are the relative errors of the predicted ms of attnfx's kernels."""
    regrets, against, errors = [], [], []
    for row in rows:
        got = {name: by["min_ms"] for name, by in row["by"].items() if "min_ms" in by}
        asked = row.get("predicted") or {}
        if "attnfx" not in got or not asked:
            continue
        ours = min((ms for tier, ms in asked["ms"].items() if tier in ("flash", "decode")), default=None)
        if ours is not None:
            errors.append(abs(ours / got["attnfx"] - 1))
        chosen = {"flash": "attnfx", "decode": "attnfx", "kept": "inductor"}.get(asked["tier"])
        if chosen in got and "inductor" in got:
            regrets.append(got[chosen] / min(got["attnfx"], got["inductor"]))
            against.append(got[chosen] / got["inductor"])
    found: dict[str, Any] = {"cases": len(regrets)}
    if regrets:
        found |= {"mean": statistics.mean(regrets), "p95": nearest_rank(regrets, 95), "over_original": max(against)}
    if errors:
        found |= {"error_mean": statistics.mean(errors), "error_p95": nearest_rank(errors, 95)}
    return {name: round(x, 4) for name, x in found.items()}


def nearest_rank(some: Sequence[float], percent: int) -> float:
    return sorted(some)[max(0, -(-percent * len(some) // 100) - 1)]


def rates() -> tuple[float, float]:
    """Measure the TFLOP/s of a bfloat16 matrix product, and the GB/s of a copy (bytes read plus written)."""
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    to = torch.empty_like(big)
    found = times({"matmul": lambda: x @ y, "copy": lambda: to.copy_(big)}, 2.0)
    return 2 * 8192**3 / found["matmul"]["min_ms"] / 1e9, 2 * big.numel() / found["copy"]["min_ms"] / 1e6


def line(row: dict[str, Any]) -> str:
    what = f"{row['program']:12} {row['length']:6} D{row['head_dim']:<4}{'step' if row['train'] else 'forward':8}"
    if "error" in row:
        return f"{what}[red]{row['error']}[/]"
    parts = [f"{n} {b['tflops']:.0f}" if "tflops" in b else f"[red]{n} failed[/]" for n, b in row["by"].items()]
    return what + ", ".join(parts) + " TFLOP/s"


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Answer a job of the child process: measure the rates, or a case."""
    if "case" not in job:
        return dict(zip(("peak", "copy"), rates()))
    return measure(Case(**job["case"]), job["seconds"], job["peak"], job["copy"])


@click.command(help=__doc__)
@click.option("--minutes", default=9.0, help="Start no measurement after this time.")
@click.option("--seconds", default=0.4, help="Time of each measurement, without compilation.")
@click.option("--only", default="", help="Run only programs whose name contains this text.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "gpu.json")
@click.option("--cases", "apart", is_flag=True, hidden=True)
def main(minutes: float, seconds: float, only: str, out: Path, apart: bool) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU that PyTorch can use: torch.cuda.is_available() is False")
    if apart:
        serve(answer, torch.cuda.synchronize)
        return
    console, end = Console(), time.monotonic() + 60 * minutes
    process = Apart([sys.executable, __file__, "--cases"], LIMIT)
    found = process.ask({})
    if "error" in found:
        raise click.ClickException(f"the GPU's rates cannot be measured: {found['error']}")
    peak, copy = found["peak"], found["copy"]
    properties = torch.cuda.get_device_properties(0)
    record: dict[str, Any] = {
        "machine": machine(), "gpu": properties.name, "capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda, "matmul_tflops": round(peak, 1), "copy_GBps": round(copy), "rows": [], "left": [],
    }  # fmt: skip
    console.print(f"{properties.name}: matmul {peak:.0f} TFLOP/s, copy {copy:.0f} GB/s")
    chosen = [case for case in cases() if only in case.program]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=f"{case.program} {case.length} D{case.head_dim}")
            if time.monotonic() < end:
                row = process.ask({"case": asdict(case), "seconds": seconds, **found})
                record["rows"].append({**asdict(case), "by": {}, **row})
                record["choice"] = choice(record["rows"])
                console.print(line(record["rows"][-1]))
            else:
                record["left"].append(asdict(case))
            progress.advance(task)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    process.close()
    console.print(f"choice: {record.get('choice')}")
    if record["left"]:
        console.print(f"[yellow]{len(record['left'])} of {len(chosen)} were not measured within {minutes:g} minutes")


if __name__ == "__main__":
    main()
