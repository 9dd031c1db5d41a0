"""Time calls on the present device, in turn, as the minimum over several rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
GIVEN = 0.85  # least share of its threads' time for an undisturbed process; 0.98 to 0.99 on two idle cores


def shortest(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 0.5,
    least: int = 3,
    most: int = 100,
) -> dict[str, float]:
    """Return the ms of a call of each contender, as the minimum over rounds that run all contenders in turn.

    So a slow phase of the machine affects all of them. Stops after `seconds` or `most` rounds, but not before `least`
    rounds. A call shorter than a millisecond is repeated within a round. A contender that raises on its first calls
    (out of memory, for example) is left out.
    """
    stopwatch = _by_events if device.type == "cuda" else _by_clock
    best: dict[str, float] = {}
    repeats: dict[str, int] = {}
    for name, run in contenders.items():
        try:
            run()  # compiles, or fills caches
            best[name] = stopwatch(run, 1)
        except Exception:
            continue
        repeats[name] = max(1, int(1.0 / max(best[name], 1e-3)))
    end = time.perf_counter() + seconds
    rounds = 0
    while best and rounds < most and (rounds < least or time.perf_counter() < end):
        for name in best:
            best[name] = min(best[name], stopwatch(contenders[name], repeats[name]))
        rounds += 1
    return best


def _by_clock(run: Callable[[], object], repeats: int) -> float:
    # with one thread, the thread's own CPU time, which excludes other programs
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats * 1e3


def _by_events(run: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def undisturbed(device: torch.device, seconds: float = 0.2) -> bool:
    """Return whether several CPU threads get nearly all the processor time they need. True for one thread and for a
    GPU, because their clocks above exclude other programs."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return True
    block = torch.rand(1 << 20)
    out = torch.exp(block)
    start, own = time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        torch.exp(block, out=out)
    return time.process_time() - own > GIVEN * threads * (time.perf_counter() - start)


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items, with a transient progress bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("attnfx: {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=len(items), description=what)
