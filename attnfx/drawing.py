"""A plan as a table and as a picture."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from attnfx.memory.budget import text

if TYPE_CHECKING:
    from attnfx.plans import Plan

ROWS = 12  # of the largest values, in a table


def table(plan: Plan) -> Any:
    """A rich renderable: the peak and what is in it, the limits, each site's decision, what is computed again."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    kind = "training" if plan.train else "inference"
    title = f"attnfx: plan of {kind} on {plan.target.name}"
    facts = Table(title=title, title_justify="left", show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    limit = plan.budget if plan.budget is not None else plan.target.memory
    facts.add_row("peak", f"{text(plan.peak_bytes)} of {text(limit)}")
    for name, size in plan.parts().items():
        facts.add_row(f"  {name}", text(size))
    if plan.reserved_bytes is not None:
        facts.add_row("taken from the device", text(plan.reserved_bytes))
    facts.add_row("predicted time", f"{plan.predicted_ms:.2f} ms")
    for name, found in (("largest batch", plan.max_batch), ("largest length", plan.max_length)):
        facts.add_row(name, "not known, or not limited" if found is None else str(found))
    if plan.recomputed:
        size = sum(plan.recomputed.values())
        facts.add_row("computed again", f"{len(plan.recomputed)} values, {text(size)} that are not saved")

    sites = Table(title="attention", title_justify="left")
    for column in ("site", "where", "tier", "reason"):
        sites.add_column(column, overflow="fold")
    for site in plan.sites:
        chosen = site.decision
        tier = chosen.tier if chosen else "kept"
        sites.add_row(site.name, site.where, tier, chosen.reason if chosen else str(site.refusal or ""))

    largest = sorted(plan.saved.items(), key=lambda e: -e[1])[:ROWS]
    saved = Table(title=f"saved for the backward pass ({len(plan.saved)} values)", title_justify="left")
    for column in ("value", "size"):
        saved.add_column(column)
    for name, size in largest:
        saved.add_row(name, text(size))
    shown = [facts, *([sites] if plan.sites else []), *([saved] if largest else [])]
    return Group(*shown, *(Text(f"note: {n}") for n in plan.notes))


def plot(plan: Plan, path: str | PathLike[str]) -> None:
    """The bytes over the events of the step, one colour for each phase."""
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ImportError("to draw a plan, install matplotlib: pip install attnfx[plot]") from problem
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
