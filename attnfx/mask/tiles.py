"""Which tiles of the score matrix are empty, full or partial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import islpy as isl

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.mask import polyhedron as P
from attnfx.mask.keep import kept, live
from attnfx.spec import AXES, AttentionSpec


@dataclass(frozen=True)
class Tiles:
    """The tiles of one (T, S) score matrix, for all b and h together.

    empty          tiles in which no score can be live
    full           tiles in which every score that exists is live; at a ragged edge the bounds check stays
    partial        the others
    live_fraction  share of the scores (b, h, i, j) that may be live
    """

    rows: int
    columns: int
    empty: int
    full: int
    partial: int
    live_fraction: float
    _live: isl.PwAff | None = field(default=None, repr=False, compare=False)
    _dead: isl.PwAff | None = field(default=None, repr=False, compare=False)

    def classify(self, qi: int, ki: int) -> str:
        """ "empty", "full" or "partial": the tile of the qi-th query tile and the ki-th key tile."""
        if not (0 <= qi < self.rows and 0 <= ki < self.columns):
            raise IndexError(f"tile ({qi}, {ki}) is outside {self.rows} x {self.columns} tiles")
        if self._live is not None and not _holds(self._live, qi, ki):
            return "empty"
        if self.full and (self._dead is None or not _holds(self._dead, qi, ki)):
            return "full"
        return "partial"


def _holds(indicator: isl.PwAff, qi: int, ki: int) -> bool:
    context = indicator.get_ctx()
    context.reset_operations()
    point = isl.Point.zero(indicator.get_domain_space())
    for at, value in enumerate((qi, ki)):
        point = point.set_coordinate_val(isl.dim_type.set, at, isl.Val(value, context))
    return not indicator.eval(point).is_zero()


def tiles(spec: AttentionSpec | Expr, sizes: Mapping[str, int], tile_q: int, tile_k: int) -> Tiles:
    """The tiles of `tile_q` queries by `tile_k` keys of a spec, or of a softmax over a score program.

    `sizes` has numbers for T, S, the other sizes that the program names, and B and H where it depends on b and h.
    """
    return _tiles(live(spec), kept(spec), tuple(sorted(sizes.items())), tile_q, tile_k)


@lru_cache(maxsize=1024)
def _tiles(seen: Expr, keep: Expr, items: tuple[tuple[str, int], ...], tile_q: int, tile_k: int) -> Tiles:
    sizes = dict(items)
    T, S = sizes["T"], sizes["S"]
    rows, columns = -(-T // tile_q), -(-S // tile_k)
    seen, keep = P.numeric(seen, sizes), P.numeric(keep, sizes)
    if keep is A.TRUE:
        return Tiles(rows, columns, 0, rows * columns, 0, 1.0)
    hidden = P.either(seen, keep)
    inside = P.domain(sizes, hidden)
    bounds = f"{tile_q} q <= i < {tile_q} q + {tile_q} and {tile_k} k <= j < {tile_k} k + {tile_k}"
    head = f"{{ [q, k] : exists {', '.join(hidden)} : {inside} and {bounds} and "
    may, sure = P.text(seen, True), P.text(keep, False)
    is_live, some = _tiles_with(f"{head} ({may}) }}", rows * columns)
    is_dead, holes = _tiles_with(f"{head} not ({sure}) }}", rows * columns)
    empty, full = rows * columns - some, rows * columns - holes
    total = math.prod(sizes[AXES[name]] for name in hidden)
    try:
        with P.solver() as context:
            elements = isl.Set(f"{{ [{', '.join(hidden)}] : {inside} and ({may}) }}", context)
            share = P.count(elements) / total if may != P.YES else 1.0
    except P.TooHard:
        share = min(1.0, (rows * columns - empty) * tile_q * tile_k / (T * S))
    return Tiles(rows, columns, empty, full, rows * columns - empty - full, share, is_live, is_dead)


def _tiles_with(points: str, all_tiles: int) -> tuple[isl.PwAff | None, int]:
    """Which and how many tiles hold one of the points; (None, all) where that is too hard to say."""
    try:
        with P.solver() as context:
            found = isl.Set(points, context).coalesce()
            return found.indicator_function(), P.count(found)
    except P.TooHard:
        return None, all_tiles
