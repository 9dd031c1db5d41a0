"""Describe a place that looks like attention for the report: its source line, sizes and mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph

from attnfx import cost
from attnfx.ir import algebra as A
from attnfx.mask import describe, mask_of
from attnfx.passes.fx.nodes import dims, number, value, where_in_source
from attnfx.passes.match.results import Finding, Match
from attnfx.passes.rewrite.attention import dimensions
from attnfx.report.records import Site
from attnfx.spec import UNKNOWN_SIZE


def bare_site(finding: Finding) -> Site:
    """Build the site of a finding with its source line and refusal alone."""
    place = next((p for p in map(where_in_source, [*finding.anchors, finding.final]) if p), "")
    return Site("", place, refusal=finding.refusal)


def describe_site(finding: Finding, known: dict[str, int]) -> Site:
    """Build the site of a finding, without a name and a decision; `known` are the example values of symbolic sizes."""
    site, match = bare_site(finding), finding.match
    if match is None:
        return site
    symbolic = dimensions(match)
    sizes = {k: cost.evaluate(v, known) for k, v in symbolic.items()}
    sizes |= {own: known.get(name, UNKNOWN_SIZE) for own, name in zip(match.spec.sizes, match.sizes, strict=True)}
    if _heads_alone(match):
        batch = symbolic["B"]
        symbolic |= {"B": A.ONE, "H": A.mul(batch, symbolic["H"]), "G": A.mul(batch, symbolic["G"])}
    mask = mask_of(match.spec.score)
    notes = []
    if mask is not None and mask.assumption:
        notes.append(f"assumes that {mask.assumption}")
    if match.chunks > 1:
        notes.append(f"joined from {match.chunks} chunks of queries")
    if match.steps > 1:
        notes.append(f"joined from {match.steps} steps of a loop over heads or batch elements")
    return replace(
        site,
        spec=match.spec,
        dims={k: int(v.value) if v.op == "const" else str(v) for k, v in symbolic.items()},  # type: ignore[call-overload]
        mask=describe(match.spec, sizes),
        notes=tuple(notes),
        sizes=sizes,
        flops=2 * sizes["B"] * sizes["H"] * sizes["T"] * sizes["S"] * (sizes["D"] + sizes["Dv"]),
    )


def _heads_alone(match: Match) -> bool:
    """Return whether the keys' only batch axis, b in the spec, is really the heads of a batch of one."""
    if len(match.kv_axes) != 1:
        return False
    inner = {match.row.value, match.value_width.value}
    outer = [(n, x.free) for n, x in zip(dims(match.final), match.out_index) if not inner & x.free]
    first = next((d for d, (_, names) in enumerate(outer) if match.kv_axes[0].value in names), 0)
    return first > 0 and all(n is A.ONE for n, _ in outer[:first])


def hints(graph: Graph) -> dict[str, int]:
    """Return the example value of each symbolic size in a graph."""
    out: dict[str, int] = {}
    for n in graph.nodes:
        held = value(n)
        for size in [held] if isinstance(held, torch.SymInt) else held.shape if isinstance(held, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                out.setdefault(str(size.node.expr), number(size))
                for symbol in size.node.expr.free_symbols:
                    known = _known(size.node.shape_env, symbol)
                    if known is not None:
                        out.setdefault(str(symbol), int(known))
    return out


def _known(shape_env: Any, symbol: Any) -> Any:
    for name in ("backed_var_to_val", "var_to_val"):  # the name depends on PyTorch's version
        found = getattr(shape_env, name, {}).get(symbol)
        if found is not None:
            return found
    return None
