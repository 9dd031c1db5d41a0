"""What a score program's mask keeps: as an expression, as key ranges, as tiles, and in words.

`keep` is the predicate that the program tests; `polyhedron` translates it to integer sets, `spans` to intervals of keys
where it is made of such; `ranges` and `tiles` ask these which scores need computing; `words` names the mask. Every
answer is sound where the predicate is not affine: a key that may be live is never called dead, and a key that may be
dead is never called live.
"""

from attnfx.mask.describe import describe
from attnfx.mask.key_ranges import KeyRange, key_ranges, key_span, ranges_of, rows_live
from attnfx.mask.predicate import Mask, live, mask_of
from attnfx.mask.tiles import ANALYSED, Tiles, Visited, prepare, tiles, visited, visited_scores

__all__ = [
    "ANALYSED", "KeyRange", "Mask", "Tiles", "Visited", "describe", "key_ranges", "key_span", "live", "mask_of",
    "prepare", "ranges_of", "rows_live", "tiles", "visited", "visited_scores",
]  # fmt: skip
