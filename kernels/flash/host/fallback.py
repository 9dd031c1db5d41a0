"""What happens where a kernel does not compile or does not fit its device: smaller tiles, and in the end no kernel.

A failure is remembered for the kind of call, so that it costs its time once, and stands in the reports.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from attnfx.kernels.call import Call
from attnfx.report.records import fell_back

T = TypeVar("T")
R = TypeVar("R")

_failed: dict[tuple[object, ...], list[str]] = {}
_lock = threading.Lock()


class CannotLaunch(RuntimeError):
    """No tile runs; the message is a sentence that says why."""


def first_that_runs(kernel: str, call: Call, tiles: Sequence[T], run: Callable[[T], R], chosen: object = None) -> R:
    """The result of `run` with the first of the tiles that compiles and fits. Raises CannotLaunch where none does.
    `chosen` is the one that was put before the table's, if one was.

    `run` must not have changed its inputs when it fails. Any other exception passes through.
    """
    key = _key(kernel, call, chosen)
    while (tried := len(_failed.get(key, ()))) < len(tiles):
        try:
            return run(tiles[tried])
        except (CompilationError, OutOfResources, PTXASError, RuntimeError) as problem:
            why = _reason(problem)
            if why is None:
                raise
            _remember(key, tried, why, f"the next tile is tried, {tiles[tried + 1]}" if tried + 1 < len(tiles) else "")
    raise CannotLaunch(f"the {kernel} kernel cannot run: {_failed[key][-1]}")


def _key(kernel: str, call: Call, chosen: object) -> tuple[object, ...]:
    query = call.query
    return kernel, call.spec, query.dtype, query.shape[3], call.value.shape[3], chosen, query.device


def _remember(key: tuple[object, ...], tried: int, why: str, instead: str) -> None:
    with _lock:
        reasons = _failed.setdefault(key, [])
        if len(reasons) > tried:  # another thread was here
            return
        reasons.append(why)
    kernel, spec, *_, device = key
    ending = instead or "the call runs in blocks of PyTorch's operators"
    fell_back(spec, f"the {kernel} kernel on {device} {why}: {ending}")  # type: ignore[arg-type]


def _reason(problem: Exception) -> str | None:
    """Why a launch failed, where another tile may do better; None for what is no matter of tiles."""
    if isinstance(problem, OutOfResources):
        return f"needs {problem.required} of {problem.name}, and the device has {problem.limit}"
    if isinstance(problem, (CompilationError, PTXASError)) or "PassManager::run failed" in str(problem):
        words = str(problem).strip().splitlines()
        return f"does not compile ({words[-1].strip() if words else type(problem).__name__})"
    return None
