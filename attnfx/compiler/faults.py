"""Failures of attnfx itself: each costs the part in which it happened, and nothing else.

A graph is rewritten in named parts: a pass, one site, the body of a higher-order operator. Where a part raises, the
graph, which may be half changed by then, is rewritten anew without that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Where something is done: `path` leads to the body of a higher-order operator, empty for the graph itself."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} in the body {self.path.rstrip('/')}" if self.path else self.name


class Exercised(Exception):
    """A call that a site becomes fails on tiny tensors; the cause is what it raised."""


class Fault(Exception):
    """A part failed with `problem`. `code` is that of the refusal for a site."""

    def __init__(self, part: Part, problem: Exception, code: str):
        super().__init__(f"{part}: {described(problem)}")
        self.part, self.problem, self.code = part, problem, code


@dataclass
class Faults:
    """The parts of one graph that failed, which are left out when it is rewritten again.

    passing   exceptions that are no failure of a part
    """

    passing: tuple[type[Exception], ...] = ()
    found: dict[Part, Fault] = field(default_factory=dict)

    def attempt(self, part: Part, run: Callable[[], T], otherwise: T) -> T:
        """What `run` gives; `otherwise` where this part has failed before. Raises Fault where it fails now."""
        if part in self.found:
            return otherwise
        try:
            return run()
        except (Fault, *self.passing):
            raise
        except Exercised as problem:
            assert isinstance(problem.__cause__, Exception)
            raise Fault(part, problem.__cause__, "exercise") from problem
        except Exception as problem:
            raise Fault(part, problem, "fault") from problem

    def add(self, fault: Fault) -> None:
        assert fault.part not in self.found, f"{fault.part} was left out and failed again"
        self.found[fault.part] = fault


def described(problem: BaseException) -> str:
    """The kind of an exception and the first line of its message."""
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0]}" if text else type(problem).__name__
