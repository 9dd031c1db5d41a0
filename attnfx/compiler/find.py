"""Find the attentions of a prepared graph and of the bodies in it. Leaves the graph as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from torch.fx import Node

from attnfx.compiler.context import Context
from attnfx.compiler.faults import Fault, described
from attnfx.compiler.sites import bare_site, describe_site, hints
from attnfx.passes.fx import flops
from attnfx.passes.fx.graph_breaks import Break
from attnfx.passes.fx.nodes import refusal, where_in_source
from attnfx.passes.lift.graph import Graph
from attnfx.passes.match.matcher import Finder
from attnfx.passes.match.merge_parts import merge
from attnfx.passes.match.results import Finding
from attnfx.passes.match.unmatched import others
from attnfx.passes.match.weight_reductions import find_reductions
from attnfx.passes.match.weight_uses import needed
from attnfx.report.records import Refusal, Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A place that looks like attention.

    number  its index among the places of the graph
    site    its entry in the report, still without a decision
    reader  a node that needs the weights themselves, if there is one
    scored  whether other nodes need the scores
    """

    number: int
    finding: Finding
    site: Site
    reader: Node | None = None
    scored: bool = False

    @property
    def part(self) -> str:
        """Return the name of this part for fault handling: the same in every attempt at one graph."""
        return part_of(self.finding.final)


@dataclass(frozen=True)
class Found:
    """A graph after the search.

    graph   the prepared graph
    path    "" for the graph of Dynamo; for the body of a higher-order operator, attribute names, each with a slash
    finder  the search state, with the places that did not prove to be attention
    left    softmaxes that are not part of a place, each with the reason
    bodies  the searched bodies of higher-order operators, by attribute name
    text    the prepared graph's code, if it was kept
    """

    graph: Graph
    path: str
    finder: Finder
    places: tuple[Place, ...]
    left: tuple[tuple[Node, Refusal], ...]
    flops: int
    bodies: dict[str, Found] = field(default_factory=dict)
    text: str = ""

    def walk(self) -> Iterator[Found]:
        """Yield the bodies at any depth, then the graph itself."""
        for body in self.bodies.values():
            yield from body.walk()
        yield self


def find(graph: Graph, context: Context, ended: Break | None, bodies: dict[str, Found], text: str = "") -> Found:
    """Search a prepared graph for attentions. `ended` is the graph break at its end, if any."""
    finder = Finder(graph)
    findings = finder.find()
    for n, problem in finder.failed.items():
        context.attempt(part_of(n), partial(_raise, problem), None)
    findings = context.attempt("the pass merge_parts", partial(merge, finder, findings), findings)
    findings = [_kept(f, why) if (why := context.fault(part_of(f.final))) else f for f in findings]
    matches = [f.match for f in findings if f.match is not None]
    log.info("lifted %d of %d places that look like attention", len(matches), len(findings))
    context.attempt("the pass weight_reductions", partial(find_reductions, finder, matches), None)
    uses = partial(needed, finder.descent, matches)
    readers, scored = context.attempt("the pass weight_uses", uses, ({}, frozenset()))
    known = hints(graph.gm.graph)
    places = []
    for number, finding in enumerate(findings):
        describe, final = partial(describe_site, finding, known), finding.final
        site = context.attempt(part_of(final), describe, bare_site(finding))
        places.append(Place(number, finding, site, readers.get(final), final in scored))
    anchors = frozenset(a for f in findings if not f.loose for a in f.anchors)
    left = context.attempt("the pass unmatched", lambda: tuple(others(finder, anchors, ended)), ())
    operations = context.attempt("the count of operations", partial(flops.total, graph.gm), 0)
    return Found(graph, context.path, finder, tuple(places), left, operations, bodies, text)


def part_of(final: Node) -> str:
    where = where_in_source(final)
    return f"the site {final.name}" + (f" at {where}" if where else "")


def _raise(problem: Exception) -> None:
    raise problem


def _kept(finding: Finding, fault: Fault) -> Finding:
    """Refuse a place because attnfx failed on it."""
    trial = fault.code == "exercise"
    what = "the new kernel call failed in its trial run on tiny tensors" if trial else "attnfx failed on this attention"
    message = f"{what} ({described(fault.problem)})"
    why = refusal(fault.code, message, *finding.anchors, finding.final)
    return Finding(finding.final, refusal=why, anchors=finding.anchors)
