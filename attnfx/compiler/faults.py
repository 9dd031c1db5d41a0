"""Contain failures of attnfx itself: each costs only the part in which it happens.

A graph is rewritten in named parts: a pass, one site, the body of a higher-order operator. If a part raises, the graph
may be half changed, so it is rewritten from the start without that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A named part of a rewrite. `path` leads to the body of a higher-order operator; empty for the graph itself."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} in the body {self.path.rstrip('/')}" if self.path else self.name


class Exercised(Exception):
    """The failure of a site's new call on tiny tensors; the exception's cause is the call's own error."""


class Fault(Exception):
    """The failure of a part with `problem`. `code` is the refusal code that its site gets."""

    def __init__(self, part: Part, problem: Exception, code: str):
        super().__init__(f"{part}: {described(problem)}")
        self.part, self.problem, self.code = part, problem, code


@dataclass
class Faults:
    """The failed parts of one graph, which are left out when it is rewritten again.

    passing   exceptions that pass through, without counting as the failure of a part
    """

    passing: tuple[type[Exception], ...] = ()
    found: dict[Part, Fault] = field(default_factory=dict)

    def attempt(self, part: Part, run: Callable[[], T], otherwise: T) -> T:
        """Return the result of `run`, or `otherwise` if the part has failed before. Raises Fault if it fails now."""
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
    """Return an exception's type and the first line of its message."""
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0]}" if text else type(problem).__name__
