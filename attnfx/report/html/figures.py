"""Draw figures for the page as inline SVG: the live tiles of a mask, and memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

STATES = {"#": "full", "+": "partial", ".": "empty"}


def tiles(rows: Sequence[str], tile: tuple[int, int]) -> Markup:
    """Draw the tiles of the score matrix: `rows` of characters of STATES, `tile` = (queries, keys) of a tile."""
    height, width = len(rows), len(rows[0])
    cells = []
    for y, row in enumerate(rows):
        x = 0
        for mark, run in groupby(row):
            n = len(list(run))
            cells.append(f'<rect class="{STATES[mark]}" x="{x}" y="{y}" width="{n}" height="1"/>')
            x += n
    live = sum(mark != "." for row in rows for mark in row) / max(width * height, 1)
    key = "".join(f'<span class="key" style="background:var(--{state})"></span>{state}' for state in STATES.values())
    return Markup(
        f'<figure><svg class="tiles" viewBox="0 0 {width} {height}" role="img" shape-rendering="crispEdges" '
        f'aria-label="{live:.0%} of the tiles are live">{"".join(cells)}</svg>'
        f"<figcaption>Queries downwards, keys to the right, in tiles of {tile[0]} x {tile[1]}; {live:.0%} of them "
        f"hold a live score."
        f"<br>{key}</figcaption></figure>"
    )


def timeline(values: Sequence[float]) -> Markup:
    """Draw bytes over the steps of a plan as an area, both axes from zero."""
    top = max(values, default=0) or 1
    last = max(len(values) - 1, 1)
    points = " ".join(f"L{1000 * n / last:.1f} {200 - 195 * v / top:.1f}" for n, v in enumerate(values))
    return Markup(
        '<svg id="timeline" viewBox="0 0 1000 200" preserveAspectRatio="none" role="img" '
        f'aria-label="memory over the step"><path d="M0 200{points}L1000 200Z"/></svg>'
    )
