"""Draw the README's picture from benchmarks/results/*.json: time and peak memory of attnfx and its contenders.

    python benchmarks/picture.py

Writes docs/pictures/performance-light.svg and performance-dark.svg. A group of bars is one row of a result file, whose
contenders were measured in one run; its longest bar is the group's largest amount. Each file holds the drawn amounts
as JSON in its metadata (dc:description), which tests/benchmarks/test_page.py compares with the results.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from page import MODELS, ROOT, amounts, attention_of, direction, mib, ms, stored, training_peaks, unit_of

FOLDER = ROOT / "docs" / "pictures"
NAMES = {"eager": "eager", "inductor": "Inductor", "sdpa": "Inductor, sdpa", "attnfx": "attnfx"}
# theme -> background, text, faint text, bars of the other contenders, of attnfx
THEMES = {
    "light": (
        "#ffffff",
        "#1f2328",
        "#59636e",
        {"eager": "#b8c1ca", "inductor": "#7d8790", "sdpa": "#9aa4ae"},
        "#0969da",
    ),
    "dark": (
        "#0d1117",
        "#f0f6fc",
        "#9198a1",
        {"eager": "#4d565f", "inductor": "#8b949e", "sdpa": "#6e7681"},
        "#4493f8",
    ),
}
WIDTH, LEFT, VALUE = 480, 132, 90  # pixels: the picture, the names, the values
BAR, GAP, HEAD = 23, 13, 29  # pixels: a bar with its margin, between groups, a group's title


def data() -> dict[str, list[dict[str, Any]]]:
    """panel -> groups: a title, and the amount of each contender (ms or bytes)."""

    def group(title: str, row: dict[str, Any]) -> dict[str, Any]:
        found = amounts(row)
        return {"title": title, "amounts": {name: found[name] for name in NAMES if name in found}}

    def model(row: dict[str, Any]) -> str:
        name, _, size, _ = row["job"]["model"]
        return f"{MODELS[name]}, {size} {unit_of(name, size)}, {direction(row['job']['train'])}"

    return {
        "time": [
            *(group(f"{attention_of(r['job'])}, forward and backward", r)
              for r in stored("attention")["rows"] if r["job"]["train"]),
            *(group(model(r), r) for r in stored("models")["rows"]),
        ],
        "memory": [group(model(r), r) for r in training_peaks()],
    }  # fmt: skip


def drawn(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the amounts that a picture shows from its metadata."""
    found = ET.parse(file).find(".//{http://purl.org/dc/elements/1.1/}description")
    assert found is not None and found.text
    return json.loads(found.text)


def draw(theme: str, panels: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib
    from matplotlib import pyplot

    background, ink, faint, others, own = THEMES[theme]
    colors = others | {"attnfx": own}
    titles = {"time": ("Time", ms), "memory": ("Peak memory", mib)}
    groups = [g for panel in panels.values() for g in panel]
    height = sum(HEAD + GAP + BAR * len(g["amounts"]) for g in groups) + 44 * len(panels) + 8
    matplotlib.rcParams |= {"svg.hashsalt": "attnfx", "font.family": "DejaVu Sans"}
    figure = pyplot.figure(figsize=(WIDTH / 96, height / 96), dpi=96, facecolor=background)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")

    def write(x: float, y: float, words: str, **how: Any) -> None:
        axes.text(x, y, words, va="center", **({"color": ink, "fontsize": 11.5} | how))

    y = 4.0
    for panel, some in panels.items():
        title, shown = titles[panel]
        write(12, y + 22, title, fontsize=14, fontweight="bold")
        y += 44
        for g in some:
            write(12, y + 12, g["title"], color=faint, fontsize=11)
            y += HEAD
            most = max(g["amounts"].values())
            for name, amount in g["amounts"].items():
                weight = "bold" if name == "attnfx" else "normal"
                length = amount / most * (WIDTH - LEFT - VALUE)
                axes.barh(y + BAR / 2, length, BAR - 5, left=LEFT, color=colors[name])
                write(LEFT - 8, y + BAR / 2, NAMES[name], ha="right", fontweight=weight)
                write(LEFT + length + 7, y + BAR / 2, shown(amount), fontweight=weight)
                y += BAR
            y += GAP
    FOLDER.mkdir(exist_ok=True)
    about = {"Title": "attnfx: time and peak memory", "Description": json.dumps(panels), "Date": None, "Creator": None}
    figure.savefig(FOLDER / f"performance-{theme}.svg", metadata=about, facecolor=background)
    pyplot.close(figure)


def main() -> None:
    panels = data()
    for theme in THEMES:
        draw(theme, panels)


if __name__ == "__main__":
    main()
