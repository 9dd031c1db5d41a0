"""Fit the rates of the CPU's cost rule to the measured grids, and compute the regret of its choices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TIERS = ("library", "chunked")


def question(got: dict[str, Any]) -> Any:
    """Create the question for the cost model about a measured point."""
    from attnfx.cost import Question
    from attnfx.spec import from_json

    refused = {tier: "not measured" for tier in ("flash", "decode", "flex", *TIERS) if tier not in got["times"]}
    native = got["program"].startswith("fused")
    single = got["program"].startswith("decoding") and got["T"] == 1
    return Question(from_json(got["spec"]), got["dims"], got["dtype"], training=got["train"], native=native,
                    single=single, refused=refused)  # fmt: skip


def ways(got: dict[str, Any], tiers: Sequence[str] = TIERS) -> Iterator[tuple[str, float]]:
    """Yield (way of computing, ms) of a point for each way that the cost model has rates for."""
    by_call = got["inductor_fused"] or got["program"].startswith("fused")
    if got["inductor_fused"] and got["program"] == "dropout":  # a pattern match, but not to the fused operator
        by_call = False
    single = got["T"] == 1 and not got["train"]
    yield "fused" if by_call else "single" if single else "inductor", got["times"]["kept"]["min_ms"]
    for tier in tiers:
        borrowed = tier == "library" and got["train"] and any(c.grad for c in question(got).spec.captures)
        if tier in got["times"] and not borrowed:  # a borrowed backward pass is the chunked tier's
            yield tier, got["times"][tier]["min_ms"]


def fit(points: Sequence[dict[str, Any]], train: bool) -> dict[str, Any]:
    """Fit nonnegative Rates for each way of computing, by least squares of the relative errors, to the points with more
    than a few queries. The rate of repeated keys stays."""
    from attnfx.cost import cpu

    before = cpu.TRAINING if train else cpu.FORWARD
    some = [(got, way, ms) for got in points if got["train"] == train for way, ms in ways(got)]
    found = rates([x for x in some if not cpu.few(question(x[0]))], leaving=("repeated",))
    return {way: replace(x, repeated=before[way].repeated) for way, x in found.items()}


def decode_times(points: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str, float]]:
    """Return (point, way, ms) of decode steps. Of a growing cache only the original's fused call counts, which no
    static cache has, without the time of joining the cache: it is what "chunked" takes longer for such points."""
    from attnfx.cost import cpu

    def joined(got: dict[str, Any]) -> float:
        return 2.0 * got["B"] * got["G"] * got["S"] * got["D"] * question(got).element / 4

    growing = [got for got in points if got["program"].endswith("growing")]
    names = [field.name for field in fields(cpu.Rates)]
    rows = []
    for got in points:
        todo, ms = cpu.work(question(got), "chunked"), got["times"]["chunked"]["min_ms"]
        more = joined(got) if got in growing else 0.0
        rows.append([x / (ms * 1e6) for x in (more, *(getattr(todo, name) for name in names))])
    each = not_negative(rows)[0] / 1e6
    static = [(got, way, ms) for got in points if got not in growing for way, ms in ways(got, (*TIERS, "flex"))]
    fused = [(got, way, ms - joined(got) * each) for got in growing for way, ms in ways(got) if way == "fused"]
    return static + [x for x in fused if x[2] > 0.1 * x[0]["times"]["kept"]["min_ms"]]


def fit_decoding(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit the Rates of decode steps."""
    return rates(decode_times(points), leaving=("program", "spilled", "draw"))


def rates(measured: Sequence[tuple[dict[str, Any], str, float]], leaving: Sequence[str] = ()) -> dict[str, Any]:
    """Fit the Rates of each way to (point, way, ms), except for the rates to leave at zero."""
    from attnfx.cost import cpu

    names = [field.name for field in fields(cpu.Rates) if field.name not in leaving]
    rows: dict[str, list[list[float]]] = {}
    for got, way, ms in measured:
        todo = cpu.work(question(got), way)
        rows.setdefault(way, []).append([getattr(todo, name) / (ms * 1e6) for name in names])
    return {way: cpu.Rates(**dict(zip(names, not_negative(found)))) for way, found in rows.items()}


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
    for got in (p for p in points if not cpu.few(question(p))):
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


def use_decoding(some: Sequence[dict[str, Any]]) -> None:
    """Fit the cost model's rates of few queries to some decode steps, and decide by them from now on."""
    from attnfx.cost import cpu

    cpu.DECODING.update(fit_decoding(some))


def out_of_sample(
    points: Sequence[dict[str, Any]], refit: Callable[[Sequence[dict[str, Any]]], None] = use
) -> list[dict[str, float]]:
    """Return the regret of each half of the points under rates fitted to the other half; restore the rates."""
    from attnfx.cost import cpu

    tables = cpu.FORWARD, cpu.TRAINING, cpu.DECODING
    before = [dict(table) for table in tables]
    halves, found = (points[0::2], points[1::2]), []
    try:
        for some, rest in (halves, halves[::-1]):
            refit(some)
            found.append(regret(rest))
    finally:
        for table, old in zip(tables, before):
            table.update(old)
    return found


def report_fit() -> None:
    """Print the tables for attnfx/cost/cpu.py, their errors, and the regret in sample, cross-validated and held out."""
    from attnfx.cost import cpu

    def say(what: str, found: dict[str, float]) -> None:
        print(f"{what}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))

    fitted, others, with_flex, decode = map(stored, ("grid", "grid_held_out", "grid_flex", "grid_decode"))
    say("regret by the rates in attnfx/cost/cpu.py", regret(fitted))
    for number, found in enumerate(out_of_sample(fitted), 1):
        say(f"regret by cross-validation, half {number}", found)
    use(fitted)
    say("regret by the rates below", regret(fitted))
    say("regret on the held-out points", regret(others))
    cpu.FORWARD["flex"], wrong = fit_flex(with_flex)
    given = ", ".join(f"{k}={v:g}" for k, v in vars(cpu.FORWARD["flex"]).items() if v)
    print(f'# {len(with_flex)} points, mean error {wrong:.0%}\n"flex": Rates({given}),')
    say("regret on the points with flex, by the contenders of their machine", regret(with_flex))
    say("regret on decode steps", regret(decode))
    use_decoding(decode)
    say("regret on decode steps by the rates below", regret(decode))
    plain = [(got, way, ms) for got in fitted for way, ms in ways(got) if not cpu.few(question(got))]
    for name, table, measured in (
        ("FORWARD", cpu.FORWARD, [x for x in plain if not x[0]["train"]]),
        ("TRAINING", cpu.TRAINING, [x for x in plain if x[0]["train"]]),
        ("DECODING", cpu.DECODING, decode_times(decode)),
    ):
        print(f"{name} = {{")
        for way, rate in table.items():
            given = ", ".join(f"{k}={v:g}" for k, v in vars(rate).items() if v)
            errors = [abs(cpu.time(question(got), way, 1) / ms - 1) for got, found, ms in measured if found == way]
            if errors:
                print(f"    # {len(errors)} points, mean error {sum(errors) / len(errors):.0%}")
            print(f'    "{way}": Rates({given}),')
        print("}")


def stored(name: str) -> list[dict[str, Any]]:
    """Read the points of a grid."""
    return json.loads((RESULTS / f"{name}.json").read_text())["points"]
