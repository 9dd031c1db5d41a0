"""Corrections of the cost model on a present device: a factor for each tier and direction.

They are kept in the cache under the device's name and the versions of what ran, and used wherever they are found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from statistics import fmean

import torch

from attnfx import cache
from attnfx.cost import line
from attnfx.fingerprint import fingerprint
from attnfx.report.records import Candidate, Decision

CORRECTIONS = cache.JsonCache("calibration")
MOST = 1e3  # a correction beyond this is a mistake, not a device
_off: ContextVar[bool] = ContextVar("_off", default=False)


def fit(measured: Iterable[tuple[Decision, bool]]) -> dict[str, float]:
    """The geometric mean of measured over predicted time, for each tier and direction, over decisions that were timed.

    Each comes with whether it was a training step. The geometric mean makes the errors as often too large as too small.
    """
    logs: dict[str, list[float]] = {}
    for decision, training in measured:
        for c in (decision, *decision.alternatives):
            if isinstance(c, Candidate) and c.measured_ms and c.predicted_ms > 0:
                logs.setdefault(line(c.tier, training), []).append(math.log(c.measured_ms / c.predicted_ms))
    return {name: math.exp(fmean(found)) for name, found in sorted(logs.items())}


def store(device: torch.device, factors: dict[str, float]) -> None:
    """Keep the device's corrections; {} forgets them."""
    CORRECTIONS.put(_key(device), factors)


@contextmanager
def uncorrected() -> Iterator[None]:
    """Predictions in this context are the model's own, as `fit` wants them."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def corrections(device: torch.device) -> dict[str, float]:
    """The device's corrections, {} where none were measured or what is kept makes no sense."""
    if _off.get():
        return {}
    held = CORRECTIONS.entries()
    found = held.get(_key(device)) if held else None
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, float) and 1 / MOST < v < MOST}


def _key(device: torch.device) -> str:
    return cache.key_of(**fingerprint(device))
