"""Render a report as a self-contained HTML page: sites with programs, masks and candidates, and the graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import networkx as nx
from markupsafe import Markup

from attnfx.memory import byte_size as budget
from attnfx.report.html import figures as picture
from attnfx.report.html.collapse import collapse
from attnfx.report.html.layout import HEIGHT, WIDTH, draw

TITLES = {"traced": "Before", "rewritten": "After"}


def page(report: Mapping[str, Any], timeline: Sequence[float] = (), caption: str = "") -> str:
    """Render a report, given in the form of `attnfx.report.to_json.data`, as HTML.

    timeline  allocated bytes after each step of a plan, in order; if empty, the timeline is left out
    """
    sites = [_site(s) for s in [*report["sites"], *report["others"]]]
    rewritten = {s["name"] for s in sites if s["rewritten"]}
    graphs = [_graph(TITLES[name], report["stages"][name], rewritten) for name in TITLES if name in report["stages"]]
    inside = {n["id"] for n in graphs[0]["nodes"] if "inner" in n} if graphs else set()
    sites = [{**s, "drawn": s["name"] in inside} for s in sites]
    done, found = len([s for s in report["sites"] if s["rewritten"]]), len(report["sites"])
    return _template().render(
        title=f"attnfx: {done} of {found} attention sites rewritten",
        headline=f"{done} of {found} attention sites rewritten",
        subtitle=f"{report['graphs']} graph{'' if report['graphs'] == 1 else 's'}, "
        f"{report['flops'] / 1e9:,.1f} GFLOP forward in matrix products and convolutions",
        notes=report["notes"],
        sites=sites,
        graphs=graphs,
        timeline={"picture": picture.timeline(timeline), "caption": caption} if timeline else None,
        css=_asset("report.css"),
        js=_asset("report.js"),
        data=_script({"box": [WIDTH, HEIGHT], "graphs": graphs}),
    )


def write(
    report: Mapping[str, Any], path: str | Path, force: bool = False, timeline: Sequence[float] = (), caption: str = ""
) -> None:
    """Write the page. Raises FileExistsError if the file exists, unless `force`."""
    text = page(report, timeline, caption)
    try:
        with open(path, "w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{str(path)!r} exists; pass force=True to overwrite it") from None


def _asset(name: str) -> Markup:
    return Markup((files("attnfx.report.html") / name).read_text())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string((files("attnfx.report.html") / "report.html.j2").read_text())


def _script(value: object) -> Markup:
    """Encode a value as JSON for a script element, escaped so that it cannot close the element."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def _site(site: Mapping[str, Any]) -> dict[str, Any]:
    decision, refusal, tiles = site["decision"], site["refusal"], site["tiles"]
    if refusal is not None:
        why = f"{refusal['message']} [{refusal['code']}]. {_advice(refusal)}"
    else:
        why = decision["reason"] if decision is not None else ""
        why += f" [{decision['code']}]. {_advice(decision)}" if decision is not None and decision["code"] else ""
    share = f" {site['share']:.0%} of the graph's FLOPs." if site["share"] else ""
    return {
        **site,
        "name": site["name"] or "softmax",
        "tier": decision["tier"] if decision is not None else "kept",
        "what": f"{site['summary']}.{share}" if site["summary"] else "",
        "why": why,
        "notes": [*site["notes"], *site["fallbacks"]],
        "picture": picture.tiles(tiles["picture"], tiles["tile"]) if tiles and tiles["picture"] else None,
        "candidates": [] if decision is None else [
            _candidate(c, chosen=n == 0) for n, c in enumerate([decision, *decision["alternatives"]])
        ],
    }  # fmt: skip


def _advice(kept: Mapping[str, Any]) -> str:
    return f"{kept['hint']} Closest form that is rewritten: {kept['closest']}."


def _candidate(c: Mapping[str, Any], chosen: bool) -> dict[str, Any]:
    tile = "" if c["tile"] is None else f"{c['tile'][0]} x {c['tile'][1]}, {c['warps']} warps, {c['stages']} stages"
    return {
        **c,
        "tile": tile,
        "chosen": chosen,
        "time": f"{c['predicted_ms']:.3g} ms" if c["predicted_ms"] else "",
        "bytes": budget.text(c["predicted_bytes"]),
        "saved": budget.text(c["saved_bytes"]),
    }


def _graph(name: str, stage: Mapping[str, Any], rewritten: set[str]) -> dict[str, Any]:
    """Convert a stage to the data that the page's script draws: boxes with their centers, and edges."""
    graph = nx.node_link_graph(stage, edges="edges")
    outer, parts = collapse(graph, sorted({s for _, s in graph.nodes(data="site") if s}))
    drawn = _drawn(outer)
    for node in drawn["nodes"]:
        if node["id"] in parts:
            part = parts[node["id"]]
            node.update(label=node["id"], kind="site rewritten" if node["id"] in rewritten else "site kept")
            node.update(detail=f"{len(part)} operators", inner=_drawn(part))
    return {"name": name, **drawn}


def _drawn(graph: nx.DiGraph) -> dict[str, Any]:
    drawing = draw(graph)
    nodes = []
    for node, held in graph.nodes(data=True):
        shape = " x ".join(map(str, held.get("shape") or ()))
        x, y = drawing.places[node]
        title = "\n".join(t for t in (str(node), held.get("dtype"), held.get("where"), held.get("module")) if t)
        box = {"id": node, "label": held.get("label", node), "kind": held.get("kind", "operator"), "x": x, "y": y}
        nodes.append({**box, **{k: v for k, v in (("detail", shape), ("title", title)) if v}})
    return {"nodes": nodes, "edges": list(graph.edges), "width": drawing.width, "height": drawing.height}
