"""Contain failures of attnfx itself: each costs only the part in which it happens.

A graph is rewritten in named parts: a pass, one site, the body of a higher-order operator. If a part raises, the graph
may be half changed, so it is rewritten from the start without that part.
"""

from __future__ import annotations


class Exercised(Exception):
    """The failure of a site's new call on tiny tensors; the exception's cause is the call's own error."""


class Fault(Exception):
    """The failure of a part with `problem`. `code` is the refusal code that its site gets."""

    def __init__(self, part: str, problem: Exception):
        own = problem.__cause__ if isinstance(problem, Exercised) else problem
        assert isinstance(own, Exception)
        super().__init__(f"{part}: {described(own)}")
        self.part, self.problem, self.code = part, own, "fault" if own is problem else "exercise"


def described(problem: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0]}" if text else type(problem).__name__
