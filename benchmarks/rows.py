"""Measure attention that needs whole rows of scores (talking heads, top keys): time and peak of a step against eager.

Each contender and program has its own process and a warm-up; operands are (1, H, T, D) in float32. A step is one
forward and backward pass. Peaks exclude memory in use before the step. `peak_MiB` is resident memory of the process,
`live_MiB` is memory of live tensors, from the profiler's record of PyTorch's allocations. Contenders that are not
measured keep their results in the file, if machine and sizes are the same.

`activations` measures one program with a quarter, half and all of the keys. It has the bytes that a training step saves
in addition to its operands and result, and the peak of a forward pass in addition to them, call by call, for chunks of
three sizes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

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


def best_causal_keys(query: Tensor, key: Tensor, value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    score = query @ key.mT * query.shape[-1] ** -0.5
    future = torch.arange(query.shape[2])[:, None] < torch.arange(key.shape[2])
    score = score.masked_fill(future, float("-inf"))
    least = score.topk(32, dim=-1).values[..., -1:]
    return score.masked_fill(score < least, float("-inf")).softmax(-1) @ value


PROGRAMS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (talking_heads, best_keys, best_causal_keys)}
LIMITS = {"peak": 0.15, "time": 1.15}  # the largest ratios of attnfx to eager


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
        run(*operands, *mixing)  # compiles the function without gradients
        start = clock()
        run(*operands, *mixing)
        forward = clock() - start
    give_back_freed_memory()
    peak, _ = peak_over_base(step)
    sizes = {"peak_MiB": round(peak / 2**20, 1), "live_MiB": round(live_peak(step) / 2**20, 1)}
    return {"seconds": round(best, 3), "forward_seconds": round(forward, 3), **sizes}


def changes(run: Callable[[], object]) -> list[int]:
    """Return the bytes of tensors that `run` allocates and releases (negative), in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def live_peak(run: Callable[[], object]) -> int:
    """Return the peak of the live tensors' bytes during `run`, without those alive before."""
    return max(accumulate(changes(run)))


def activations(heads: int, length: int, width: int) -> list[dict[str, object]]:
    """Measure `best_keys` with a quarter of `length` rows and an increasing number of keys."""
    from attnfx.kernels.rows import run as kernel

    found: list[dict[str, object]] = []
    for n in (length // 4, length // 2, length):
        sizes = (length // 4, n, n)
        operands = [torch.randn(1, heads, size, width, requires_grad=True) for size in sizes]
        mixing = [torch.eye(heads)] * 2
        torch._dynamo.reset()
        run = torch.compile(best_keys, backend="attnfx", dynamic=False, options={"rewrite": "always", "inner": "eager"})
        whole = heads * sizes[0] * width * 4  # bytes of the result
        kernel.TILE_ELEMENTS = {"cpu": heads * n * 64}
        run(*operands, *mixing)
        result: list[Tensor] = []
        kept = sum(changes(lambda: result.append(run(*operands, *mixing))))  # noqa: B023
        alive = {}
        for rows in (64, 32, 16):
            kernel.TILE_ELEMENTS = {"cpu": heads * n * rows}
            with torch.no_grad():
                run(*operands, *mixing)
                # events with equal timestamps are unordered, so take the maximum of several runs
                most = max(live_peak(lambda: run(*operands, *mixing)) for _ in range(5))  # noqa: B023
            alive[rows] = round((most - whole) / 2**20, 2)
        found.append({"rows": sizes[0], "keys": n, "saved_bytes": kept - whole, "chunk_MiB_by_rows": alive})
    return found


@click.command(help=__doc__)
@click.option("--heads", default=12)
@click.option("--length", default=4096)
@click.option("--width", default=64)
@click.option("--threads", default=1)
@click.option("--contenders", default="eager,attnfx", help="also: inductor; or none")
@click.option("--programs", default=",".join(PROGRAMS))
@click.option("--one", default="", hidden=True)
@click.option("--out", default=str(HERE / "results" / "rows.json"), type=click.Path())
def main(heads: int, length: int, width: int, threads: int, contenders: str, programs: str, one: str, out: str) -> None:
    if one == "activations":
        print(json.dumps(activations(heads, length, width)))
        return
    if one:
        program, contender = one.split(":")
        print(json.dumps(measure(program, contender, heads, length, width, threads)))
        return
    about = {"machine": machine(), "shape": [1, heads, length, width], "threads": threads}
    rows = _before(Path(out), about)

    def measured(what: str) -> object:
        job = ["--one", what, "--heads", heads, "--length", length, "--width", width, "--threads", threads]
        command = [sys.executable, str(HERE / "rows.py"), *map(str, job)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    for program in programs.split(","):
        found = rows.setdefault(program, {})
        for contender in contenders.split(",") if contenders else ():
            found[contender] = measured(f"{program}:{contender}")
        if {"eager", "attnfx"} <= found.keys():
            names = {"peak": "peak_MiB", "live": "live_MiB", "time": "seconds", "forward": "forward_seconds"}
            ratios = {k: found["attnfx"][name] / found["eager"][name] for k, name in names.items()}
            found |= {"ratios": {k: round(v, 3) for k, v in ratios.items()}, "limits": LIMITS}
        click.echo(f"{program}: {json.dumps(found)}")
    result = {**about, "programs": rows, "activations": measured("activations")}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


def _before(path: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the file's programs if they were measured on this machine with these sizes."""
    if not path.exists():
        return {}
    old = json.loads(path.read_text())
    same = all(old[k] == about[k] for k in ("shape", "threads")) and old["machine"]["cpu"] == about["machine"]["cpu"]
    return old["programs"] if same else {}


if __name__ == "__main__":
    main()
