"""Decide whether to summarize a mask stored in a tensor, so that kernels skip the tiles that it empties.

The number of empty tiles is known only at run time. The summary pass and its tile lists are therefore used if they take
at most EMPTY of the kernels' predicted time. A mask that empties at least that share of the tiles makes the whole
faster, and a mask that empties none costs at most that share.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnfx.cost.gpu_kernel import COPY
from attnfx.cost.gpu_occupancy import float_lanes
from attnfx.cost.operation_counts import operations
from attnfx.mask.runtime_summary import Summary, axes, cost
from attnfx.targets import Target

EMPTY = 1 / 8  # share of tiles that a mask in a tensor is expected to empty at least: less padding hardly needs a mask
SUMMARISED = 8  # instructions per score beside its mask: two bound tests, a selection and the reduction of a grain


def milliseconds(found: Summary, sizes: Mapping[str, int], target: Target, kernels: int) -> float:
    """Return the ms of the summary pass and of building the lists of `kernels` kernels from it. Every site counts the
    whole pass, although layers with the same mask share it."""
    one, ops = cost(found, sizes), operations(found.spec)
    clocks = target.multiprocessors * target.clock * 1e6
    busy = one.evaluations * (SUMMARISED + ops.always + ops.masked) / (float_lanes(target) * clocks)
    memory = (one.read + one.written) / (COPY * target.bandwidth * 1e6)
    return max(busy, memory) + (1 + kernels) * target.launch / 1e3


def pays(found: Summary, sizes: Mapping[str, int], target: Target, kernels: int, kernels_ms: float) -> bool:
    """Return whether a summary pays off for `kernels` kernels, which take `kernels_ms` without it."""
    return milliseconds(found, sizes, target, kernels) <= EMPTY * kernels_ms


def decodes(found: Summary, sizes: Mapping[str, int]) -> bool:
    """Return whether the decode kernel can use the summary: heads that share keys must share a list of tiles."""
    return "h" not in axes(found.spec) or sizes["G"] == sizes["H"]
