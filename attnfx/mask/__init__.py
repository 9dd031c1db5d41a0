"""Analyze the mask of a score program: as an expression, as key ranges, as tiles, and in words.

`predicate` extracts the mask's predicate. `affine` translates it to integer sets, and `row_intervals` to intervals of
keys if its rows consist of intervals. From these, `key_ranges` and `tiles` find the scores that need computing, and
`describe` names the mask. Every answer is sound even if the predicate is not affine: a key that may be live is never
reported dead, and a key that may be dead is never reported live.
"""

from attnfx.mask.describe import describe
from attnfx.mask.key_ranges import KeyRange, key_ranges, key_span, rows_live
from attnfx.mask.predicate import Mask, live, mask_of
from attnfx.mask.tiles import ANALYSED, FLEX_TILE, Tiles, Visited, prepare, tiles, visited

__all__ = [
    "ANALYSED", "FLEX_TILE", "KeyRange", "Mask", "Tiles", "Visited", "describe", "key_ranges", "key_span", "live",
    "mask_of", "prepare", "rows_live", "tiles", "visited",
]  # fmt: skip
