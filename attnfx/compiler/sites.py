"""Describe a place that looks like attention for the report: its source line, sizes and mask."""

from __future__ import annotations

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


def describe_site(finding: Finding, sizes: dict[str, int]) -> Site:
    """Build the site of a finding, without a name and a decision; `sizes` come from `numeric_dims`."""
    final = finding.final
    place = next((p for p in map(where_in_source, [*finding.anchors, final]) if p), "")
    site = Site("", place, refusal=finding.refusal, sizes=sizes)
    if finding.match is not None:
        scores = sizes["B"] * sizes["H"] * sizes["T"] * sizes["S"]
        site.flops = 2 * scores * (sizes["D"] + sizes["Dv"])
        site.spec = finding.match.spec
        symbolic = dimensions(finding.match)
        if _heads_alone(finding.match):
            batch = symbolic["B"]
            symbolic |= {"B": A.ONE, "H": A.mul(batch, symbolic["H"]), "G": A.mul(batch, symbolic["G"])}
        site.dims = {k: int(v.value) if v.op == "const" else str(v) for k, v in symbolic.items()}  # type: ignore[call-overload]
        site.mask = describe(site.spec, sizes)
        mask = mask_of(site.spec.score)
        if mask is not None and mask.assumption:
            site.notes = (f"assumes that {mask.assumption}",)
        if finding.match.chunks > 1:
            site.notes = (*site.notes, f"joined from {finding.match.chunks} chunks of queries")
        if finding.match.steps > 1:
            site.notes = (
                *site.notes,
                f"joined from {finding.match.steps} steps of a loop over heads or batch elements",
            )
    return site


def _heads_alone(match: Match) -> bool:
    """Return whether the keys' only batch axis, b in the spec, is really the heads of a batch of one."""
    if len(match.kv_axes) != 1:
        return False
    inner = {match.row.value, match.value_width.value}
    outer = [(n, x.free) for n, x in zip(dims(match.final), match.out_index) if not inner & x.free]
    first = next((d for d, (_, names) in enumerate(outer) if match.kv_axes[0].value in names), 0)
    return first > 0 and all(n is A.ONE for n, _ in outer[:first])


def numeric_dims(finding: Finding, hints: dict[str, int]) -> dict[str, int]:
    """Evaluate B, H, G, T, S, D, Dv and the spec's own sizes at the example inputs."""
    if finding.match is None:
        return {}
    out = {k: cost.evaluate(v, hints) for k, v in dimensions(finding.match).items()}
    for canonical, name in zip(finding.match.spec.sizes, finding.match.sizes, strict=True):
        out[canonical] = hints.get(name, UNKNOWN_SIZE)
    return out


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
