"""When a mask that stands in a tensor is summarised, so that kernels leave out the tiles that it empties.

How many it empties is known at run time alone. The pass and the lists that are made from it are therefore paid for
where they take at most EMPTY of the kernels' predicted time: a mask that leaves that share of the tiles empty or more
makes the whole faster, and one that leaves none costs no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnfx.cost.gpu_kernel import COPY
from attnfx.cost.gpu_occupancy import float_lanes
from attnfx.cost.operation_counts import operations
from attnfx.mask.runtime_summary import Summary, axes, cost
from attnfx.targets import Target

EMPTY = 1 / 8  # the least share of empty tiles that a mask in a tensor is made for: less padding hardly needs one
SUMMARISED = 8  # instructions of a score beside its mask: two tests of bounds, a selection and the reduction of a grain


def milliseconds(found: Summary, sizes: Mapping[str, int], target: Target, kernels: int) -> float:
    """Of the pass, and of making from it the lists of so many kernels. It is whole for every site, though layers that
    have one mask share it."""
    one, ops = cost(found, sizes), operations(found.spec)
    clocks = target.multiprocessors * target.clock * 1e6
    busy = one.evaluations * (SUMMARISED + ops.always + ops.masked) / (float_lanes(target) * clocks)
    memory = (one.read + one.written) / (COPY * target.bandwidth * 1e6)
    return max(busy, memory) + (1 + kernels) * target.launch / 1e3


def pays(found: Summary, sizes: Mapping[str, int], target: Target, kernels: int, kernels_ms: float) -> bool:
    """Whether the summary is made for so many kernels, which take `kernels_ms` without it."""
    return milliseconds(found, sizes, target, kernels) <= EMPTY * kernels_ms


def decodes(found: Summary, sizes: Mapping[str, int]) -> bool:
    """Whether the decode kernel can use it: the heads that share keys share a list of tiles."""
    return "h" not in axes(found.spec) or sizes["G"] == sizes["H"]
