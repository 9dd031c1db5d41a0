"""Measure time and memory, and describe the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PAGE = os.sysconf("SC_PAGE_SIZE")


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time each contender in turn, in several rounds, so that a slow phase of the machine affects all of them.

    Stop after `seconds`, but not before `least` rounds. A call shorter than 2 ms is repeated within a round. Return,
    per contender, the least and the median ms of a call and the number of rounds. With one thread, time.thread_time as
    the `clock` excludes the time of other programs.
    """
    repeats = {}
    for name, run in contenders.items():
        run()
        start = clock()
        run()
        repeats[name] = max(1, int(2e-3 / max(clock() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < most and (rounds < least or time.perf_counter() < end):
        for name, run in contenders.items():
            start = clock()
            for _ in range(repeats[name]):
                run()
            times[name].append((clock() - start) / repeats[name] * 1e3)
        rounds += 1
    return {
        name: {"min_ms": round(min(t), 4), "median_ms": round(statistics.median(t), 4), "rounds": rounds}
        for name, t in times.items()
    }


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def give_back_freed_memory() -> None:
    """Return freed memory to the system: memory that the allocator keeps would hide part of a later peak."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_over_base(run: Callable[[], T]) -> tuple[int, T]:
    """Return the peak resident memory while `run` runs, minus the memory before it, and the result of `run`.

    The kernel's high-water mark (`ru_maxrss`) covers the whole process, so it is useless if compilation took more
    memory than the run. A thread therefore samples every 2 ms; `ru_maxrss` is used as well if the run raised it.
    """
    base, mark = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak, done = base, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        result = run()
    finally:
        done.set()
        sampler.join()
    raised = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if raised > mark:
        peak = max(peak, raised * 1024)
    return peak - base, result


def machine() -> dict[str, object]:
    """Describe the machine for a result: the processor, its cores, the memory, and the versions of packages."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    versions = {"python": platform.python_version()}
    for package in ("attnfx", "torch", "triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": round(os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
        "load_at_start": round(os.getloadavg()[0], 2),
    }
