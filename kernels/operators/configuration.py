"""Parse the operator's `tier` argument, a list of tiers to try, each with an optional tile.

    tiers          = tier {"," tier}
    tier           = name [":" ROWS "x" KEYS "/" WARPS "/" STAGES ["/" SPLITS] | ":" ELEMENTS]

for example "flash:128x64/8/3,chunked", "decode:16x128/4/3/32,chunked" or "chunked:65536". The kernels' own table
supplies the tile by default, and if the given one does not compile or fit.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from attnfx.kernels.flash.host.tiles import Tile
from attnfx.report.records import Candidate

_FORM = re.compile(r"(\w+)(?::(\d+)x(\d+)/(\d+)/(\d+)(?:/(\d+))?|:(\d+))?")


class Configuration(NamedTuple):
    """One tier and its settings.

    tier      a key of `operators.attention.TIERS`
    tile      the tile of its forward kernel, or None for the table's
    splits    the number of parts into which the decode kernel splits the keys; 0 for its own choice
    elements  the most scores that the chunked tier computes at once; 0 for its own choice
    """

    tier: str
    tile: Tile | None = None
    splits: int = 0
    elements: int = 0

    def __str__(self) -> str:
        if self.tile is None:
            return f"{self.tier}:{self.elements}" if self.elements else self.tier
        rows, keys, warps, stages = self.tile
        return f"{self.tier}:{rows}x{keys}/{warps}/{stages}" + (f"/{self.splits}" if self.splits else "")


@lru_cache(maxsize=1024)
def parse(tiers: str) -> tuple[Configuration, ...]:
    """Parse a `tier` argument into configurations. Raise ValueError for text outside the grammar above."""
    out = []
    for part in tiers.split(","):
        found = _FORM.fullmatch(part)
        if found is None:
            raise _invalid(part, "expected a name with an optional tile, such as 'flash:128x64/8/3'")
        name, *numbers = found.groups()
        rows, keys, warps, stages, splits, elements = (int(n or 0) for n in numbers)
        if numbers[5] is not None and (name != "chunked" or not elements):
            raise _invalid(part, "only chunked takes a number of scores, above 0")
        if numbers[0] is not None and not all(_power(n) for n in (rows, keys, warps)):
            raise _invalid(part, "a tile's rows, keys and warps must be powers of two")
        tile = None if numbers[0] is None else Tile(rows, keys, warps, stages)
        out.append(Configuration(name, tile, splits, elements))
    return tuple(out)


def of(candidate: Candidate) -> Configuration:
    """Return the configuration that runs a candidate as predicted. Its text differs between a site's candidates."""
    tile = None if candidate.tile is None else Tile(*candidate.tile, candidate.warps, candidate.stages)
    return Configuration(candidate.tier, tile, candidate.splits)


def _invalid(part: str, why: str) -> ValueError:
    return ValueError(f"attnfx.attention: tier {part!r} is not valid; {why}")


def _power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
