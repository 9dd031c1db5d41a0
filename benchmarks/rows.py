"""Attention that needs whole rows of scores (talking heads, the best keys): time and peak of a step against eager.

A process per contender and program, each after a warm-up; operands (1, H, T, D) in float32. The step is one forward
and backward pass. Peaks are over what is in memory before the step: `peak_MiB` of the process, as the system counts its
pages; `live_MiB` of tensors that are alive, as the profiler counts PyTorch's allocations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from measure import give_back_freed_memory, machine, peak_over_base
from torch import Tensor

HERE = Path(__file__).resolve().parent


def talking_heads(query: Tensor, key: Tensor, value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    score = torch.einsum("bhij,hg->bgij", query @ key.mT * query.shape[-1] ** -0.5, before)
    return torch.einsum("bhij,hg->bgij", score.softmax(-1), after) @ value


def best_keys(query: Tensor, key: Tensor, value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    score = query @ key.mT * query.shape[-1] ** -0.5
    least = score.topk(32, dim=-1).values[..., -1:]
    return score.masked_fill(score < least, float("-inf")).softmax(-1) @ value


PROGRAMS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (talking_heads, best_keys)}
LIMITS = {"peak": 0.15, "time": 1.15}  # of attnfx's to eager's


def measure(program: str, contender: str, heads: int, length: int, width: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    function = PROGRAMS[program]
    run = function
    if contender != "eager":
        options = {"rewrite": "always"} if contender == "attnfx" else None
        run = torch.compile(function, backend=contender, dynamic=False, options=options)
    operands = [torch.randn(1, heads, length, width, requires_grad=True) for _ in range(3)]
    mixing = [(torch.eye(heads) + 0.1 * torch.randn(heads, heads)).requires_grad_() for _ in range(2)]
    grad = torch.randn(1, heads, length, width)

    def step() -> None:
        for x in (*operands, *mixing):
            x.grad = None
        run(*operands, *mixing).backward(grad)

    step()
    best = float("inf")
    clock = time.thread_time if threads == 1 else time.perf_counter
    for _ in range(2):
        start = clock()
        step()
        best = min(best, clock() - start)
    with torch.no_grad():
        run(*operands, *mixing)  # compiles it without gradients
        start = clock()
        run(*operands, *mixing)
        forward = clock() - start
    give_back_freed_memory()
    peak, _ = peak_over_base(step)
    sizes = {"peak_MiB": round(peak / 2**20, 1), "live_MiB": round(live_peak(step) / 2**20, 1)}
    return {"seconds": round(best, 3), "forward_seconds": round(forward, 3), **sizes}


def live_peak(run: Callable[[], object]) -> int:
    """The most bytes of tensors that `run` has alive, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most


@click.command(help=__doc__)
@click.option("--heads", default=12)
@click.option("--length", default=4096)
@click.option("--width", default=64)
@click.option("--threads", default=1)
@click.option("--contenders", default="eager,attnfx", help="also: inductor")
@click.option("--one", default="", hidden=True)
@click.option("--out", default=str(HERE / "results" / "rows.json"), type=click.Path())
def main(heads: int, length: int, width: int, threads: int, contenders: str, one: str, out: str) -> None:
    if one:
        program, contender = one.split(":")
        print(json.dumps(measure(program, contender, heads, length, width, threads)))
        return
    rows = {}
    for program in PROGRAMS:
        found = {}
        for contender in contenders.split(","):
            job = ["--one", f"{program}:{contender}", "--heads", heads, "--length", length, "--width", width]
            command = [sys.executable, str(HERE / "rows.py"), *map(str, job), "--threads", str(threads)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[contender] = json.loads(text.splitlines()[-1])
        eager, ours = found["eager"], found["attnfx"]
        names = {"peak": "peak_MiB", "live": "live_MiB", "time": "seconds", "forward": "forward_seconds"}
        ratios = {k: ours[name] / eager[name] for k, name in names.items()}
        rows[program] = {**found, "ratios": {k: round(v, 3) for k, v in ratios.items()}, "limits": LIMITS}
        click.echo(f"{program}: {json.dumps(rows[program])}")
    result = {"machine": machine(), "shape": [1, heads, length, width], "threads": threads, "programs": rows}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
