"""Measure the project's performance goals on a CPU, one process per measurement, and write results/<group>.json.

\b
attention   attention alone, causal and a sliding window: eager, Inductor, Inductor on PyTorch's fused attention
models      Llama and Mistral shapes at 4096 tokens: eager, Inductor, Inductor on the model's fused attention ("sdpa")
usual       BERT, GPT-2, T5, Swin and ViT at their usual sizes against Inductor: never slower
memory      the peak of a training step of a ViT and of the Llama and Mistral shapes; contenders as for models
compile     attnfx's share of a cold compile, and its growth with the number of layers
generate    `generate()` of Llama, Qwen2 and Mistral shapes with grouped heads, 4096 tokens in the cache

All contenders of a time ratio run in turn in one process, and the ratio compares their shortest times.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from apart import once
from measure import machine
from page import direction
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent


@dataclass
class Row:
    """One line of a table: its job, and the limits of attnfx's ratio to each contender."""

    name: str
    job: dict[str, Any]
    limits: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


EVERY = ["eager", "inductor", "sdpa"]  # the contenders beside attnfx


def attention(program: str, train: bool, limit: float) -> Row:
    job = {"kind": "attention", "program": program, "H": 8, "T": 4096, "D": 64, "train": train}
    job |= {"contenders": [*EVERY, "attnfx"], "seconds": 10}
    passes = "forward and backward" if train else "forward"
    return Row(f"{program.replace(':', ' ')}, 8 x 4096 x 64, {passes}", job, {"inductor": limit})


def model(name: str, layers: int, size: int, batch: int, train: bool, limits: dict[str, float], seconds: int) -> Row:
    job = {"kind": "model", "model": [name, layers, size, batch], "train": train}
    others = EVERY if "sdpa" in limits else list(limits)
    job |= {"contenders": [*others, "attnfx"], "seconds": seconds}
    return Row(f"{name}, {layers} layers, {batch} x {size}, {direction(train)}", job, limits)


def memory(name: str, layers: int, size: int, train: bool, limits: dict[str, float]) -> Row:
    job = {"kind": "memory", "model": [name, layers, size, 1], "train": train, "backends": [*EVERY, "attnfx"]}
    return Row(f"{name}, {layers} layers, 1 x {size}, {direction(train)}", job, limits)


def compiling(name: str, layers: int, inner: str, limits: dict[str, float]) -> Row:
    job = {"kind": "compile", "model": [name, layers, 128, 1], "inner": inner, "train": False}
    return Row(f"{name}, {layers} layers, {inner}", job, limits)


def generating(name: str, cache: str) -> Row:
    job = {"kind": "generate", "model": [name, 4, 4096, 64], "cache": cache, "train": False}
    job |= {"contenders": ["inductor", "sdpa", "attnfx"], "seconds": 5}
    return Row(f"{name}, 4 layers, 64 tokens after 4096, {cache} cache", job, {"inductor": 0.333, "sdpa": 1.0})


# name, layers, tokens or pixels, batch
USUAL = [
    ("bert", 2, 128, 8),
    ("bert", 2, 512, 2),
    ("gpt2", 2, 512, 2),
    ("t5", 2, 512, 2),
    ("swin", 4, 224, 2),
    ("vit", 2, 224, 4),
]
GROUPS = {
    "attention": [
        attention("causal", False, 0.4),
        attention("causal", True, 0.5),
        attention("window:512", False, 0.25),
        attention("window:512", True, 0.5),
    ],
    "models": [
        model("llama", 4, 4096, 1, False, {"inductor": 0.75, "sdpa": 1.0}, 15),
        model("mistral", 4, 4096, 1, False, {"inductor": 0.6, "sdpa": 1.0}, 15),
    ],
    "usual": [model(*shape, train, {"inductor": 1.05}, 10) for shape in USUAL for train in (False, True)],
    "memory": [
        memory("vit", 3, 2448, True, {"eager": 0.27}),
        *(memory(name, 4, 4096, train, {}) for name in ("llama", "mistral") for train in (False, True)),
    ],
    "compile": [
        *(compiling(name, 12, "inductor", {"whole": 0.03}) for name in ("gpt2", "bert", "llama")),
        *(compiling("gpt2", layers, "eager", {}) for layers in (12, 24, 48)),
    ],
    "generate": [generating(name, cache) for name in ("Llama", "Qwen2", "Mistral") for cache in ("dynamic", "static")],
}


