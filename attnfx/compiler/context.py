"""Define the context that all steps of one compilation share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from attnfx.compiler.faults import Fault
from attnfx.options import Options
from attnfx.passes.fx.examples import Untraceable
from attnfx.report.records import Decision
from attnfx.report.report import Report

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """The options, report and state for one graph, or for the body of a higher-order operator in it.

    report    receives the results
    stages    whether the report records the graph's stages as data
    told      given decisions, in the form of `Report.decided`; other places are decided as usual
    faults    the parts that failed before and are left out, by name
    exercise  whether each new call is run once on tiny tensors
    inputs    the values of the graph's inputs, if they are known
    path      the path from the graph to the body; empty for the graph itself
    passes    with `dump_dir`, (pass, the graph's code after it) for each pass that changed the graph
    """

    options: Options
    report: Report
    stages: bool = False
    told: Mapping[tuple[str, int], Decision] = field(default_factory=dict)
    faults: Mapping[str, Fault] = field(default_factory=dict)
    exercise: bool = False
    inputs: Sequence[Any] = ()
    path: str = ""
    passes: list[tuple[str, str]] = field(default_factory=list)

    def attempt(self, name: str, run: Callable[[], T], otherwise: T) -> T:
        """Return the result of `run`, or `otherwise` if the part of this name has failed before. Raises Fault if it
        fails now; that a graph is untraceable does not count as a failure."""
        part = self._part(name)
        if part in self.faults:
            return otherwise
        try:
            return run()
        except (Fault, Untraceable):
            raise
        except Exception as problem:
            raise Fault(part, problem) from problem

    def fault(self, name: str) -> Fault | None:
        return self.faults.get(self._part(name))

    def _part(self, name: str) -> str:
        return f"{name} in the body {self.path.rstrip('/')}" if self.path else name

    def body(self, name: str) -> Context:
        """Return the context for the body in the attribute `name`."""
        return replace(self, path=f"{self.path}{name}/", inputs=())
