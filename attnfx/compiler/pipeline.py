"""Compile one graph of Dynamo in five steps: prepare, find, choose, verify, apply.

prepare   run the passes of PREPARE, in order: a Dynamo graph becomes a plain ATen graph
find      find attentions, or the reason why a place is not one; leaves the graph as it is
choose    decide on each; leaves the graph as it is
verify    with verify="first", compare each rewrite with the original; keep the original if they differ
apply     replace the sites, share mask summaries, eliminate dead code
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from attnfx.compiler.apply import Outcome, apply
from attnfx.compiler.choices import LEAVE, SHIELD, Choice
from attnfx.compiler.choose import choose
from attnfx.compiler.context import Context
from attnfx.compiler.faults import Fault
from attnfx.compiler.find import Found, Place, find
from attnfx.compiler.prefilter import worth_tracing
from attnfx.compiler.trace_log import publish, readable, said, traces
from attnfx.kernels import operators
from attnfx.options import Options
from attnfx.passes.fx import graph_breaks
from attnfx.passes.fx.cleanup import check, clean
from attnfx.passes.fx.copies import carried
from attnfx.passes.fx.cse import share
from attnfx.passes.fx.examples import Transformed, Untraceable
from attnfx.passes.fx.nodes import SDPA, op_name, where_in_source
from attnfx.passes.lift.graph import Graph
from attnfx.passes.match.unmatched import unread, unread_bodies, with_reasons
from attnfx.passes.prepare import (
    align_relative_values,
    delay_writes,
    detach_no_grad,
    distribute_products,
    expand_vmap,
    functionalize,
    hoist_concat,
    inline_checkpoints,
    merge_key_sets,
    merge_online_softmax,
    merge_score_terms,
    trace,
)
from attnfx.passes.prepare.inline_checkpoints import unmark
from attnfx.passes.rewrite.flex import SHARED
from attnfx.passes.rewrite.record_stages import Recorder
from attnfx.passes.rewrite.subgraph import Trial, pair
from attnfx.report.records import Decision, Refusal, Site
from attnfx.report.report import Report
from attnfx.verify import verify

log = logging.getLogger(__name__)

# Each has `run(graph)`, which changes the graph and returns the number of changes.
PREPARE = (
    inline_checkpoints,
    expand_vmap,
    trace,
    functionalize,
    delay_writes,
    detach_no_grad,
    distribute_products,
    hoist_concat,
    merge_online_softmax,
    merge_key_sets,
    merge_score_terms,
    align_relative_values,
)
CHECK_EACH = False  # verify the graph after each pass; `strict` and `dump_dir` do so too
# Higher-order operators whose bodies are searched, each with the slice of its operands that are bodies.
BODIES = {
    "tag_activation_checkpoint": slice(0, 1),
    "cond": slice(1, 3),
    "autograd_function_apply": slice(0, 1),
    "wrap": slice(0, 1),
}


@dataclass
class Result:
    """The result for one graph.

    gm           the rewritten graph; None if Dynamo's graph should be compiled as it is
    untraceable  why the graph could not be traced to ATen; "" if it was
    faults       a sentence for each part of the rewriting that failed and was left out
    found        the search, kept with a memory budget for `again`
    passes       with `dump_dir`, (pass, the graph's code after it) for each pass that changed the graph
    """

    gm: GraphModule | None
    report: Report
    untraceable: str = ""
    faults: list[str] = field(default_factory=list)
    found: Found | None = None
    passes: list[tuple[str, str]] = field(default_factory=list)


def run(
    gm: GraphModule, options: Options, inputs: Sequence[Any] | None = None, *, stages: bool = False,
    told: Mapping[tuple[str, int], Decision] | None = None, exercise: bool = False,
) -> Result:  # fmt: skip
    """Rewrite a graph; `gm` itself is never changed.

    An untraceable graph becomes a note in the report. A failure of attnfx costs the part in which it happens, a pass or
    a site; with `strict` it is raised.

    inputs    the tensors of the call, for verify="first"
    stages    record the traced, lifted and rewritten graph in the report as data; also done with `dump_dir` and if
              PyTorch's structured trace is on
    told      decisions to take over, from a report on the same graph at other sizes
    exercise  run each new call of a site once on tiny tensors
    """
    faults: dict[str, Fault] = {}
    stages = stages or options.dump_dir is not None or traces()
    while True:
        context = Context(options, Report(), stages, told or {}, faults, exercise, inputs or ())
        try:
            result = _attempt(gm, context, inputs)
        except Fault as fault:
            if options.strict:
                raise fault.problem from fault
            log.warning("%s: compiled without it", fault, exc_info=fault.problem)
            faults[fault.part] = fault
            continue
        result.passes = context.passes
        result.faults = [str(f) for f in faults.values()]
        result.report.notes.extend(
            f"attnfx failed in a part of the graph and left that part out: {f}" for f in result.faults
        )
        return result


def again(result: Result, options: Options, inputs: Sequence[Any] | None = None) -> Result:
    """Decide and rewrite a graph again under other options, without another search. Needs the result of a `run` with a
    memory budget, and leaves that result unchanged."""
    found = result.found
    if found is None:
        return replace(result, report=Report(notes=list(result.report.notes)))
    context = Context(options, Report(notes=list(result.report.notes)), exercise=True, inputs=inputs or ())
    return _decided(found, context, inputs, keep=True)


def _attempt(gm: GraphModule, context: Context, inputs: Sequence[Any] | None) -> Result:
    report, options = context.report, context.options
    ended = graph_breaks.ended_by(gm)
    if ended is not None:
        report.notes.append(f"graph break at {ended.where}: {ended.reason}")
    if options.rewrite == "never":
        report.notes.append('the graph was not searched, because of rewrite="never"')
        return Result(None, report)
    if not worth_tracing(gm):
        log.debug(
            "a graph of %d nodes was not traced: it contains no operator that can normalize weights",
            len(gm.graph.nodes),
        )
        return Result(None, report)
    try:
        found = _searched(gm, context, ended)
    except Untraceable as problem:
        _file_untraced(report, gm, problem, "the graph")
        if isinstance(problem, Transformed):
            report.notes.append(f"{problem}; the graph is compiled without a rewrite")
            return Result(None, report)
        report.notes.append(f"the graph could not be traced and is compiled without a rewrite: {problem}")
        log.info("untraceable: %s", problem)
        return Result(None, report, str(problem))
    return _decided(found, context, inputs, keep=options.memory_budget is not None)


# -- prepare and find ---------------------------------------------------------------------------------
def prepare(gm: GraphModule, context: Context) -> Graph:
    """Run the passes of PREPARE on a Dynamo graph, without changing `gm` itself. Raises Untraceable."""
    graph = Graph(gm)
    strict = CHECK_EACH or context.options.strict or context.options.dump_dir is not None
    for step in PREPARE:
        name = step.__name__.rpartition(".")[2]
        changes = context.attempt(f"the pass {name}", partial(_passed, step, graph, strict), 0)
        log.debug("%spass %s: %d changes", context.path, name, changes)
        if not changes:
            continue
        publish(f"pass_{name}", partial(_listed, name, changes, graph))
        if context.options.dump_dir is not None:
            context.passes.append((f"{context.path}{name}".replace("/", "."), readable(graph.gm)))
    return graph


def _passed(step: Any, graph: Graph, strict: bool) -> int:
    """Run a pass, eliminate dead code, verify the graph if `strict`, and return the number of changes."""
    changes = step.run(graph)
    if changes:
        graph.changed()
        if graph.traced:
            clean(graph.gm)
            if strict:
                check(graph.gm)
    return changes


def _listed(name: str, changes: int, graph: Graph) -> str:
    return f"# {changes} changes by the pass {name}\n{readable(graph.gm)}"


def _searched(gm: GraphModule, context: Context, ended: graph_breaks.Break | None = None) -> Found:
    """Prepare a graph, then search the bodies of its higher-order operators and the graph itself."""
    graph = prepare(gm, context)
    log.info("traced %s: %d nodes become %d", context.path or "a graph", len(gm.graph.nodes), len(graph.gm.graph.nodes))
    publish("traced", lambda: readable(graph.gm))
    check(graph.gm)
    text = readable(graph.gm) if context.options.dump_dir is not None and not context.path else ""
    return find(graph, context, ended, _bodies(graph.gm, context), text)


def _bodies(gm: GraphModule, context: Context) -> dict[str, Found]:
    """Search the bodies of higher-order operators; a body that cannot be traced stays as it was."""
    found: dict[str, Found] = {}
    for n in gm.graph.nodes:
        if n.op != "call_function" or not isinstance(n.target, HigherOrderOperator) or n.target.name() not in BODIES:
            continue
        for operand in n.args[BODIES[n.target.name()]]:
            if not isinstance(operand, Node) or operand.op != "get_attr":
                continue
            name = str(operand.target)
            body = getattr(gm, name)
            if not isinstance(body, GraphModule) or name in found or not worth_tracing(body):
                continue
            try:
                searched = context.attempt(f"the body {name}", partial(_searched, body, context.body(name)), None)
            except Untraceable as problem:
                _file_untraced(context.report, body, problem, "the body")
                if not isinstance(problem, Transformed):
                    name = n.target.name()
                    context.report.notes.append(f"the body of {name} is compiled without a rewrite: {problem}")
                continue
            if searched is not None:
                found[name] = searched
    return found


# -- choose, verify, apply ----------------------------------------------------------------------------
Chosen = dict[str, list[Choice]]  # for each body and the graph itself, by path in the order of `Found.walk`


def _decided(found: Found, context: Context, inputs: Sequence[Any] | None, keep: bool) -> Result:
    """Choose, verify and apply. `keep`: apply the choices to a copy, so that `again` can reuse the search."""
    options, report = context.options, context.report
    chosen = _named({part.path: choose(part, replace(context, path=part.path), options) for part in found.walk()})
    if options.verify == "first" and inputs is not None:
        chosen = _verified(found, chosen, inputs, context)
    gm, changed = _applied(found, chosen, context, keep)
    if "lifted" in report.stages:
        publish("lifted", report.stages["lifted"].listing)
    publish("report", report.to_json, "json")
    log.info("%d of %d attention sites rewritten", len(report.rewritten), len(report.sites))
    return Result(gm if changed else None, report, found=found if keep else None)


def _named(chosen: Chosen) -> Chosen:
    """Name the sites that the report will list, in the report's order."""
    number = count()

    def named(choice: Choice) -> Choice:
        if not _is_filed(choice):
            return choice
        return replace(choice, site=replace(choice.site, name=f"attention_{next(number)}"))

    return {path: [named(c) for c in choices] for path, choices in chosen.items()}


def _is_filed(choice: Choice) -> bool:
    return not choice.finding.loose or choice.site.decision is not None


def _verified(found: Found, chosen: Chosen, inputs: Sequence[Any], context: Context) -> Chosen:
    """Compare each rewrite with the original, and keep the original if the results differ."""
    notes, failures = verify.compare(_trial(found, chosen, context), inputs, context.options)

    def judged(path: str, choice: Choice) -> Choice:
        name = f"{path}{choice.finding.final.name}"
        if choice.action is None or name not in notes:
            return choice
        if name not in failures:
            return choice.noted(notes[name])
        reason = f"on the first call the rewrite and the original disagreed: {failures[name]}"
        shield = LEAVE if op_name(choice.finding.final) in SDPA else SHIELD
        return choice.kept(Decision("kept", "", reason=reason, code="mismatch"), None, shield).noted(notes[name])

    return {path: [judged(path, c) for c in choices] for path, choices in chosen.items()}


def _trial(found: Found, chosen: Chosen, context: Context) -> Trial:
    """Pair each site with its rewrite, by applying the choices to a copy of the graph."""
    graph, copies = found.graph.copy()
    facts, names = graph.facts, {new: old.name for old, new in copies.items()}
    choices = [carried(c, copies) for c in chosen[found.path]]
    done = apply(graph, choices, replace(context, path=found.path, exercise=False))
    pairs = [
        pair(facts, names, found.path, o.choice.site, o.choice.finding.final, o.replaced) for o in done if o.replaced
    ]
    bodies = {name: _trial(body, chosen, context) for name, body in found.bodies.items()}
    return Trial(found.graph.gm, pairs, bodies)


def _applied(found: Found, chosen: Chosen, context: Context, keep: bool) -> tuple[GraphModule, bool]:
    """Apply the choices to a graph and its bodies, and file their sites; return the graph and whether it changed."""
    report, graph, choices = context.report, found.graph, chosen[found.path]
    places = [c.place for c in choices]
    if keep:
        graph, copies = graph.copy()
        choices = [carried(c, copies) for c in choices]
    changed = False
    for name, body in found.bodies.items():
        made, touched = _applied(body, chosen, context, keep)
        if touched:
            setattr(graph.gm, name, made)
            changed = True
    context = replace(context, path=found.path)
    record = None
    if context.stages:
        findings = [c.finding for c in choices]
        record = context.attempt("the record of stages", partial(Recorder, graph.gm, findings, found.text), None)
    after = None if record is None else lambda place, made: record.rewritten(place.number, made)
    done = apply(graph, choices, context, after)
    changed |= any(o.changed for o in done)
    report.flops += found.flops
    filed = _file(found, places, done, report)
    if changed:
        context.attempt("the pass share", partial(share, graph.gm, _is_shared), None)
        clean(graph.gm)
        context.attempt("the pass unmark", partial(unmark, graph.gm), None)
        check(graph.gm)
        publish("rewritten", lambda: readable(graph.gm))
    if record is not None:
        text = readable(graph.gm) if found.text and changed else ""
        names = {str(p.number): filed[p.number].name if p.number in filed else "" for p in places}
        for stage in record.stages(filed, text):
            report.stage(stage.name).add(stage, found.path, names)
    return graph.gm, changed


def _is_shared(n: Node) -> bool:
    """Return whether a call describes a mask: sites with equal masks share it."""
    return n.target is operators.MASK_SUMMARY or bool(n.meta.get(SHARED))


def _file(found: Found, places: Sequence[Place], done: Sequence[Outcome], report: Report) -> dict[int, Site]:
    """File the sites of a graph and its other softmaxes in the report; return the sites by number."""
    filed: dict[int, Site] = {}
    dropped = []
    for place, outcome in zip(places, done, strict=True):
        site = replace(outcome.choice.site)
        if site.decision is not None:
            report.decided[found.path, place.number] = site.decision
        if _is_filed(outcome.choice):
            filed[place.number] = site
            report.file_site(site)
            log.info("%s at %s: %s", site.name, site.where, said(site))
        else:
            dropped.append((place.finding, site.refusal))
    dropped.extend((f, f.refusal) for f in found.finder.doubtful)
    left = [*found.left, *unread_bodies(found.graph.gm, BODIES)]
    kept = [p.finding for p in places if p.number in filed]
    _file_others(report, with_reasons(found.finder, left, dropped, kept))
    return filed


def _file_untraced(report: Report, gm: GraphModule, problem: Untraceable, what: str) -> None:
    """File the softmaxes of a graph or body that could not be traced."""
    if isinstance(problem, Transformed):
        _file_others(report, unread(gm, "functorch", str(problem)))
    else:
        _file_others(report, unread(gm, "untraceable", f"{what} could not be traced: {problem}"))


def _file_others(report: Report, found: Iterable[tuple[Node, Refusal]]) -> None:
    """File softmaxes that are not attention; one that a graph break cut in two counts as a refused site."""
    for n, why in found:
        site = Site("", where_in_source(n), refusal=why)
        if why.code == "graph_break":
            report.file_site(site)
        else:
            report.others.append(replace(site, name=f"softmax_{len(report.others)}"))
