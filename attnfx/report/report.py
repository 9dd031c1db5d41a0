"""What became of each attention: sites, decisions, refusals, and the report that holds them."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from attnfx.report.records import Decision, Refusal, Site, share

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from attnfx.report.stages import Stage


@dataclass
class Report:
    """What attnfx did with one model or graph.

    sites    the attentions, rewritten or kept
    others   softmaxes of which no attention was made: each has a refusal
    notes    sentences about a whole graph
    graphs   how many graphs it is about
    flops    of all matrix products and convolutions of these graphs, forward
    stages   "traced", "lifted", "rewritten": the graphs as data, where they were asked for (`explain`, `dump_dir`)
    decided  of one graph: what was decided for each place, by the path of its body and its number there
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
        return [s for s in self.sites if s.rewritten]

    @property
    def kept(self) -> list[Site]:
        return [s for s in self.sites if not s.rewritten]

    def file_site(self, site: Site) -> None:
        """Add a site, under the next name."""
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
        """The stage of this name, made where there is none yet."""
        from attnfx.report.stages import Stage

        return self.stages.setdefault(name, Stage(name))

    def undo(self, code: str, message: str) -> None:
        """Note that every rewritten site stays as it was after all, and why."""
        for site in self.rewritten:
            site.decision, site.refusal = None, Refusal(code, message, where=site.where)

    def share(self, site: Site) -> float | None:
        """The site's part of the graphs' FLOPs; None where it is not known."""
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
        """The whole report as JSON, in the schema of docs/report.md."""
        return json.dumps(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """The whole report as JSON-ready values."""
        from attnfx.report.to_json import data

        return data(self.sites, self.others, self.notes, self.graphs, self.flops, self.stages)

    def to_html(self, path: str | Path, force: bool = False) -> None:
        """Write the report as one page for a browser, which needs no network.

        Raises FileExistsError where there is a file of that name, unless `force`.
        """
        from attnfx.report.html import write

        write(self.to_data(), path, force)

    @staticmethod
    def from_json(text: str) -> Report:
        """The inverse of `to_json`. Raises ValueError for another version's text."""
        from attnfx.report.to_json import fields

        return Report(**fields(text))


_filed: deque[Report] = deque(maxlen=1000)
_lock = threading.Lock()


def file(report: Report) -> None:
    """Keep a report for `reports()`."""
    with _lock:
        _filed.append(report)


def reports() -> list[Report]:
    """The reports of the graphs that this process compiled, newest last (the last 1000)."""
    with _lock:
        return list(_filed)
