"""Fall back to smaller tiles if a kernel does not compile or fit the device, and finally give the kernel up.

A failure is cached for its kind of call, so that it costs time once, and is listed in the reports.
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
    """Every tile failed; the message is one sentence with the reason."""


def first_that_runs(kernel: str, call: Call, tiles: Sequence[T], run: Callable[[T], R], chosen: object = None) -> R:
    """Return the result of `run` with the first tile that compiles and fits. Raise CannotLaunch if none does.

    `chosen` is the tile that was put before the table's, if any. A failed `run` must leave its inputs unchanged. Other
    exceptions pass through.
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
    """Return why a launch failed if a smaller tile may succeed; None for any other failure."""
    if isinstance(problem, OutOfResources):
        return f"needs {problem.required} of {problem.name}, and the device has {problem.limit}"
    if isinstance(problem, (CompilationError, PTXASError)) or "PassManager::run failed" in str(problem):
        words = str(problem).strip().splitlines()
        return f"does not compile ({words[-1].strip() if words else type(problem).__name__})"
    return None
