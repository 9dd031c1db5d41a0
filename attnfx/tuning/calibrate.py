"""Fit and store corrections of the cost model for the present device: a factor for each tier and direction.

They are cached under the device's fingerprint and apply to every later prediction with the same fingerprint.
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
MOST = 1e3  # a larger correction is an error and is ignored
_off: ContextVar[bool] = ContextVar("_off", default=False)


def fit(measured: Iterable[tuple[Decision, bool]]) -> dict[str, float]:
    """Compute the geometric mean of measured over predicted time for each tier and direction.

    `measured` holds timed decisions, each with whether it was a training step. The geometric mean balances predictions
    that are too large and too small.
    """
    logs: dict[str, list[float]] = {}
    for decision, training in measured:
        for c in (decision, *decision.alternatives):
            if isinstance(c, Candidate) and c.measured_ms and c.predicted_ms > 0:
                logs.setdefault(line(c.tier, training), []).append(math.log(c.measured_ms / c.predicted_ms))
    return {name: math.exp(fmean(found)) for name, found in sorted(logs.items())}


def store(device: torch.device, factors: dict[str, float]) -> None:
    """Store the device's corrections; {} clears them."""
    CORRECTIONS.put(_key(device), factors)


@contextmanager
def uncorrected() -> Iterator[None]:
    """Disable the corrections in this context, because `fit` needs the model's own predictions."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def corrections(device: torch.device) -> dict[str, float]:
    """Return the device's corrections, {} if none are stored; implausible values are dropped."""
    if _off.get():
        return {}
    held = CORRECTIONS.entries()
    found = held.get(_key(device)) if held else None
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, float) and 1 / MOST < v < MOST}


def _key(device: torch.device) -> str:
    return cache.key_of(**fingerprint(device))
