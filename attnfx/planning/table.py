"""Render a plan as a table and as a plot."""

from __future__ import annotations

import re
from itertools import groupby
from os import PathLike
from typing import Any

from attnfx.memory.byte_size import text
from attnfx.planning.prediction import Prediction
from attnfx.report.records import Site

ROWS = 16  # of modules, in a table


def table(plan: Prediction) -> Any:
    """Return a rich renderable: the peak and its contents, limits, decisions, and saved and recomputed values."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    kind = "training" if plan.train else "inference"
    title = f"attnfx: plan of {kind} on {plan.target.name}"
    facts = Table(title=title, title_justify="left", show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    limit = plan.budget if plan.budget is not None else plan.target.memory
    top = max(plan.timeline, key=lambda m: m.bytes, default=None)
    place = "" if top is None else f", in the {top.phase} pass" + (f" at {top.where}" if top.where else "")
    facts.add_row("peak", f"{text(plan.peak_bytes)} of {text(limit)}{place}")
    for name, size in plan.parts().items():
        facts.add_row(f"  {name}", text(size))
    if plan.reserved_bytes is not None:
        facts.add_row("reserved by the allocator", text(plan.reserved_bytes))
    facts.add_row("predicted time", f"{plan.predicted_ms:.2f} ms")
    for name, found in (("largest batch", plan.max_batch), ("largest length", plan.max_length)):
        facts.add_row(name, "unknown or unlimited" if found is None else str(found))
    if plan.recomputed:
        size = sum(plan.recomputed.values())
        facts.add_row(
            "recomputed", f"{len(plan.recomputed)} values, {text(size)}, which are not saved for the backward pass"
        )
    if not plan.strategy.waits:
        facts.add_row("dead memory", "is freed at once instead of being reused by a later value")

    sites = Table(title="attention", title_justify="left")
    for column in ("site", "where", "tier", "reason"):
        sites.add_column(column, overflow="fold")
    for names, row in _sites(plan):
        sites.add_row(names, *row)

    held = Table(title="for the backward pass, by module", title_justify="left")
    for column in ("module", "saved", "recomputed"):
        held.add_column(column, overflow="fold")
    rows = by_module(plan)
    for module, sizes in list(rows.items())[:ROWS]:
        held.add_row(module or "(no module)", *(text(size) if size else "" for size in sizes))
    if len(rows) > ROWS:
        rest = [sum(sizes[n] for sizes in list(rows.values())[ROWS:]) for n in (0, 1)]
        held.add_row(f"{len(rows) - ROWS} others", *(text(size) if size else "" for size in rest))
    shown = [facts, *([sites] if plan.sites else []), *([held] if rows else [])]
    return Group(*shown, *(Text(f"note: {n}") for n in plan.notes))


def _sites(plan: Prediction) -> list[tuple[str, tuple[str, str, str]]]:
    """Return rows (names, (where, tier, reason)); consecutive sites with the same decision share a row."""

    def row(site: Site) -> tuple[str, str, str]:
        chosen = site.decision
        tier = chosen.tier if chosen else "kept"
        if tier == "chunked" and plan.strategy.chunk:
            tier += f", {plan.strategy.chunk} scores at once"
        return site.where, tier, chosen.reason if chosen else str(site.refusal or "")

    rows = [([site.name for site in same], found) for found, same in groupby(plan.sites, row)]
    return [
        (names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})", found) for names, found in rows
    ]


def by_module(plan: Prediction) -> dict[str, tuple[int, int]]:
    """Return (saved bytes, recomputed bytes) by module, the largest first; layers of a list are one: "h.*.mlp"."""
    made = {
        f"{n}.{r.name}": re.sub(r"\b\d+\b", "*", op.where)
        for n, part in enumerate(plan.strategy.parts) for op in part.forward.ops for r in op.results
    }  # fmt: skip
    sums: dict[str, list[int]] = {}
    for which, values in enumerate((plan.saved, plan.recomputed)):
        for name, size in values.items():
            sums.setdefault(made.get(name, ""), [0, 0])[which] += size
    return {m: (a, b) for m, (a, b) in sorted(sums.items(), key=lambda e: -sum(e[1]))}


def plot(plan: Prediction, path: str | PathLike[str]) -> None:
    """Plot the bytes over the events of the step, with one color for each phase."""
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ImportError("drawing a plan needs matplotlib: pip install attnfx[plot]") from problem
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots()
    gib = [m.bytes / 2**30 for m in plan.timeline]
    for name in dict.fromkeys(m.phase for m in plan.timeline):
        at = [n for n, m in enumerate(plan.timeline) if m.phase == name]
        axes.fill_between(at, [gib[n] for n in at], step="post", alpha=0.6, label=name)
    if plan.budget is not None:
        axes.axhline(plan.budget / 2**30, color="black", linestyle="--", label="budget")
    axes.set_xlabel("allocator events")
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120, bbox_inches="tight")
