"""Measure the grids to which the CPU's cost rule is fitted: each tier against Inductor on the same function.

Each point of results/grid.json has a shape, the spec that was found, and `times` of a call, or with `train` of a
training step: "kept" (the function under Inductor), and "library" and "chunked" if they can run it. `inductor_fused`
states that Inductor's own patterns matched the function. Operands have the layout of models: (B, T, H * D), split into
heads and transposed inside the function. A point is measured in one process, the contenders in turn. With --threads 1,
as for the table that the rule is fitted to, the clock is the thread's own time, on which other programs have little
influence. --fit fits the rule's rates to the file and prints the cost of the resulting choices.

results/grid_held_out.json (--grid held_out) has held-out points, whose shapes are not in the grid.
results/grid_flex.json (--grid flex) has points with the tier "flex" as well, measured on another machine: the rates of
that tier are fitted to its time in proportion to the fastest other contender of the same run, whose time the rule
predicts. results/grid_decode.json (--grid decode) has decode steps, all measured on one machine; the rates of few
queries are fitted to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from grid_points import Point, decode_points, flex_points, groups, held_out, key_of, points

HERE = Path(__file__).resolve().parent
TIERS = ("library", "chunked")
# grid -> its points, its file, and the tiers that are measured
GRIDS: dict[str, tuple[Callable[[], Iterator[Point]], str, tuple[str, ...]]] = {
    "all": (points, "grid.json", TIERS),
    "held_out": (held_out, "grid_held_out.json", TIERS),
    "flex": (flex_points, "grid_flex.json", (*TIERS, "flex")),
    "decode": (decode_points, "grid_decode.json", (*TIERS, "flex")),
}


def operands_of(point: Point) -> list[Any]:
    """Create query, key and value of a point, and the fourth operand of its program."""
    import torch

    dtype = getattr(torch, point.dtype)
    lengths = (point.T, point.H), (point.S, point.G), (point.S, point.G)
    operands = [torch.randn(point.B, n, heads * point.D).to(dtype).requires_grad_(point.train) for n, heads in lengths]
    seen = torch.ones(point.B, point.S, dtype=torch.int64)
    seen[-1, point.S * 3 // 4 :] = 0
    if point.program == "relative":
        more = torch.randn(65, point.H).to(dtype).requires_grad_(point.train)
    elif point.program == "masked":
        hidden = torch.ones(point.T, point.S, dtype=torch.bool).triu(1)
        more = torch.zeros(1, 1, point.T, point.S, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    elif point.program.startswith("decoding"):
        growing = point.program.endswith("growing")
        past = point.S - point.T if growing else point.S
        operands[1:] = [torch.randn(point.B, point.G, past, point.D).to(dtype) for _ in range(2)]
        bias = (1 - seen[:, None, None].expand(-1, -1, point.T, -1)).to(dtype) * torch.finfo(dtype).min
        more = torch.randn(2, point.B, point.G, point.T, point.D).to(dtype) if growing else bias
    else:
        more = seen
    return [*operands, more]


def measure(point: Point, threads: int, tiers: Sequence[str] = TIERS) -> dict[str, object]:
    """Measure each tier for one point, and the largest difference of their results from Inductor's."""
    import torch
    from measure import interleaved
    from programs import make
    from torch._dynamo.utils import counters

    import attnfx

    torch.manual_seed(0)
    torch._dynamo.reset()
    program, operands = make(point.program, point.S), operands_of(point)

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        heads = [
            x if x.ndim == 4 else x.view(point.B, x.shape[1], -1, point.D).transpose(1, 2) for x in (query, key, value)
        ]
        return program(*heads, more).transpose(1, 2).reshape(point.B, -1, point.H * point.D)

    dtype = getattr(torch, point.dtype)
    grad = torch.randn(point.B, point.T, point.H * point.D).to(dtype)

    compiled = {"kept": torch.compile(function, dynamic=False)}
    site = None
    for tier in tiers:
        options: dict[str, Any] = {"rewrite": "always", "tiers": [tier]}
        with torch.set_grad_enabled(point.train):
            (found,) = attnfx.explain(function, **options)(*operands).sites
        if found.rewritten:
            site = found
            compiled[tier] = torch.compile(function, backend="attnfx", options=options, dynamic=False)
    assert site is not None and site.spec is not None

    def call(name: str) -> torch.Tensor:
        with torch.set_grad_enabled(point.train):
            out = compiled[name](*operands)
            if point.train:
                for x in operands:
                    x.grad = None
                out.backward(grad)
        return out.detach()

    counters.clear()
    expected = call("kept").float()
    matched = counters["inductor"]["fuse_attention"]
    gap = max((call(name).float() - expected).abs().max().item() for name in compiled)
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = interleaved({name: partial(call, name) for name in compiled}, seconds=0.8, least=3, clock=clock)
    return {
        **asdict(point), "times": times, "difference": gap, "inductor_fused": bool(matched),
        "dims": site.dims, "spec": site.spec.to_json(),
    }  # fmt: skip


def work(threads: int, tiers: Sequence[str]) -> None:
    """Measure the points given on standard input, one line of JSON each."""
    import torch

    torch.set_num_threads(threads)
    for line in sys.stdin:
        print(json.dumps(measure(Point(**json.loads(line)), threads, tiers)), flush=True)


def main() -> None:
    from measure import machine
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--grid", choices=GRIDS, default="all", help="the points to measure, each in its own file")
    parser.add_argument("--out", type=Path, help="another file than the grid's own in results/")
    parser.add_argument("--program", action="append", help="only this one (repeatable)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already holds")
    parser.add_argument("--fit", action="store_true", help="measure nothing: fit the cost rule to the files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted, file, tiers = GRIDS[options.grid]
    if options.work:
        return work(options.threads, tiers)
    if options.fit:
        from grid_fit import report_fit

        return report_fit()
    out = options.out or HERE / "results" / file
    done: dict[str, dict[str, object]] = {}
    if out.exists() and not options.fresh:
        done = {key_of(got): got for got in json.loads(out.read_text())["points"]}
    missing = [p for p in wanted() if key_of(asdict(p)) not in done]
    missing = [p for p in missing if p.program in (options.program or [p.program])]
    record: dict[str, object] = {"what": __doc__, "machine": machine(), "threads": options.threads}
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [
        sys.executable,
        str(HERE / "grid.py"),
        "--work",
        f"--threads={options.threads}",
        f"--grid={options.grid}",
    ]
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
                    done[key_of(got)] = got
                    way = "step" if got["train"] else "forward"
                    shape = f"{got['B']}x{got['H']}x{got['T']}x{got['S']}x{got['D']}"
                    times = "".join(f"{name} {t['min_ms']:<9}" for name, t in got["times"].items())
                    progress.console.print(f"{got['program']:27}{shape:19}{got['dtype']:9}{way:8}{times}")
                    progress.advance(task)
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_text(json.dumps(record | {"points": list(done.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
