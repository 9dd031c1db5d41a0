"""Measure this machine's CPU as a target, once, in about a second."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from attnfx.cache import JsonCache, key_of
from attnfx.errors import OptionError
from attnfx.fingerprint import processor
from attnfx.targets.target import Target

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_measured: dict[str, Target] = {}
_ANSWERS = JsonCache("targets")


def measured() -> Target:
    """Return the target of this CPU with PyTorch's current number of threads. The first call for a number of threads
    measures and caches it, also for other processes. An invalid cached record is measured again."""
    name = f"{processor()}, {torch.get_num_threads()} threads"
    if name not in _measured:
        key = key_of(name=name, torch=torch.__version__)
        try:
            _measured[name] = Target(**_ANSWERS.get(key))
        except (OptionError, TypeError):
            _measured[name] = measure(name)
            _ANSWERS.put(key, asdict(_measured[name]))
    return _measured[name]


def measure(name: str) -> Target:
    """Measure the target of this CPU now. Rates are of PyTorch's own operators with its current number of threads."""
    threads = torch.get_num_threads()
    with torch.inference_mode():
        matrix = {name: _matrix(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}
        block, result = torch.rand(1 << 15), torch.empty(1 << 15)
        exponentials = block.numel() / _seconds(lambda: torch.exp(block, out=result))
        fp32 = 2 * block.numel() / _seconds(lambda: torch.add(block, block, alpha=0.5, out=result)) / 1e12
        large, small = torch.ones(1 << 24), torch.ones(1 << 17)
        copy = 2 * 4 * large.numel() / _seconds(lambda: large.mul_(1.0)) / 1e9
        cached = 2 * 4 * small.numel() / _seconds(lambda: small.mul_(1.0)) / 1e9
        one = torch.ones(1)
        launch = _seconds(lambda: one.add_(1.0)) * 1e6
    caches = _caches()
    how = "measured by PyTorch's operators in this process"
    told = "read from the operating system"
    sources = dict.fromkeys(("matrix", "fp32", "exponentials", "bandwidth", "l2_bandwidth", "launch"), how)
    sources |= dict.fromkeys(("capability", "registers", "warps"), "no meaning on a CPU")
    sources |= dict.fromkeys(("memory", "l2", "shared_memory", "clock"), told)
    return Target(
        name=name, kind="cpu", capability=0, matrix=matrix, fp32=fp32, exponentials=exponentials / 1e9, bandwidth=copy,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), l2=caches[-1], l2_bandwidth=max(cached, copy),
        multiprocessors=threads, shared_memory=caches[-2] if len(caches) > 1 else caches[-1], registers=32, warps=1,
        clock=_clock(), launch=launch, note="measured on this machine",
        sources=sources | {"multiprocessors": "the threads that PyTorch has"},
    )  # fmt: skip


def _seconds(run: Callable[[], object], budget: float = 0.06) -> float:
    """Return the shortest time of one call, in seconds: other programs can only add to it."""
    run()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _matrix(dtype: torch.dtype, n: int = 384) -> float:
    """Return the TFLOP/s of a matrix product that fits into a core's cache."""
    a = torch.ones(n, n).to(dtype)
    return 2 * n**3 / _seconds(lambda: a @ a) / 1e12


def _caches() -> list[int]:
    """Return the sizes of the first core's data caches in bytes, in ascending order."""
    found = []
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, size = (index / "type").read_text().strip(), (index / "size").read_text().strip()
        except OSError:
            continue
        number = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and number:
            found.append(int(number[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[number[2]])
    return sorted(found) or [1 << 20]


def _lines(field: str) -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    return re.findall(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)


def _clock() -> float:
    return max((float(x) for x in _lines("cpu MHz")), default=1000.0) / 1e3
