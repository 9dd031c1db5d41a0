"""Collect sites, decisions and refusals in reports, and keep the reports of this process."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from attnfx.report import to_json
from attnfx.report.records import Decision, Refusal, Site, share
from attnfx.report.stages import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType


@dataclass
class Report:
    """A report on one model or graph. Iterating over it yields its sites; `str(report)` is a table.

    sites    the attentions, rewritten or kept
    others   the softmaxes that are not attention, each with a refusal
    notes    sentences about a whole graph
    graphs   the number of graphs
    flops    FLOPs of all matrix products and convolutions of these graphs, forward
    stages   "traced", "lifted", "rewritten": the graphs as data, if requested (`explain`, `dump_dir`)
    decided  for a single graph: the decision on each place, by the path of its body and its number there
    """

    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graphs: int = 1
    others: list[Site] = field(default_factory=list)
    flops: int = 0
    stages: dict[str, Stage] = field(default_factory=dict)
    decided: dict[tuple[str, int], Decision] = field(default_factory=dict)

    @property
    def rewritten(self) -> list[Site]:
        """Return the sites that are rewritten."""
        return [s for s in self.sites if s.rewritten]

    @property
    def kept(self) -> list[Site]:
        """Return the sites whose original code is kept, by decision or because they were refused."""
        return [s for s in self.sites if not s.rewritten]

    def file_site(self, site: Site) -> None:
        """Add a site under the next name."""
        site.name = f"attention_{len(self.sites)}"
        self.sites.append(site)

    def take(self, other: Report) -> None:
        """Add the report of another graph of the same call."""
        names = {s.name: f"attention_{len(self.sites) + n}" for n, s in enumerate(other.sites)}
        for site in other.sites:
            self.file_site(site)
        for site in other.others:
            self.others.append(replace(site, name=f"softmax_{len(self.others)}"))
        for name, stage in other.stages.items():
            self.stage(name).add(stage, f"{self.graphs}/", names)
        self.notes.extend(n for n in other.notes if n not in self.notes)
        self.flops += other.flops
        self.graphs += 1

    def stage(self, name: str) -> Stage:
        """Return the stage of this name, creating it if needed."""
        return self.stages.setdefault(name, Stage(name))

    def undo(self, code: str, message: str) -> None:
        """Mark every rewritten site as refused, because its rewrite is not used after all."""
        for site in self.rewritten:
            site.decision, site.refusal = None, Refusal(code, message, where=site.where)

    def share(self, site: Site) -> float | None:
        """Return the site's share of the graphs' FLOPs, as a fraction; None if unknown."""
        return share(site, self.flops)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __str__(self) -> str:
        from attnfx.report.to_text import text

        return text(self.sites, self.others, self.notes, self.flops)

    def __rich__(self) -> RenderableType:
        from attnfx.report.to_text import renderable

        return renderable(self.sites, self.others, self.notes, self.flops)

    def to_json(self) -> str:
        """Return the whole report as JSON, in the schema of docs/report.md."""
        return json.dumps(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """Return the whole report as JSON-ready values."""
        return to_json.data(self.sites, self.others, self.notes, self.graphs, self.flops, self.stages)

    def to_html(self, path: str | Path, force: bool = False) -> None:
        """Write the report as one self-contained HTML page.

        Raises FileExistsError if the file exists, unless `force`.
        """
        from attnfx.report.html import write

        write(self.to_data(), path, force)

    @staticmethod
    def from_json(text: str) -> Report:
        """Read a report from the output of `to_json`.

        Raises ValueError for text that is not JSON, and for another version of the schema.
        """
        return Report(**to_json.fields(text))


_filed: deque[Report] = deque(maxlen=1000)
_lock = threading.Lock()


def file(report: Report) -> None:
    """Keep a report for `reports()`."""
    with _lock:
        _filed.append(report)


def reports() -> list[Report]:
    """Return the reports on the last 1000 graphs that this process compiled with the backend, newest last."""
    with _lock:
        return list(_filed)
