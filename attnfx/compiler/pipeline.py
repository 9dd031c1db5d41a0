"""Dynamo graph in, rewritten graph and report out: trace, find, decide, rewrite. Holds no state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from attnfx.compiler.choose import OPERATORS, Deciding
from attnfx.compiler.faults import Fault, Faults, Part, described
from attnfx.compiler.sites import describe_site, hints, numeric_dims
from attnfx.compiler.trace_log import publish, readable, said, traces
from attnfx.options import Options
from attnfx.passes.fx import flops
from attnfx.passes.fx import graph_breaks as breaks
from attnfx.passes.fx.cleanup import check, clean
from attnfx.passes.fx.cse import share
from attnfx.passes.fx.nodes import PRODUCTS, refusal, where_in_source
from attnfx.passes.lift.emitter import size_carriers
from attnfx.passes.lift.products import GATES
from attnfx.passes.match.matcher import Finder
from attnfx.passes.match.merge_query_chunks import merge
from attnfx.passes.match.results import Finding
from attnfx.passes.match.unmatched import others, unread, unread_bodies, with_reasons
from attnfx.passes.match.weight_reductions import find_reductions
from attnfx.passes.match.weight_uses import needed
from attnfx.passes.prepare.canonicalize import respell
from attnfx.passes.prepare.functionalize import functionalise
from attnfx.passes.prepare.hoist_concat import join
from attnfx.passes.prepare.inline_checkpoints import unmark
from attnfx.passes.prepare.merge_key_sets import unite
from attnfx.passes.prepare.merge_online_softmax import gather
from attnfx.passes.prepare.merge_score_terms import widen
from attnfx.passes.prepare.split_ones_column import split_ones
from attnfx.passes.prepare.split_pair_linear import unpair
from attnfx.passes.prepare.table_lookups import find_tables
from attnfx.passes.prepare.trace import Transformed, Untraceable, trace
from attnfx.passes.rewrite.record_stages import Recorder
from attnfx.passes.rewrite.site_pairs import Trial
from attnfx.report.records import Decision, Refusal, Site
from attnfx.report.report import Report

log = logging.getLogger(__name__)
T = TypeVar("T")

# A graph without one of these words in its operators' names holds no normaliser: it is not traced. A gate, which many
# linear layers have, may be one where there are products as well, and so may what is divided by a sum.
SHARES = (("div", "normalize"), ("sum", "norm", "mean"))
HINTS = ("softmax", "softmin", "exp", "sort", "scaled_dot_product", "multi_head")
BODIES = {
    "tag_activation_checkpoint": slice(0, 1),
    "cond": slice(1, 3),
    "autograd_function_apply": slice(0, 1),
    "wrap": slice(0, 1),
}


# The passes over a traced graph, in order. Each gives how much it changed.
PREPARE = (functionalise, unpair, split_ones, respell, join, gather, unite, widen)


@dataclass
class Result:
    """`gm` is None where the graph Dynamo made should be compiled as it is; `faults` says, a sentence each, which parts
    of the rewriting failed and were left out."""

    gm: GraphModule | None
    report: Report
    untraceable: str = ""
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """What is asked of one graph, or of the body of a higher-order operator in it.

    ended    the graph break that the graph ends with
    stages   whether the report is to hold the graph's stages as data
    trial    is given every rewritten site, and says which sites to keep
    path     leads to the body, from the graph itself; empty for that
    told     what is to be decided, as another report's `decided` has it; what is not there is chosen
    faults   the parts that failed before, which are left out
    exercise whether each new call is run once on tiny tensors
    """

    options: Options
    report: Report
    ended: breaks.Break | None = None
    stages: bool = False
    trial: Trial | None = None
    path: str = ""
    told: Mapping[tuple[str, int], Decision] = field(default_factory=dict)
    faults: Faults = field(default_factory=lambda: Faults((Untraceable,)))
    exercise: bool = False

    def attempt(self, name: str, run: Callable[[], T], otherwise: T) -> T:
        return self.faults.attempt(Part(self.path, name), run, otherwise)

    def fault(self, name: str) -> Fault | None:
        return self.faults.found.get(Part(self.path, name))

    def body(self, name: str) -> Wanted:
        inner = None if self.trial is None else self.trial.body(name)
        return replace(self, ended=None, trial=inner, path=f"{self.path}{name}/")


def run(gm: GraphModule, options: Options, *, stages: bool = False, trial: Trial | None = None,
        told: Mapping[tuple[str, int], Decision] | None = None, exercise: bool = False) -> Result:  # fmt: skip
    """Never changes `gm`. An untraceable graph is a note in the report. What goes wrong inside attnfx costs the part in
    which it happens, a pass or a site, and `strict` raises it; what is no part is raised.

    With `stages`, with `dump_dir` and where PyTorch's structured trace is read, the report holds the traced, lifted and
    rewritten graph as data; with `dump_dir` their text too. A `trial` is given every rewritten site, and says which
    sites to keep. `told` are the decisions of a report of the same graph at other sizes. With `exercise`, each call
    that a site becomes is run once on tiny tensors.
    """
    faults = Faults((Untraceable,))
    while True:
        wanted = Wanted(options, Report(), None, stages, trial, told=told or {}, faults=faults, exercise=exercise)
        try:
            result = _attempted(gm, wanted)
        except Fault as fault:
            if options.strict:
                raise fault.problem from fault
            log.warning("%s: compiled without it", fault, exc_info=fault.problem)
            faults.add(fault)
            continue
        result.faults = [str(f) for f in faults.found.values()]
        result.report.notes.extend(f"attnfx failed in a part, which was left out: {f}" for f in result.faults)
        return result


def _attempted(gm: GraphModule, wanted: Wanted) -> Result:
    report, options = wanted.report, wanted.options
    ended = breaks.ended_by(gm)
    if ended is not None:
        report.notes.append(f"a graph breaks at {ended.where}: {ended.reason}")
    if options.rewrite == "never":
        report.notes.append('rewrite="never": nothing was looked for')
        return Result(None, report)
    if not _worth_tracing(gm):
        log.debug("a graph of %d nodes holds no normaliser: not traced", len(gm.graph.nodes))
        return Result(None, report)
    try:
        kept = wanted.stages or options.dump_dir is not None or traces()
        traced, changed = _graph(gm, replace(wanted, ended=ended, stages=kept))
    except Transformed as problem:
        report.notes.append(f"{problem} and passes through untouched")
        _file_others(report, unread(gm, "functorch", str(problem)))
        return Result(None, report)
    except Untraceable as problem:
        report.notes.append(f"the graph could not be traced and was left as it was: {problem}")
        _file_others(report, unread(gm, "untraceable", f"the graph could not be traced: {problem}"))
        log.info("untraceable: %s", problem)
        return Result(None, report, str(problem))
    if "lifted" in report.stages:
        publish("lifted", report.stages["lifted"].listing)
    publish("report", report.to_json, "json")
    log.info("%d of %d attention sites rewritten", len(report.rewritten), len(report.sites))
    return Result(traced if changed else None, report)


def _file_others(report: Report, found: Iterable[tuple[Node, Refusal]]) -> None:
    """Softmaxes of which no attention was made; what a graph break has cut in two is a site that was refused."""
    for n, why in found:
        site = Site("", where_in_source(n), refusal=why)
        if why.code == "graph_break":
            report.file_site(site)
        else:
            report.others.append(replace(site, name=f"softmax_{len(report.others)}"))


def _worth_tracing(gm: GraphModule) -> bool:
    names = [
        str(n.target) if n.op == "call_method" else getattr(n.target, "__name__", str(n.target))
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for n in module.graph.nodes
        if n.op in ("call_function", "call_method")
    ]

    def some(words: Iterable[str]) -> bool:
        return any(word in name for name in names for word in words)

    return some(HINTS) or ((some(GATES) or all(map(some, SHARES))) and some(PRODUCTS))


def _graph(gm: GraphModule, wanted: Wanted) -> tuple[GraphModule, bool]:
    options, report, path = wanted.options, wanted.report, wanted.path
    traced = trace(gm)
    log.info("traced %s: %d nodes become %d", path or "a graph", len(gm.graph.nodes), len(traced.graph.nodes))
    publish("traced", lambda: readable(traced))
    text = readable(traced) if options.dump_dir is not None and not path else ""
    for step in PREPARE:
        wanted.attempt(f"the pass {step.__name__}", partial(step, traced), 0)
    check(traced)
    if wanted.trial is not None:
        wanted.trial.begin(traced)
    changed = _bodies(traced, wanted)
    known = hints(traced.graph)
    deciding = Deciding(traced, options, size_carriers(traced), wanted.trial, exercise=wanted.exercise)
    tables = wanted.attempt("the pass find_tables", partial(find_tables, traced), {})
    finder = Finder(traced, tables)
    deciding.facts = deciding.original = finder.facts
    found = finder.find()
    for n, problem in finder.failed.items():
        wanted.attempt(_part(n), partial(_raise, problem), None)
    findings = wanted.attempt("the pass merge", partial(merge, finder, found), found)
    findings = [_kept(f, why) if (why := wanted.fault(_part(f.final))) else f for f in findings]
    matches = [f.match for f in findings if f.match is not None]
    log.info("lifted %d of %d places that look like attention", len(matches), len(findings))
    wanted.attempt("the pass find_reductions", partial(find_reductions, finder, matches), None)
    readers = wanted.attempt("the pass needed", partial(needed, matches), {})
    todo = []
    for finding in findings:
        sizes, site = wanted.attempt(_part(finding.final), partial(_described, finding, known), ({}, _bare(finding)))
        todo.append((finding, site, sizes))
    anchors = frozenset(a for f in findings if not f.loose for a in f.anchors)
    left = wanted.attempt("the list of softmaxes", lambda: list(others(finder, anchors, wanted.ended)), [])
    left += unread_bodies(traced, BODIES)
    report.flops += wanted.attempt("the count of operations", partial(flops.total, traced), 0)
    record = None
    if wanted.stages:
        record = wanted.attempt("the record of stages", partial(Recorder, traced, findings, text), None)
    # from the last: an operand may be the output of an attention before it, which is replaced then
    for number, (finding, site, sizes) in reversed(list(enumerate(todo))):
        place = path, number
        decide = partial(deciding.decide, finding, site, sizes, readers.get(finding.final), wanted.told.get(place))
        if wanted.fault(_part(finding.final)) is not None:
            changed |= deciding.shielded(finding, site)
        else:
            changed |= wanted.attempt(_part(finding.final), decide, False)
        if site.decision is not None:
            report.decided[place] = site.decision
        if record is not None:
            record.rewritten(number)
    filed = {n: site for n, (f, site, _) in enumerate(todo) if not f.loose or site.decision is not None}
    for site in filed.values():
        report.file_site(site)
        log.info("%s at %s: %s", site.name, site.where, said(site))
    dropped = [(f, site.refusal) for n, (f, site, _) in enumerate(todo) if n not in filed]
    dropped += [(f, f.refusal) for f in finder.doubtful]
    _file_others(report, with_reasons(finder, left, dropped, [findings[n] for n in filed]))
    if changed:
        wanted.attempt("the pass share", partial(share, traced, OPERATORS.summary), 0)
        clean(traced)
        wanted.attempt("the pass unmark", partial(unmark, traced), None)
        check(traced)
        publish("rewritten", lambda: readable(traced))
    if record is not None:
        after = readable(traced) if text and changed else ""
        for stage in record.stages({n: site.name for n, site in filed.items()}, after):
            report.stage(stage.name).add(stage, path)
    return traced, changed


def _part(final: Node) -> str:
    """The name of a site as a part: the same in every attempt at one graph."""
    where = where_in_source(final)
    return f"the site {final.name}" + (f" at {where}" if where else "")


def _raise(problem: Exception) -> None:
    raise problem


def _described(finding: Finding, known: dict[str, int]) -> tuple[dict[str, int], Site]:
    sizes = numeric_dims(finding, known)
    return sizes, describe_site(finding, sizes)


def _kept(finding: Finding, fault: Fault) -> Finding:
    """A place at which attnfx failed, refused for that."""
    what = "when it was run once on tiny tensors" if fault.code == "exercise" else "when it was looked at"
    message = f"attnfx failed on it {what} ({described(fault.problem)})"
    why = refusal(fault.code, message, *finding.anchors, finding.final)
    return Finding(finding.final, refusal=why, anchors=finding.anchors)


def _bare(finding: Finding) -> Site:
    place = next((p for p in map(where_in_source, [*finding.anchors, finding.final]) if p), "")
    return Site("", place, refusal=finding.refusal)


def _bodies(traced: GraphModule, wanted: Wanted) -> bool:
    """Rewrite inside the submodules of higher-order operators; one that cannot be traced stays as it was."""
    changed = False
    for n in list(traced.graph.nodes):
        if n.op != "call_function" or not isinstance(n.target, HigherOrderOperator) or n.target.name() not in BODIES:
            continue
        for operand in n.args[BODIES[n.target.name()]]:
            if not isinstance(operand, Node) or operand.op != "get_attr":
                continue
            body = getattr(traced, str(operand.target))
            if not isinstance(body, GraphModule) or not _worth_tracing(body):
                continue
            try:
                rewritten = partial(_graph, body, wanted.body(str(operand.target)))
                new, touched = wanted.attempt(f"the body {operand.target}", rewritten, (body, False))
            except Transformed as problem:
                _file_others(wanted.report, unread(body, "functorch", str(problem)))
                continue
            except Untraceable as problem:
                wanted.report.notes.append(f"the body of {n.target.name()} was left as it was: {problem}")
                _file_others(wanted.report, unread(body, "untraceable", f"the body could not be traced: {problem}"))
                continue
            if touched:
                setattr(traced, str(operand.target), new)
                changed = True
    return changed
