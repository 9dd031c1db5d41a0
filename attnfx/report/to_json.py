"""Convert a report to JSON and back. docs/report.md documents the schema.

Derived values (the printed program, the tiles, the share) are written for readers without attnfx, and computed again
when a report is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from attnfx.report.codes import CODES
from attnfx.report.records import Candidate, Decision, Refusal, Site, share
from attnfx.report.stages import Stage
from attnfx.spec import AttentionSpec, from_json

VERSION = 1
PICTURE = 32  # largest number of tiles in a picture, in rows and in columns
SMALLEST = 16  # smallest rows and keys of a tile in a picture
MARKS = {"empty": ".", "partial": "+", "full": "#"}


def data(
    sites: Sequence[Site], others: Sequence[Site], notes: Sequence[str], graphs: int, flops: int,
    stages: Mapping[str, Stage],
) -> dict[str, Any]:  # fmt: skip
    """Return a report's fields as JSON-ready values."""
    used = {s.code for s in (*sites, *others) if s.code}
    return {
        "version": VERSION,
        "graphs": graphs,
        "flops": flops,
        "notes": list(notes),
        "sites": [_site(s, flops) for s in sites],
        "others": [_site(s, flops) for s in others],
        "codes": {code: asdict(CODES[code]) for code in sorted(used)},
        "stages": {name: stage.to_data() for name, stage in stages.items()},
    }


def fields(text: str) -> dict[str, Any]:
    """Read the fields of a report by name. Raises ValueError for text that is not a report of this version."""
    found = json.loads(text)
    if not isinstance(found, dict) or "version" not in found:
        raise ValueError("the text is not the JSON of a report")
    if found["version"] != VERSION:
        raise ValueError(f"the report has JSON version {found['version']}, but only version {VERSION} can be read")
    try:
        return {
            "sites": [_read_site(s) for s in found["sites"]],
            "others": [_read_site(s) for s in found["others"]],
            "notes": found["notes"],
            "graphs": found["graphs"],
            "flops": found["flops"],
            "stages": {name: Stage.from_data(stage) for name, stage in found["stages"].items()},
        }
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"the JSON of the report is incomplete: {problem!r}") from problem


def _site(site: Site, flops: int) -> dict[str, Any]:
    return {
        "name": site.name,
        "where": site.where,
        "rewritten": site.rewritten,
        "code": site.code,
        "summary": site.summary(),
        "dims": site.dims,
        "sizes": site.sizes,
        "spec": None if site.spec is None else json.loads(site.spec.to_json()),
        "program": None if site.spec is None else str(site.spec),
        "mask": site.mask,
        "tiles": None if site.spec is None or not site.sizes else tile_picture(site.spec, site.sizes),
        "decision": None if site.decision is None else _decision(site.decision),
        "refusal": None if site.refusal is None else {**asdict(site.refusal), "closest": site.refusal.closest},
        "notes": list(site.notes),
        "fallbacks": list(site.fallbacks),
        "flops": site.flops,
        "share": share(site, flops),
    }


def _decision(decision: Decision) -> dict[str, Any]:
    original = decision.original
    plain = None if original is None else {name: getattr(original, name) for name in Candidate.__dataclass_fields__}
    return {**asdict(decision), "hint": decision.hint, "closest": decision.closest, "original": plain}


def tile_picture(spec: AttentionSpec, sizes: dict[str, int]) -> dict[str, Any]:
    """Draw the mask as at most 32 x 32 tiles, for all b and h together, at the sizes of the example inputs.

    rows, columns  number of tiles
    tile           [queries, keys] of a tile
    picture        a string for each row of tiles: "." is an empty tile, "+" a partial, "#" a full one
    live_fraction  share of the scores that may be live
    """
    from attnfx.mask import tiles

    tile_q, tile_k = (max(SMALLEST, -(-sizes[n] // PICTURE)) for n in ("T", "S"))
    found = tiles(spec, sizes, tile_q, tile_k)
    picture = ["".join(MARKS[found.classify(q, k)] for k in range(found.columns)) for q in range(found.rows)]
    return {
        "rows": found.rows,
        "columns": found.columns,
        "tile": [tile_q, tile_k],
        "picture": picture,
        "live_fraction": found.live_fraction,
    }


def _read_site(found: dict[str, Any]) -> Site:
    spec, decision, refusal = found["spec"], found["decision"], found["refusal"]
    return Site(
        name=found["name"],
        where=found["where"],
        spec=None if spec is None else from_json(json.dumps(spec, separators=(",", ":"), sort_keys=True)),
        dims=found["dims"],
        mask=found["mask"],
        decision=None if decision is None else _read_decision(decision),
        refusal=None
        if refusal is None
        else Refusal(**{**{k: v for k, v in refusal.items() if k != "closest"}, "nodes": tuple(refusal["nodes"])}),
        notes=tuple(found["notes"]),
        sizes=found["sizes"],
        flops=found["flops"],
    )


def _read_decision(found: dict[str, Any]) -> Decision:
    rest = {k: v for k, v in found.items() if k not in ("alternatives", "original", "hint", "closest")}
    return Decision(**_tile(rest), alternatives=tuple(Candidate(**_tile(c)) for c in found["alternatives"]))


def _tile(candidate: dict[str, Any]) -> dict[str, Any]:
    return {**candidate, "tile": None if candidate["tile"] is None else tuple(candidate["tile"])}