def work(job: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run one job and return its result, or {"error": its last line of stderr}."""
    environment = os.environ | {
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(HERE / "worker.py"), json.dumps(job | {"threads": threads})]
    return once(command, env=environment)


def measure(row: Row, threads: int) -> None:
    """Run the row's jobs, and fill in its result and ratios."""
    if "backends" in row.job:
        parts = {backend: work(row.job | {"backend": backend}, threads) for backend in row.job["backends"]}
        failed = [part["error"] for part in parts.values() if "error" in part]
        row.result = {"error": failed[0]} if failed else {"by_backend": parts}
        amounts = {} if failed else {backend: part["peak_bytes"] for backend, part in parts.items()}
    else:
        row.result = work(row.job, threads)
        amounts = {name: t["min_ms"] for name, t in row.result.get("times", {}).items()}
        if "share" in row.result:
            row.result["ratios"] = {"whole": row.result["share"]}
    if amounts:
        row.result["ratios"] = {
            name: round(amounts["attnfx"] / amount, 3) for name, amount in amounts.items() if name != "attnfx"
        }


def detail(result: dict[str, Any]) -> str:
    """Format the measurements behind a row's ratios."""
    if "error" in result:
        return f"[red]{result['error']}"
    if "times" in result:
        text = ", ".join(f"{name} {t['min_ms']:.1f}" for name, t in result["times"].items()) + " ms"
        return text + (f"; {result['rewritten']} of {result['sites']} sites" if "sites" in result else "")
    if "by_backend" in result:
        return (
            ", ".join(f"{name} {part['peak_bytes'] / 2**20:.0f}" for name, part in result["by_backend"].items())
            + " MiB"
        )
    return f"attnfx {result['attnfx_s']:.2f} s of {result['whole_s']:.1f} s; CPU time {result['cpu_share']:.1%}"


def table(group: str, rows: list[Row]) -> Table:
    made = Table(title=f"{group}: attnfx relative to the others", title_justify="left")
    for column in ("", "ratio", "limit", "measured"):
        made.add_column(column)
    for row in rows:
        ratios = row.result.get("ratios", {})
        good = all(ratios.get(name, 9.9) <= limit for name, limit in row.limits.items())
        made.add_row(
            row.name,
            "\n".join(f"{ratio:.3f} of {name}" for name, ratio in ratios.items()),
            "\n".join(f"{row.limits[name]:g}" if name in row.limits else "" for name in ratios),
            detail(row.result),
            style="" if good else "red",
        )
    return made


@click.command(help=__doc__)
@click.argument("groups", nargs=-1, type=click.Choice(list(GROUPS)))
@click.option("--threads", type=int, help="With 1, measure the thread's own time. [default: all]")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results", help="Folder for the JSON files.")
def main(groups: tuple[str, ...], threads: int | None, out: Path) -> None:
    threads = threads or len(os.sched_getaffinity(0))
    console = Console()
    chosen = {group: GROUPS[group] for group in groups or GROUPS}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        whole = progress.add_task("all", total=sum(map(len, chosen.values())))
        for group, rows in chosen.items():
            path = out / (f"{group}.json" if threads > 1 else f"{group}-one-thread.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            record: dict[str, Any] = {"group": group, "machine": machine(), "threads": threads, "rows": []}
            for row in rows:
                progress.update(whole, description=row.name)
                measure(row, threads)
                progress.advance(whole)
                record["rows"].append({"name": row.name, "job": row.job, "limits": row.limits, **row.result})
                path.write_text(json.dumps(record, indent=1) + "\n")
            console.print(table(group, rows))


if __name__ == "__main__":
    main()
