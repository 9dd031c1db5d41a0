"""Compare plans with a GPU: the predicted peak of a step and the largest batch. Write results/gpu_plan.json.

    python benchmarks/gpu_plan.py [--only NAME] [--minutes 8] [--budget 4GiB]

`error` compares the predicted peak with `torch.cuda.max_memory_allocated`, including parameters and gradients. Then a
process limited to --budget of the GPU's memory runs the predicted largest batch, which must fit ("fits"), and one a
tenth larger, which must not ("more_fits"). Every step runs in its own process for at most LIMIT seconds. If it fails,
its row has the reason as "failed".
"""

from __future__ import annotations

import importlib.util
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from measure import machine
from models import build
from plan import Step, batched
from torch import nn

HERE = Path(__file__).resolve().parent
DEVICE = "cuda"
LIMIT = 150  # seconds
# name, layers, tokens (2448: an image of 2448 tokens), batch
STEPS = (("gpt2", 12, 1024, 4), ("bert", 12, 512, 8), ("vit", 12, 2448, 2), ("mistral", 8, 2048, 4), ("t5", 12, 512, 4))


def planned(name: str, layers: int, size: int, batch: int, train: bool, budget: str | None) -> Any:
    import attnfx

    with torch.device("meta"):
        model, inputs = batched(build(name, layers, size, batch), batch)
    how = {} if budget is None else {"memory_budget": budget}
    return attnfx.plan(Step(model).train(train), target="auto", train=train, **how)(**inputs)


def step_of(
    name: str, layers: int, size: int, batch: int, train: bool, budget: str | None = None
) -> tuple[Callable[[], None], nn.Module]:
    """Compile a step on the GPU, and return a function that runs it, and its module."""
    torch.manual_seed(0)
    model, inputs = batched(build(name, layers, size, batch), batch)
    whole = Step(model).train(train).to(DEVICE)
    inputs = {key: x.to(DEVICE) for key, x in inputs.items()}
    options = {} if budget is None else {"memory_budget": budget}
    run = torch.compile(whole, backend="attnfx", dynamic=False, options=options)

    def step() -> None:
        with torch.set_grad_enabled(train):
            out = run(**inputs)
            if train:
                out.backward()

    return step, whole


def peak(name: str, layers: int, size: int, batch: int, train: bool) -> dict[str, Any]:
    predicted = planned(name, layers, size, batch, train, None).peak_bytes
    step, whole = step_of(name, layers, size, batch, train)
    step()  # compiles
    whole.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated()
    return {"predicted": predicted, "measured": measured, "error": round(predicted / measured - 1, 4)}


def largest(name: str, layers: int, size: int, batch: int, train: bool, budget: str) -> dict[str, Any]:
    return {"max_batch": planned(name, layers, size, batch, train, budget).max_batch}


def fits(name: str, layers: int, size: int, batch: int, train: bool, budget: str) -> dict[str, Any]:
    """Check whether a batch fits a budget, in two steps: the first one compiles."""
    from attnfx.memory.byte_size import check

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(check("--budget", budget) / total)  # type: ignore[operator]
    step, whole = step_of(name, layers, size, batch, train, budget)
    try:
        for _ in range(2):
            step()
            whole.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return {"fits": False}
    return {"fits": True}


JOBS = {job.__name__: job for job in (peak, largest, fits)}


def run(job: str, *arguments: Any) -> dict[str, Any]:
    """Run a job in its own process. If it fails, return its last line of stderr as "failed"."""
    command = [sys.executable, __file__, "--job", json.dumps([job, *arguments])]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"{job} took more than {LIMIT} s"}
    if ran.returncode:
        return {"failed": f"{job}: {(ran.stderr.strip().splitlines() or [''])[-1][:300]}"}
    return json.loads(ran.stdout.splitlines()[-1])


def measure(step: tuple[str, int, int, int], train: bool, budget: str) -> dict[str, Any]:
    name, layers, size, batch = step
    row: dict[str, Any] = {"name": name, "layers": layers, "size": size, "batch": batch, "train": train}
    row |= run("peak", *step, train)
    limit = run("largest", *step, train, budget)
    row |= limit
    if limit.get("max_batch"):
        n = limit["max_batch"]
        for key, number in (("fits", n), ("more_fits", -(-11 * n // 10))):
            found = run("fits", name, layers, size, number, train, budget)
            row |= {key: found.pop("fits", None), **found}
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [abs(row["error"]) for row in rows if "error" in row]
    limits = [row for row in rows if row.get("fits") is not None and row.get("more_fits") is not None]
    found: dict[str, Any] = {"steps": len(errors), "limits": len(limits)}
    if errors:
        found |= {"mean": round(statistics.mean(errors), 4), "worst": max(errors)}
    return found | {"limits_true": sum(row["fits"] and not row["more_fits"] for row in limits)}


@click.command(help=__doc__)
@click.option("--minutes", default=8.0, help="Start no step after this time.")
@click.option("--budget", default="4GiB", help="Memory budget for the largest batches.")
@click.option("--only", default="", help="Run only models whose name contains this text.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "gpu_plan.json")
@click.option("--job", hidden=True)
def main(minutes: float, budget: str, only: str, out: Path, job: str | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU that PyTorch can use: torch.cuda.is_available() is False")
    if importlib.util.find_spec("transformers") is None:
        raise click.ClickException("the models are of the transformers library, which is not installed")
    if job:
        logging.disable(logging.WARNING)
        name, *arguments = json.loads(job)
        print(json.dumps(JOBS[name](*arguments)))
        return
    end = time.monotonic() + 60 * minutes
    gpu = torch.cuda.get_device_properties(0).name
    record: dict[str, Any] = {"machine": machine(), "gpu": gpu, "budget": budget, "rows": [], "left": []}
    for train in (True, False):
        for step in STEPS:
            if only not in step[0]:
                continue
            if time.monotonic() > end:
                record["left"].append([*step, train])
                continue
            record["rows"].append(measure(step, train, budget))
            record["summary"] = summary(record["rows"])
            print(record["rows"][-1], flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    print(record.get("summary"), f"{len(record['left'])} steps were left out")


if __name__ == "__main__":
    main()
