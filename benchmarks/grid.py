"""The calibration grid: over shapes, attnfx with rewrite="always" against Inductor on the same function.

The cost rule of a CPU is fitted to what this writes, results/grid.json: per point the shape and, for both, the time of
a call (a training step where `train`); `inductor_fused` says that Inductor's own patterns knew it. Operands are laid
out as in models: (B, T, H * D), split into heads and transposed inside the function. A point is measured in one
process, the two in turn. With --threads 1, as for the table that the rule was fitted to, the clock is the thread's own
time, which other programs on the machine do not touch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("plain", "causal", "window", "padding", "plain_upcast", "padding_upcast")


@dataclass(frozen=True)
class Point:
    """One shape. T queries and S keys of H heads of width D, in a batch of B."""

    program: str
    B: int
    H: int
    T: int
    S: int
    D: int
    dtype: str
    train: bool


KEY = tuple(field.name for field in fields(Point))


def points() -> Iterator[Point]:
    lengths = (64, 128, 256, 512, 1024, 2048, 4096)
    for train in (False, True):
        for program in PROGRAMS:
            for t in lengths:
                yield Point(program, 1, 8 if t == 4096 else 12, t, t, 64, "float32", train)
                if t <= 512:
                    yield Point(program, 8, 12, t, t, 64, "float32", train)
            yield Point(program, 64, 3, 49, 49, 32, "float32", train)  # windows of an image
    for program in PROGRAMS:
        for t in (128, 512, 2048):
            yield Point(program, 1, 12, t, t, 64, "bfloat16", False)
            if program in ("plain", "causal", "plain_upcast"):
                yield Point(program, 1, 12, t, t, 32, "float32", False)
                yield Point(program, 1, 12, t, t, 128, "float32", False)
        yield Point(program, 1, 12, 512, 512, 64, "bfloat16", True)
    for program in ("plain", "padding", "plain_upcast", "padding_upcast"):
        for s in (128, 1024, 4096):
            yield Point(program, 1, 12, 1, s, 64, "float32", False)  # one token against a cache


def measure(point: Point, threads: int) -> dict[str, object]:
    """The time of both for one point, and the largest difference of their results."""
    import torch
    from measure import interleaved
    from programs import make
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    torch._dynamo.reset()
    program = make(point.program, point.S)
    dtype = getattr(torch, point.dtype)

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        heads = [x.view(point.B, -1, point.H, point.D).transpose(1, 2) for x in (query, key, value)]
        return program(*heads, pad).transpose(1, 2).reshape(point.B, -1, point.H * point.D)

    operands = [
        torch.randn(point.B, n, point.H * point.D).to(dtype).requires_grad_(point.train)
        for n in (point.T, point.S, point.S)
    ]
    pad = torch.ones(point.B, point.S, dtype=torch.int64)
    pad[-1, point.S * 3 // 4 :] = 0
    grad = torch.randn(point.B, point.T, point.H * point.D).to(dtype)
    compiled = {
        "inductor": torch.compile(function, dynamic=False),
        "attnfx": torch.compile(function, backend="attnfx", options={"rewrite": "always"}, dynamic=False),
    }

    def call(name: str) -> torch.Tensor:
        with torch.set_grad_enabled(point.train):
            out = compiled[name](*operands, pad)
            if point.train:
                for x in operands:
                    x.grad = None
                out.backward(grad)
        return out.detach()

    counters.clear()
    matched = (call("inductor"), counters["inductor"]["fuse_attention"])[1]
    gap = (call("inductor").float() - call("attnfx").float()).abs().max().item()
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = interleaved({name: lambda name=name: call(name) for name in compiled}, seconds=0.6, least=3, clock=clock)
    ratio = times["attnfx"]["min_ms"] / times["inductor"]["min_ms"]
    return {**asdict(point), **times, "ratio": round(ratio, 3), "difference": gap, "inductor_fused": bool(matched)}


def work(threads: int) -> None:
    """Measures the points given on standard input, a line of JSON each."""
    import torch

    torch.set_num_threads(threads)
    for line in sys.stdin:
        print(json.dumps(measure(Point(**json.loads(line)), threads)), flush=True)


def groups(some: Sequence[Point]) -> list[list[Point]]:
    """Points that share a process: those of one program, dtype and direction."""
    out: dict[tuple[str, str, bool], list[Point]] = {}
    for p in some:
        out.setdefault((p.program, p.dtype, p.train), []).append(p)
    return list(out.values())


def main() -> None:
    from measure import machine
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "grid.json")
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="only this one (repeatable)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already holds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.threads)
    done: dict[str, dict[str, object]] = {}
    if options.out.exists() and not options.fresh:
        for got in json.loads(options.out.read_text())["points"]:
            done[json.dumps([got[name] for name in KEY])] = got
    missing = [p for p in points() if json.dumps([getattr(p, name) for name in KEY]) not in done]
    missing = [p for p in missing if p.program in (options.program or PROGRAMS)]
    record: dict[str, object] = {"what": __doc__, "machine": machine(), "threads": options.threads}
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, str(HERE / "grid.py"), "--work", f"--threads={options.threads}"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("grid", total=len(missing))
        for some in groups(missing):
            lines = "".join(json.dumps(asdict(p)) + "\n" for p in some)
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            ) as worker:
                assert worker.stdin and worker.stdout
                worker.stdin.write(lines)
                worker.stdin.close()
                for line in worker.stdout:
                    got = json.loads(line)
                    done[json.dumps([got[name] for name in KEY])] = got
                    way = "step" if got["train"] else "forward"
                    shape = f"{got['B']}x{got['H']}x{got['T']}x{got['S']}x{got['D']}"
                    progress.console.print(f"{got['program']:15}{shape:19}{got['dtype']:9}{way:8}{got['ratio']:.2f}")
                    progress.advance(task)
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(record | {"points": list(done.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
