"""What became of each attention: sites, decisions, refusals, and the report that holds them."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from attnfx.spec import AttentionSpec


@dataclass(frozen=True)
class Refusal:
    """Why something that looks like attention was left as it was: a stable code, one sentence, the graph nodes that
    stopped the walk, and what the user can do."""

    code: str
    message: str
    nodes: tuple[str, ...] = ()
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]" + (f" {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Candidate:
    """One way to compute a site, with its predicted cost.

    predicted_ms      of one call: forward, or forward and backward where a backward pass follows
    predicted_bytes   what is alive at its peak beyond the inputs and the output
    saved_bytes       what is kept for the backward pass beyond the operands and the output
    tile              rows and keys of a kernel's tile; warps and stages as Triton counts them
    splits            parts that the decode kernel cuts the keys into
    """

    tier: str
    kernel: str
    predicted_ms: float = 0.0
    predicted_bytes: int = 0
    saved_bytes: int = 0
    tile: tuple[int, int] | None = None
    warps: int = 0
    stages: int = 0
    splits: int = 0


@dataclass(frozen=True)
class Decision(Candidate):
    """The candidate that was chosen for a site. `reason` is a sentence; `alternatives` are the other candidates."""

    reason: str = ""
    alternatives: tuple[Candidate, ...] = ()


@dataclass
class Site:
    """One attention found in a graph.

    dims: (B, H, G, T, S, D, Dv) as numbers, or text where symbolic. `where` is the user's "file.py:88".
    `notes` hold assumptions, and whether a kept site was shielded from other rewriters.
    """

    name: str
    where: str = ""
    spec: AttentionSpec | None = None
    dims: dict[str, int | str] = field(default_factory=dict)
    mask: str = ""
    decision: Decision | None = None
    refusal: Refusal | None = None
    notes: tuple[str, ...] = ()

    @property
    def rewritten(self) -> bool:
        return self.decision is not None and self.decision.tier != "kept"

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What had to run otherwise than decided in this process so far, a sentence each: for the site's spec."""
        with _lock:
            return () if self.spec is None else tuple(_fallbacks.get(self.spec, ()))

    def summary(self) -> str:
        """Heads, sizes, scale and dropout in words."""
        d = self.dims
        if not d or self.spec is None:
            return ""
        heads = f"{d['H']} heads" + (f" ({d['G']} for keys)" if d["G"] != d["H"] else "")
        widths = f"{d['D']}" + (f"/{d['Dv']}" if d["Dv"] != d["D"] else "")
        text = f"{heads}, {d['T']} x {d['S']} x {widths}, batch {d['B']}"
        return text + (f", dropout {self.spec.dropout:g}" if self.spec.dropout else "")


@dataclass
class Report:
    """What attnfx did with one model or graph."""

    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graphs: int = 1

    @property
    def rewritten(self) -> list[Site]:
        return [s for s in self.sites if s.rewritten]

    @property
    def kept(self) -> list[Site]:
        return [s for s in self.sites if not s.rewritten]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, record=False, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get().rstrip()

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        title = f"attnfx: {len(self.rewritten)} of {len(self.sites)} attention sites rewritten"
        table = Table(title=title, title_justify="left", show_lines=False, expand=False)
        for column in ("site", "where", "what", "mask", "decision"):
            table.add_column(column, overflow="fold")
        for site in self.sites:
            table.add_row(site.name, site.where, site.summary(), site.mask, self._decided(site))
        return Group(table, *(Text(f"note: {n}") for n in self.notes)) if self.sites or self.notes else Text(title)

    @staticmethod
    def _decided(site: Site) -> str:
        if site.refusal is not None:
            text = f"kept: {site.refusal}"
        elif site.decision is not None:
            text = f"{site.decision.tier}: {site.decision.reason}" if site.decision.reason else site.decision.tier
        else:
            text = ""
        return "; ".join((text, *site.notes, *site.fallbacks))


_filed: deque[Report] = deque(maxlen=1000)
_fallbacks: dict[AttentionSpec, list[str]] = {}  # by spec: kernels know no sites
_lock = threading.Lock()


def fell_back(spec: AttentionSpec, sentence: str) -> None:
    """Say, in the reports of every site of this spec and in one warning, that a kernel could not run as decided."""
    with _lock:
        told = _fallbacks.setdefault(spec, [])
        if sentence in told:
            return
        told.append(sentence)
    warnings.warn(f"attnfx: {sentence}", RuntimeWarning, stacklevel=2)


def file(report: Report) -> None:
    """Keep a report for `reports()`."""
    with _lock:
        _filed.append(report)


def reports() -> list[Report]:
    """The reports of the graphs that this process compiled, newest last (the last 1000)."""
    with _lock:
        return list(_filed)
