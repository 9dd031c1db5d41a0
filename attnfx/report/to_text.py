"""Print a report as text: a table of the sites, the reasons for kept sites, and the other softmaxes.

Sites that are equal except for their names, such as a model's layers, share a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attnfx.report.records import Candidate, Site, share

WIDTH = 120
PLACE = 28  # longest source location that is not wrapped, in characters
QUIET = ("not_attention", "no_values", "shared_keys")  # codes of other softmaxes, listed without a message
T = TypeVar("T")


def text(sites: Sequence[Site], others: Sequence[Site], notes: Sequence[str], flops: int) -> str:
    """Return a report's fields as plain text, 120 columns wide."""
    console = Console(width=WIDTH, record=False, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(renderable(sites, others, notes, flops))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def renderable(
    sites: Sequence[Site], others: Sequence[Site], notes: Sequence[str], flops: int
) -> RenderableType:  # fmt: skip
    """Return a report's fields for `rich.print`; `text` returns the same as plain text."""
    title = f"attnfx: {sum(s.rewritten for s in sites)} of {len(sites)} attention sites rewritten"
    lines = [*_why(sites), *_others(others), *(f"note: {n}" for n in notes)]
    below = [Text(line) for line in lines]
    return Group(_table(sites, flops, title) if sites else Text(title), *below)


def _table(every: Sequence[Site], flops: int, title: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=False, expand=False)
    for column in ("site", "where", "what", "mask", "decision"):
        table.add_column(column, overflow="fold")
    table.columns[1].no_wrap = max(len(s.where) for s in every) <= PLACE
    for column in ("predicted", "share"):
        table.add_column(column, no_wrap=True, justify="right")
    for sites in _groups(every, _row):
        shares = [x for s in sites if (x := share(s, flops)) is not None]
        table.add_row(escape(names(sites)), *map(escape, _row(sites[0])), f"{sum(shares):.0%}" if shares else "")
    return table


def _row(site: Site) -> tuple[str, ...]:
    code = "" if site.rewritten else f"kept: {site.code}".removesuffix(": ")
    made = site.decision
    if made is None:
        return (site.where, site.summary(), site.mask, code, "")
    return (site.where, site.summary(), site.mask, code or made.tier, _predicted(made.original, made))


def _predicted(before: Candidate | None, after: Candidate) -> str:
    """Format time and peak memory of the original and, if it was rewritten, of the rewrite."""
    both = (before, after)
    times = _pair([_number(c.predicted_ms) if c is not None and c.predicted_ms else "" for c in both])
    known = any(c is not None and c.predicted_bytes for c in both)
    sizes = _pair([_number(c.predicted_bytes / 2**20) if c is not None and known else "" for c in both])
    return "\n".join(f"{value} {unit}" for value, unit in ((times, "ms"), (sizes, "MiB")) if value)


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x >= 1 else f"{x:.2g}"


def _pair(values: list[str]) -> str:
    return values[0] if values[0] == values[1] else " -> ".join(v or "?" for v in values)


def _why(sites: Sequence[Site]) -> Iterable[str]:
    """Yield a line for each set of reason, notes and fallbacks, with the sites that share it."""
    for group in _groups(sites, _said):
        if said := _said(group[0]):
            yield f"{names(group)}: {said}"


def _said(site: Site) -> str:
    reason = ""
    if site.refusal is not None:
        reason = f"kept: {site.refusal}"
        reason += f" Closest form that is rewritten: {site.refusal.closest}."
    elif site.decision is not None and site.decision.reason:
        made = site.decision
        reason = f"{made.tier}: {made.reason}"
        if made.code:
            reason += f" [{made.code}]. {made.hint} Closest form that is rewritten: {made.closest}."
    notes = "; ".join((*site.notes, *site.fallbacks))
    return f"{reason} Note: {notes}." if reason.endswith(".") and notes else "; ".join(filter(None, (reason, notes)))


def _others(sites: Sequence[Site]) -> Iterable[str]:
    """Yield a line for the other softmaxes of each reason; codes in QUIET without their message."""
    for group in _groups(sites, lambda s: s.code if s.code in QUIET else (s.code, s.refusal and s.refusal.message)):
        code, refusal = group[0].code, group[0].refusal
        found = _places(group)
        places = ", ".join(f"{w} ({len(s)} times)" if len(s) > 1 else w for w, s in found)
        if code in QUIET or refusal is None:
            yield f"other softmaxes: {len(group)} [{code}] at {places}"
        else:
            why = refusal if len(found) == 1 and refusal.where != found[0][0] else replace(refusal, where="")
            yield f"other softmaxes: {len(group)} at {places}: {why}"


def _places(sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    return [(group[0].where or "an unknown line", group) for group in _groups(sites, lambda s: s.where)]


def _groups(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group items by key, in the order in which each key first occurs."""
    found: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return list(found.values())


def names(sites: Sequence[Site]) -> str:
    """Join site names: "attention_0", or for several "attention_0-11 (12)", "attention_0, 2, .. 46 (24)"."""
    numbers = [int(s.name.rsplit("_", 1)[1]) if s.name.startswith("attention_") else -1 for s in sites]
    if min(numbers) < 0:
        return ", ".join(s.name for s in sites)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs]
    if len(parts) > 4:
        parts = [*parts[:2], f".. {parts[-1]}"]
    return "attention_" + ", ".join(parts) + (f" ({len(sites)})" if len(sites) > 1 else "")
