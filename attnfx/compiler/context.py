"""Hold what is asked of one compilation, through all of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from attnfx.compiler.faults import Fault, Faults, Part
from attnfx.options import Options
from attnfx.passes.fx.examples import Untraceable
from attnfx.report.records import Decision
from attnfx.report.report import Report

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What is asked of one graph, or of the body of a higher-order operator in it.

    report    what is found out is written here
    stages    whether the report is to hold the graph's stages as data
    told      what is to be decided, as another report's `decided` has it; what is not there is chosen
    faults    the parts that failed before, which are left out
    exercise  whether each new call is run once on tiny tensors
    path      leads to the body, from the graph itself; empty for that
    passes    with `dump_dir`, the graph's code after each pass that changed it, by the pass's name
    """

    options: Options
    report: Report
    stages: bool = False
    told: Mapping[tuple[str, int], Decision] = field(default_factory=dict)
    faults: Faults = field(default_factory=lambda: Faults((Untraceable,)))
    exercise: bool = False
    path: str = ""
    passes: list[tuple[str, str]] = field(default_factory=list)

    def attempt(self, name: str, run: Callable[[], T], otherwise: T) -> T:
        """What `run` gives; `otherwise` where the part of this name has failed before."""
        return self.faults.attempt(Part(self.path, name), run, otherwise)

    def fault(self, name: str) -> Fault | None:
        return self.faults.found.get(Part(self.path, name))

    def body(self, name: str) -> Context:
        """The context of the body that an attribute holds."""
        return replace(self, path=f"{self.path}{name}/")
