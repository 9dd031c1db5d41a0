"""Measure the grid to which the CPU's cost rule is fitted: each tier against Inductor on the same function.

Each point of results/grid.json has a shape, the spec that was found, and `times` of a call, or with `train` of a
training step: "kept" (the function under Inductor), and "library" and "chunked" if they can run it. `inductor_fused`
states that Inductor's own patterns matched the function. Operands have the layout of models: (B, T, H * D), split into
heads and transposed inside the function. A point is measured in one process, the contenders in turn. With --threads 1,
as for the table that the rule is fitted to, the clock is the thread's own time, on which other programs have little
influence. --fit fits the rule's rates to the file and prints the cost of the resulting choices.

results/grid_held_out.json (--held-out) has held-out points, whose shapes are not in the grid. results/grid_flex.json
(--flex) has points with the tier "flex" as well, measured on another machine: the rates of that tier are fitted to
its time in proportion to the fastest other contender of the same run, whose time the rule predicts.
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
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HELD_OUT_FILE = HERE / "results" / "grid_held_out.json"
FLEX_FILE = HERE / "results" / "grid_flex.json"
TIERS = ("library", "chunked")


@dataclass(frozen=True)
class Point:
    """One program and shape: T queries of H heads and S keys of G heads, all of width D, in a batch of B."""

    program: str
    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    dtype: str
    train: bool


KEY = tuple(field.name for field in fields(Point))
# program -> lengths, in float32: forward passes, then training steps
FORWARD = {
    "plain": (256, 512, 1024, 2048),
    "plain_upcast": (64, 128, 256, 512, 1024, 2048, 4096),
    "causal": (64, 128, 256, 512, 1024, 2048, 4096),
    "window": (128, 256, 512, 1024, 2048, 4096),
    "padding": (128, 512, 1024, 2048),
    "padding_upcast": (128, 256, 512, 1024, 2048),
    "alibi": (128, 512, 2048),
    "relative": (128, 512),
    "masked": (128, 512, 2048),
    "softcap": (128, 512, 2048),
    "grouped": (128, 512),
    "fused_masked": (512, 2048),
}
TRAINING = {
    "plain": (512,),
    "plain_upcast": (128, 512, 1024),
    "causal": (128, 256, 512, 1024),
    "window": (256, 512, 1024),
    "padding_upcast": (256, 512),
    "alibi": (256,),
    "relative": (128, 512),
    "masked": (512,),
    "softcap": (128, 512),
    "grouped": (256, 1024),
    "dropout": (128, 256, 512, 1024),
    "fused_masked": (256, 1024),
}
HALVES = {"plain_upcast": (512,), "causal": (128, 512, 2048), "padding_upcast": (512,)}
HALVES_TRAINING = {"causal": (256, 1024), "dropout": (512,)}
BATCHES = {"plain_upcast": (128, 512), "causal": (64, 256, 512), "padding_upcast": (128, 512)}
BATCHES_TRAINING = {"plain_upcast": (128, 512), "causal": (128,), "dropout": (128,)}


def points() -> Iterator[Point]:
    def each(table: dict[str, tuple[int, ...]], batch: int, dtype: str, train: bool) -> Iterator[Point]:
        for program, lengths in table.items():
            for t in lengths:
                heads = 4 if t == 4096 else 12
                yield Point(
                    program, batch, heads, heads // 4 if program == "grouped" else heads, t, t, 64, dtype, train
                )

    yield from each(FORWARD, 1, "float32", False)
    yield from each(BATCHES, 8, "float32", False)
    yield from each(HALVES, 1, "bfloat16", False)
    yield from each(TRAINING, 1, "float32", True)
    yield from each(BATCHES_TRAINING, 8, "float32", True)
    yield from each(HALVES_TRAINING, 1, "bfloat16", True)
    for program in ("plain_upcast", "relative"):
        yield Point(program, 64, 3, 3, 49, 49, 32, "float32", False)  # windows of an image
    for program in ("plain_upcast", "causal"):
        for width in (32, 128):
            yield Point(program, 1, 12, 12, 512, 512, width, "float32", False)
        yield Point(program, 1, 12, 12, 2048, 2048, 128, "float32", False)
        yield Point(program, 1, 12, 12, 512, 512, 128, "float32", True)
    for program in ("plain_upcast", "padding_upcast"):
        for t, s in ((1, 1024), (1, 4096), (32, 2048)):  # few queries against a cache
            yield Point(program, 1, 12, 12, t, s, 64, "float32", False)


# The points with the tier "flex", forward passes: program -> lengths, in float32 and in bfloat16
FLEX = {
    "plain_upcast": (128, 512, 2048),
    "causal": (256, 2048),
    "window": (2048,),
    "padding_upcast": (512, 2048),
    "alibi": (512, 2048),
    "relative": (512,),
    "softcap": (256, 2048),
    "masked": (512,),
}
FLEX_HALVES = {"causal": (512, 2048), "plain_upcast": (512,)}


def flex_points() -> Iterator[Point]:
    for table, dtype in ((FLEX, "float32"), (FLEX_HALVES, "bfloat16")):
        for program, lengths in table.items():
            yield from (Point(program, 1, 8, 8, t, t, 64, dtype, False) for t in lengths)
    for program in ("plain_upcast", "causal"):
        yield Point(program, 8, 8, 8, 256, 256, 64, "float32", False)
        yield Point(program, 1, 8, 8, 1024, 1024, 128, "float32", False)
    yield Point("plain_upcast", 1, 8, 8, 1, 2048, 64, "float32", False)


# Held-out points, whose shapes are not in the grid: B, H, G, T, S, D.
HELD_OUT = {
    ("float32", False): {
        "plain": ((2, 4, 4, 700, 700, 96),),
        "plain_upcast": ((4, 12, 12, 197, 197, 48), (2, 8, 8, 64, 1500, 64), (8, 16, 16, 1, 777, 64)),
        "causal": ((2, 4, 4, 800, 800, 80), (1, 8, 8, 96, 96, 160)),
        "window": ((1, 8, 8, 1500, 1500, 64), (4, 6, 6, 200, 200, 32)),
        "padding": ((8, 6, 6, 77, 77, 64), (2, 8, 8, 400, 400, 96)),
        "padding_upcast": (
            (2, 8, 8, 16, 1500, 64),
            (4, 8, 8, 8, 512, 96),
            (16, 12, 12, 32, 32, 32),
            (1, 16, 16, 640, 640, 40),
        ),
        "alibi": ((2, 8, 8, 384, 384, 80),),
        "relative": ((2, 6, 6, 200, 200, 32),),
        "masked": ((1, 8, 8, 700, 700, 128),),
        "softcap": ((1, 8, 8, 640, 640, 96),),
        "grouped": ((1, 16, 4, 900, 900, 128),),
    },
    ("bfloat16", False): {
        "plain_upcast": ((2, 8, 8, 400, 400, 64),),
        "padding_upcast": ((2, 12, 12, 200, 200, 64),),
        "causal": ((1, 8, 8, 1200, 1200, 96),),
    },
    ("float32", True): {
        "plain_upcast": ((4, 8, 8, 197, 197, 64), (2, 8, 8, 100, 400, 64)),
        "causal": ((2, 6, 6, 300, 300, 80), (1, 4, 4, 1500, 1500, 64)),
        "dropout": ((2, 8, 8, 200, 200, 64), (1, 6, 6, 700, 700, 32)),
        "padding_upcast": ((4, 8, 8, 160, 160, 64),),
        "window": ((1, 8, 8, 900, 900, 64),),
        "softcap": ((1, 6, 6, 300, 300, 64),),
        "grouped": ((1, 8, 2, 600, 600, 64),),
    },
    ("bfloat16", True): {"causal": ((1, 8, 8, 600, 600, 64),)},
}


def held_out() -> Iterator[Point]:
    for (dtype, train), programs in HELD_OUT.items():
        for program, shapes in programs.items():
            yield from (Point(program, *shape, dtype, train) for shape in shapes)


def measure(point: Point, threads: int, tiers: Sequence[str] = TIERS) -> dict[str, object]:
    """Measure each tier for one point, and the largest difference of their results from Inductor's."""
    import torch
    from measure import interleaved
    from programs import make
    from torch._dynamo.utils import counters

    import attnfx

    torch.manual_seed(0)
    torch._dynamo.reset()
    program = make(point.program, point.S)
    dtype = getattr(torch, point.dtype)

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        heads = [x.view(point.B, x.shape[1], -1, point.D).transpose(1, 2) for x in (query, key, value)]
        return program(*heads, more).transpose(1, 2).reshape(point.B, -1, point.H * point.D)

    operands = [
        torch.randn(point.B, n, heads * point.D).to(dtype).requires_grad_(point.train)
        for n, heads in ((point.T, point.H), (point.S, point.G), (point.S, point.G))
    ]
    if point.program == "relative":
        operands.append(torch.randn(65, point.H).to(dtype).requires_grad_(point.train))
    elif point.program == "masked":
        hidden = torch.ones(point.T, point.S, dtype=torch.bool).triu(1)
        operands.append(torch.zeros(1, 1, point.T, point.S, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min))
    else:
        operands.append(torch.ones(point.B, point.S, dtype=torch.int64))
        operands[-1][-1, point.S * 3 // 4 :] = 0
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


def groups(some: Sequence[Point]) -> list[list[Point]]:
    """Group points by program, dtype and direction; a group shares a process."""
    out: dict[tuple[str, str, bool], list[Point]] = {}
    for p in some:
        out.setdefault((p.program, p.dtype, p.train), []).append(p)
    return list(out.values())


def key_of(point: Any) -> str:
    return json.dumps([point[name] for name in KEY])


# -- the fit --------------------------------------------------------------------------------------
def question(got: dict[str, Any]) -> Any:
    """Create the question for the cost model about a measured point."""
    from attnfx.cost import Question
    from attnfx.spec import from_json

    refused = {tier: "not measured" for tier in ("flash", "decode", "flex", *TIERS) if tier not in got["times"]}
    native = got["program"].startswith("fused")
    return Question(from_json(got["spec"]), got["dims"], got["dtype"], training=got["train"], native=native,
                    refused=refused)  # fmt: skip


def ways(got: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (way of computing, ms) of a point for each way that the cost model has rates for."""
    by_call = got["inductor_fused"] or got["program"].startswith("fused")
    if not (got["inductor_fused"] and got["program"] == "dropout"):  # a pattern match, but not to the fused operator
        yield "fused" if by_call else "inductor", got["times"]["kept"]["min_ms"]
    else:
        yield "inductor", got["times"]["kept"]["min_ms"]
    for tier in TIERS:
        borrowed = tier == "library" and got["train"] and any(c.grad for c in question(got).spec.captures)
        if tier in got["times"] and not borrowed:  # a borrowed backward pass is the chunked tier's
            yield tier, got["times"][tier]["min_ms"]


def fit(points: Sequence[dict[str, Any]], train: bool) -> dict[str, Any]:
    """Fit nonnegative Rates for each way of computing, by least squares of the relative errors. The rate of repeated
    keys stays: decode steps, of which it is the larger part, are not in the grid."""
    from attnfx.cost import cpu

    names = [field.name for field in fields(cpu.Rates) if field.name != "repeated"]
    before = cpu.TRAINING if train else cpu.FORWARD
    rows: dict[str, list[list[float]]] = {}
    for got in points:
        if got["train"] == train:
            for way, ms in ways(got):
                todo = cpu.work(question(got), way)
                rows.setdefault(way, []).append([getattr(todo, name) / (ms * 1e6) for name in names])
    return {
        way: cpu.Rates(**dict(zip(names, not_negative(found))), repeated=before[way].repeated)
        for way, found in rows.items()
    }


def in_proportion(got: dict[str, Any]) -> float:
    """Return the ms of the tier "flex" on the machine of the grid: as many times the predicted ms of the fastest other
    contender as it took of the measured ones."""
    from attnfx.cost import cpu

    ms, way = min((ms, way) for way, ms in ways(got))
    return got["times"]["flex"]["min_ms"] / ms * cpu.time(question(got), way, 1)


def fit_flex(points: Sequence[dict[str, Any]]) -> tuple[Any, float]:
    """Fit the Rates of the tier "flex", and return them with their mean error."""
    from attnfx.cost import cpu

    names = [field.name for field in fields(cpu.Rates) if field.name not in ("repeated", "spilled", "draw")]
    rows = []
    for got in points:
        todo, ms = cpu.work(question(got), "flex"), in_proportion(got)
        rows.append([getattr(todo, name) / (ms * 1e6) for name in names])
    found = not_negative(rows)
    errors = [abs(sum(x * r for x, r in zip(row, found)) - 1) for row in rows]
    return cpu.Rates(**dict(zip(names, found))), sum(errors) / len(errors)


def not_negative(rows: list[list[float]], rounds: int = 3000) -> list[float]:
    """Minimize |rows . x - 1| over x >= 0 by coordinate descent on scaled columns."""
    columns = list(zip(*rows))
    scale = [max(c) or 1.0 for c in columns]
    columns = [[v / s for v in c] for c, s in zip(columns, scale)]
    gram = [[sum(a * b for a, b in zip(x, y)) for y in columns] for x in columns]
    target = [sum(c) for c in columns]
    x = [0.0] * len(columns)
    for _ in range(rounds):
        for j, row in enumerate(gram):
            if row[j] > 0:
                x[j] = max(0.0, x[j] - (sum(a * b for a, b in zip(row, x)) - target[j]) / row[j])
    return [float(f"{v / s:.3g}") if v > 1e-6 else 0.0 for v, s in zip(x, scale)]


def chosen(point: dict[str, Any]) -> str:
    """Return the tier that the default takes at a measured point; "kept" is the original."""
    from attnfx.cost import select
    from attnfx.options import Options

    return select(question(point), Options()).tier


def regret(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute the regret of the choices: the time of the chosen over the best candidate, and over the original."""
    over_best, over_original = [], []
    for got in points:
        times = {name: t["min_ms"] for name, t in got["times"].items()}
        ours = times[chosen(got)]
        over_best.append(ours / min(times.values()))
        over_original.append(ours / times["kept"])
    over_best.sort()
    return {
        "points": len(over_best), "mean": sum(over_best) / len(over_best),
        "p95": over_best[max(0, -(-95 * len(over_best) // 100) - 1)], "worst": over_best[-1],
        "over_original": max(over_original),
    }  # fmt: skip


def use(some: Sequence[dict[str, Any]]) -> None:
    """Fit the cost model's rates to some points, and decide by them from now on."""
    from attnfx.cost import cpu

    cpu.FORWARD.update(fit(some, False))
    cpu.TRAINING.update(fit(some, True))


def out_of_sample(points: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the regret of each half of the points under rates fitted to the other half; restore the rates."""
    from attnfx.cost import cpu

    before = dict(cpu.FORWARD), dict(cpu.TRAINING)
    halves, found = (points[0::2], points[1::2]), []
    try:
        for some, rest in (halves, halves[::-1]):
            use(some)
            found.append(regret(rest))
    finally:
        cpu.FORWARD.update(before[0])
        cpu.TRAINING.update(before[1])
    return found


def report_fit(points: list[dict[str, Any]]) -> None:
    """Print the table for attnfx/cost/cpu.py, its errors, and the regret: in sample, cross-validated and held out."""
    from attnfx.cost import cpu

    def say(what: str, found: dict[str, float]) -> None:
        print(f"{what}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))

    say("regret by the rates in attnfx/cost/cpu.py", regret(points))
    for number, found in enumerate(out_of_sample(points), 1):
        say(f"regret by cross-validation, half {number}", found)
    use(points)
    say("regret by the rates below", regret(points))
    if HELD_OUT_FILE.exists():
        say("regret on the held-out points", regret(json.loads(HELD_OUT_FILE.read_text())["points"]))
    if FLEX_FILE.exists():
        measured = json.loads(FLEX_FILE.read_text())["points"]
        cpu.FORWARD["flex"], wrong = fit_flex(measured)
        given = ", ".join(f"{k}={v:g}" for k, v in vars(cpu.FORWARD["flex"]).items() if v)
        print(f'# {len(measured)} points, mean error {wrong:.0%}\n"flex": Rates({given}),')
        say("regret on the points with flex, by the contenders of their machine", regret(measured))
    for name, table in (("FORWARD", cpu.FORWARD), ("TRAINING", cpu.TRAINING)):
        print(f"{name} = {{")
        for way, rates in table.items():
            given = ", ".join(f"{k}={v:g}" for k, v in vars(rates).items() if v)
            errors = [
                abs(cpu.time(question(got), way, 1) / ms - 1)
                for got in points
                if got["train"] == (name == "TRAINING")
                for found, ms in ways(got)
                if found == way
            ]
            if errors:
                print(f"    # {len(errors)} points, mean error {sum(errors) / len(errors):.0%}")
            print(f'    "{way}": Rates({given}),')
        print("}")


def main() -> None:
    from measure import machine
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="default: results/grid.json, or grid_held_out.json beside it")
    parser.add_argument("--held-out", action="store_true", help="measure the held-out points")
    parser.add_argument("--flex", action="store_true", help='measure the points with the tier "flex"')
    parser.add_argument("--program", action="append", help="only this one (repeatable)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already holds")
    parser.add_argument("--fit", action="store_true", help="measure nothing: fit the cost rule to the file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.threads, (*TIERS, "flex") if options.flex else TIERS)
    default = FLEX_FILE if options.flex else HELD_OUT_FILE if options.held_out else HERE / "results" / "grid.json"
    options.out = options.out or default
    if options.fit:
        return report_fit(json.loads(options.out.read_text())["points"])
    done: dict[str, dict[str, object]] = {}
    if options.out.exists() and not options.fresh:
        done = {key_of(got): got for got in json.loads(options.out.read_text())["points"]}
    wanted = flex_points() if options.flex else held_out() if options.held_out else points()
    missing = [p for p in wanted if key_of(asdict(p)) not in done]
    missing = [p for p in missing if p.program in (options.program or [p.program])]
    record: dict[str, object] = {"what": __doc__, "machine": machine(), "threads": options.threads}
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, str(HERE / "grid.py"), "--work", f"--threads={options.threads}"]
    command += ["--flex"] if options.flex else []
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
                    progress.console.print(f"{got['program']:15}{shape:19}{got['dtype']:9}{way:8}{times}")
                    progress.advance(task)
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(record | {"points": list(done.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
