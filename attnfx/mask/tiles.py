"""Classify the tiles of the score matrix as empty, full or partial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import islpy as isl
import numpy as np

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.mask import affine as P
from attnfx.mask.predicate import analysis
from attnfx.mask.row_intervals import spans
from attnfx.spec import AXES

ANALYSED = 64  # rows of the blocks in which `prepare` analyzes a mask
FLEX_TILE = 128  # rows and keys of flex_attention's block mask: PyTorch's default, which its kernels' tiles divide


@dataclass(frozen=True)
class Tiles:
    """The tiles of one (T, S) score matrix, for all b and h together.

    empty          tiles in which no score can be live
    full           tiles in which every existing score is live; at a ragged edge the bounds check stays
    partial        all other tiles
    live_fraction  share of the scores (b, h, i, j) that may be live
    """

    rows: int
    columns: int
    empty: int
    full: int
    partial: int
    live_fraction: float
    _touches: Callable[[int, int], tuple[bool, bool]] = field(
        repr=False, compare=False
    )  # (may contain a live score, may contain a dead score)

    def classify(self, qi: int, ki: int) -> str:
        """Return "empty", "full" or "partial" for the qi-th query tile and the ki-th key tile."""
        if not (0 <= qi < self.rows and 0 <= ki < self.columns):
            raise IndexError(f"tile ({qi}, {ki}) is outside {self.rows} x {self.columns} tiles")
        live, dead = self._touches(qi, ki)
        return "empty" if not live else "partial" if dead else "full"


def _holds(indicator: isl.PwAff | None, qi: int, ki: int) -> bool:
    if indicator is None:
        return True
    context = indicator.get_ctx()
    context.reset_operations()
    point = isl.Point.zero(indicator.get_domain_space())
    for at, value in enumerate((qi, ki)):
        point = point.set_coordinate_val(isl.dim_type.set, at, isl.Val(value, context))
    return not indicator.eval(point).is_zero()


@analysis(maxsize=1024)
def tiles(seen: Expr, keep: Expr, sizes: Mapping[str, int], tile_q: int, tile_k: int) -> Tiles:
    """Count the tiles of `tile_q` queries by `tile_k` keys of a spec, or of a softmax over a score program.

    `sizes` has the values of T, S, the other sizes that the program names, and B and H if it depends on b and h.
    """
    T, S = sizes["T"], sizes["S"]
    rows, columns = -(-T // tile_q), -(-S // tile_k)
    if keep is A.TRUE:
        return Tiles(rows, columns, 0, rows * columns, 0, 1.0, lambda qi, ki: (True, False))
    known, each = spans(seen, keep, sizes, tile_q), spans(seen, keep, sizes, 1)
    if known.exact and each.exact:
        some, holes = (known.tiles(tile_q, tile_k, dead) for dead in (False, True))
        share, touches = each.live / (T * S), partial(known.touches, tile_q, tile_k)
    else:
        some, holes, share, touches = _by_sets(seen, keep, sizes, tile_q, tile_k)
    empty, full = rows * columns - some, rows * columns - holes
    return Tiles(rows, columns, empty, full, rows * columns - empty - full, share, touches)


@dataclass(frozen=True)
class Visited:
    """The tiles from the first live key of each block of rows to the last.

    blocks             number of row blocks
    shortest, longest  fewest and most tiles of a block
    total              tiles of all blocks
    full               tiles in which every score is live
    scores             the (i, j) of the matrix in the tiles
    """

    blocks: int
    shortest: int
    longest: int
    total: int
    full: int
    scores: int


@analysis(maxsize=4096)
def visited(seen: Expr, keep: Expr, sizes: Mapping[str, int], tile_q: int, tile_k: int) -> Visited:
    """Count the tiles that a kernel visits, as `tiles` and `key_ranges` would, in a fraction of their time. For masks
    whose rows see intervals of keys the counts are exact. For others they are bounds: at least the tiles, and at most
    the full ones. With more than 32768 rows they are estimates from a sample."""
    T, S = sizes["T"], sizes["S"]
    rows, columns = -(-T // tile_q), -(-S // tile_k)
    if keep is A.TRUE or not T * S:
        return Visited(rows, columns, columns, rows * columns, rows * columns, T * S)
    known = spans(seen, keep, sizes, tile_q).sampled(tile_q)
    low, high = known.ends(tile_q)
    steps = -(-high // tile_k) - low // tile_k
    widths = np.minimum(-(-high // tile_k) * tile_k, S) - low // tile_k * tile_k
    scores = known.total(widths, tile_q) * tile_q - int(widths[-1]) * (-T % tile_q)
    full = rows * columns - known.tiles(tile_q, tile_k, dead=True)
    return Visited(rows, int(steps.min()), int(steps.max()), known.total(steps, tile_q), max(0, full), scores)


@analysis(maxsize=1024)
def prepare(seen: Expr, keep: Expr, sizes: Mapping[str, int]) -> None:
    """Analyze a mask at its sizes, before calls of `visited` with many tile sizes."""
    if keep is not A.TRUE:
        spans(seen, keep, sizes, ANALYSED)


def _by_sets(
    seen: Expr, keep: Expr, sizes: Mapping[str, int], tile_q: int, tile_k: int
) -> tuple[int, int, float, Callable[[int, int], tuple[bool, bool]]]:
    """Return (tiles with a live score, tiles with a dead one, share of live scores, function for one tile), by isl. A
    score that may be live counts as live, one that may be dead as dead."""
    hidden, may = P.hidden(seen.free | keep.free), P.text(seen, True)
    is_live, some = _tiles_with(may, hidden, sizes, tile_q, tile_k)
    is_dead, holes = _tiles_with(f"not ({P.text(keep, False)})", hidden, sizes, tile_q, tile_k)
    total = math.prod(sizes[AXES[name]] for name in hidden)
    try:
        with P.solver() as context:
            elements = isl.Set(f"{{ [{', '.join(hidden)}] : {P.domain(sizes, hidden)} and ({may}) }}", context)
            share = P.count(elements) / total if may != P.YES else 1.0
    except P.TooHard:
        share = min(1.0, some * tile_q * tile_k / (sizes["T"] * sizes["S"]))
    return some, holes, share, lambda qi, ki: (_holds(is_live, qi, ki), _holds(is_dead, qi, ki))


def _tiles_with(
    holds: str, hidden: str, sizes: Mapping[str, int], tile_q: int, tile_k: int
) -> tuple[isl.PwAff | None, int]:
    """Return the indicator and number of the tiles that contain a point of isl's predicate; (None, all) if too hard."""
    inside = f"{P.domain(sizes, hidden)} and {tile_q} q <= i < {tile_q} q + {tile_q}"
    points = f"{inside} and {tile_k} k <= j < {tile_k} k + {tile_k} and ({holds})"
    try:
        with P.solver() as context:
            found = isl.Set(f"{{ [q, k] : exists {', '.join(hidden)} : {points} }}", context).coalesce()
            return found.indicator_function(), P.count(found)
    except P.TooHard:
        return None, -(-sizes["T"] // tile_q) * -(-sizes["S"] // tile_k)
