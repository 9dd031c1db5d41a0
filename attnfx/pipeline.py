"""Dynamo graph in, rewritten graph and report out: trace, find, decide, rewrite. Holds no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from attnfx import cost
from attnfx.ir import algebra as A
from attnfx.kernels import configuration, operator, operator_rows, operator_weights  # noqa: F401  (these register)
from attnfx.mask import describe, mask_of
from attnfx.options import Options
from attnfx.passes.facts import Facts
from attnfx.passes.functionalise import functionalise
from attnfx.passes.graphs import dims, op_name, value, where_in_source
from attnfx.passes.match import SDPA, Finder, Finding, Match
from attnfx.passes.reductions import find_reductions, needed
from attnfx.passes.regions import Region, find_region, replace_region
from attnfx.passes.rewrite import CannotEmit, Carriers, Operators, check, clean, dimensions, rewrite, size_carriers
from attnfx.passes.shield import shield
from attnfx.passes.trace import Untraceable, trace, uses_functorch
from attnfx.report import Candidate, Refusal, Report, Site
from attnfx.targets import Target

# A graph without one of these words in its operators' names holds no normaliser: it is not traced.
HINTS = ("softmax", "exp", "sigmoid", "sort", "scaled_dot_product", "multi_head")
OPERATORS = Operators(torch.ops.attnfx.attention.default, torch.ops.attnfx.attention_weights.default)
ROWS = torch.ops.attnfx.attention_rows.default
BODIES = {
    "tag_activation_checkpoint": slice(0, 1),
    "cond": slice(1, 3),
    "autograd_function_apply": slice(0, 1),
    "wrap": slice(0, 1),
}


@dataclass
class Result:
    """`gm` is None where the graph Dynamo made should be compiled as it is."""

    gm: GraphModule | None
    report: Report
    stages: dict[str, str] = field(default_factory=dict)  # name -> readable graph, kept where they are dumped
    untraceable: str = ""


def run(gm: GraphModule, options: Options) -> Result:
    """Never changes `gm`. Raises what goes wrong inside attnfx; an untraceable graph is a note in the report."""
    report = Report()
    if options.rewrite == "never":
        report.notes.append('rewrite="never": nothing was looked for')
        return Result(None, report)
    if uses_functorch(gm):
        report.notes.append("the graph uses functorch transforms and passes through untouched")
        return Result(None, report)
    if not _worth_tracing(gm):
        return Result(None, report)
    stages: dict[str, str] = {}
    try:
        traced, changed = _graph(gm, options, report, stages)
    except Untraceable as problem:
        report.notes.append(f"the graph could not be traced and was left as it was: {problem}")
        return Result(None, report, stages, str(problem))
    return Result(traced if changed else None, report, stages)


def _worth_tracing(gm: GraphModule) -> bool:
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for n in module.graph.nodes:
                name = str(n.target) if n.op == "call_method" else getattr(n.target, "__name__", str(n.target))
                if n.op in ("call_function", "call_method") and any(h in name for h in HINTS):
                    return True
    return False


def _graph(gm: GraphModule, options: Options, report: Report, stages: dict[str, str]) -> tuple[GraphModule, bool]:
    traced = trace(gm)
    if options.dump_dir is not None:
        stages["traced"] = readable(traced)
    functionalise(traced)
    check(traced)
    changed = _bodies(traced, options, report)
    hints, carriers = _hints(traced.graph), size_carriers(traced)
    finder = Finder(traced)
    findings = finder.find()
    matches = [f.match for f in findings if f.match is not None]
    find_reductions(finder, matches)
    readers = needed(matches)
    todo = []
    for finding in findings:
        sizes = numeric_dims(finding, hints)
        todo.append((finding, describe_site(finding, sizes), sizes))
    # from the last: an operand may be the output of an attention before it, which is replaced then
    for finding, site, sizes in reversed(todo):
        changed |= _decide(traced, finding, site, sizes, options, carriers, readers.get(finding.final))
    for finding, site, _ in todo:
        if not finding.loose or site.decision is not None:
            site.name = f"attention_{len(report.sites)}"
            report.sites.append(site)
    if changed:
        clean(traced)
        check(traced)
        if options.dump_dir is not None:
            stages["rewritten"] = readable(traced)
    return traced, changed


def readable(gm: GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _bodies(traced: GraphModule, options: Options, report: Report) -> bool:
    """Rewrite inside the submodules of higher-order operators; one that cannot be traced stays as it was."""
    changed = False
    for n in list(traced.graph.nodes):
        if n.op != "call_function" or not isinstance(n.target, HigherOrderOperator) or n.target.name() not in BODIES:
            continue
        for operand in n.args[BODIES[n.target.name()]]:
            if not isinstance(operand, Node) or operand.op != "get_attr":
                continue
            body = getattr(traced, str(operand.target))
            if not isinstance(body, GraphModule) or not _worth_tracing(body) or uses_functorch(body):
                continue
            try:
                new, touched = _graph(body, options, report, {})
            except Untraceable as problem:
                report.notes.append(f"the body of {n.target.name()} was left as it was: {problem}")
                continue
            if touched:
                setattr(traced, str(operand.target), new)
                changed = True
    return changed


def number(n: Any) -> int:
    """A size, or the example's size of a symbolic one."""
    if isinstance(n, int):
        return n
    hint = n.node.hint if isinstance(n, torch.SymInt) else None
    return int(hint) if hint is not None else 1024


def describe_site(finding: Finding, sizes: dict[str, int]) -> Site:
    final = finding.final
    place = next((p for p in map(where_in_source, [*finding.anchors, final]) if p), "")
    site = Site("", place, refusal=finding.refusal)
    if finding.match is not None:
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
    return site


def _heads_alone(match: Match) -> bool:
    """Whether the one batch axis of the keys stands where heads do, behind a batch of one. The spec calls it b."""
    if len(match.kv_axes) != 1:
        return False
    inner = {match.row.value, match.value_width.value}
    outer = [(n, x.free) for n, x in zip(dims(match.final), match.out_index) if not inner & x.free]
    first = next((d for d, (_, names) in enumerate(outer) if match.kv_axes[0].value in names), 0)
    return first > 0 and all(n is A.ONE for n, _ in outer[:first])


def numeric_dims(finding: Finding, hints: dict[str, int]) -> dict[str, int]:
    """B, H, G, T, S, D, Dv and the spec's own sizes, by the example inputs."""
    if finding.match is None:
        return {}
    out = {k: cost.evaluate(v, hints) for k, v in dimensions(finding.match).items()}
    for canonical, name in zip(finding.match.spec.sizes, finding.match.sizes, strict=True):
        out[canonical] = hints.get(name, 1)
    return out


def _hints(graph: torch.fx.Graph) -> dict[str, int]:
    """The example value of each symbolic size in a graph."""
    out: dict[str, int] = {}
    for n in graph.nodes:
        held = value(n)
        for size in [held] if isinstance(held, torch.SymInt) else held.shape if isinstance(held, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                out.setdefault(str(size.node.expr), number(size))
                for symbol in size.node.expr.free_symbols:
                    known = (
                        size.node.shape_env.backed_var_to_val.get(symbol)
                        if hasattr(size.node.shape_env, "backed_var_to_val")
                        else None
                    )
                    if known is None:
                        known = getattr(size.node.shape_env, "var_to_val", {}).get(symbol)
                    if known is not None:
                        out.setdefault(str(symbol), int(known))
    return out


def _decide(
    traced: GraphModule,
    finding: Finding,
    site: Site,
    sizes: dict[str, int],
    options: Options,
    carriers: Carriers,
    reader: Node | None,
) -> bool:
    """Choose for one site and carry it out. True where the graph changed. `reader` is what else its weights are for."""
    match = finding.match
    if match is None:
        return _whole_rows(traced, finding, site, options, carriers) or (
            not finding.loose and _shielded(traced, finding, site)
        )
    query = value(match.query.node)
    native = op_name(finding.final) in SDPA
    reductions = [] if reader is not None else match.reductions
    target, device = target_of(options, query.device)
    here = operator.refusals(match.spec, query.dtype, query.device, sizes["D"], sizes["Dv"])
    refused = here
    if isinstance(options.target, Target):
        refused = operator.refusals(match.spec, query.dtype, device, sizes["D"], sizes["Dv"], options.target.capability)
    question = cost.Question(
        match.spec, sizes, str(query.dtype).removeprefix("torch."), device.type,
        training=torch.is_grad_enabled() and match.training, native=native, sums=len(reductions),
        weights_read="" if reader is None else where_in_source(reader) or reader.name,
        refused=refused,
    )  # fmt: skip
    site.decision = cost.decide(question, options, torch.get_num_threads(), target)
    if target is not None and target.note and options.target == "auto":
        site.notes = (*site.notes, target.note)
    if site.decision.tier == "kept":
        return not native and _shielded(traced, finding, site, only_risky=True)
    try:
        # The second is for what only the call shows: an empty tensor, say, is beyond most tiers. Sums of dropped
        # weights are computed in blocks, and other tiers drop others.
        shared = any(r.spec.random for r in reductions)
        tiers = ["chunked"] if shared else tiers_of(site.decision, here, query.device)
        rewrite(traced, match, OPERATORS, ",".join(tiers), carriers, reductions)
    except CannotEmit as problem:
        site.refusal, site.decision = Refusal("layout", str(problem), (finding.final.name,)), None
        return _shielded(traced, finding, site)
    if isinstance(options.target, Target) and site.decision.tier in here:
        instead = next(t for t in tiers if t.partition(":")[0] not in here)
        said = f"decided for {options.target.name}; the {query.device.type} at hand runs it as {instead}"
        site.notes = (*site.notes, said)
    if reductions:
        places = ", ".join(dict.fromkeys(where_in_source(r.final) or r.final.name for r in reductions))
        site.notes = (*site.notes, f"sums of its weights are computed without them ({places})")
    return True


def target_of(options: Options, present: torch.device) -> tuple[Target | None, torch.device]:
    """(what to decide for, or None for a CPU and for what nothing is known of; a device of its kind)."""
    if isinstance(options.target, Target):
        return options.target, torch.device(options.target.kind)
    if present.type == "cuda" and torch.cuda.is_available():
        return Target.detect(present), present
    return None, present


def tiers_of(chosen: Candidate, here: Mapping[str, str], present: torch.device) -> list[str]:
    """The operator's tiers for a decision. `here`: the tiers that the present device cannot run. Behind the chosen one
    come those that it can, where the decision is for another, and the one that runs any call."""
    others = [t for t in operator.AUTO.get(present.type, ()) if t not in here] if chosen.tier in here else []
    return list(dict.fromkeys([str(configuration.of(chosen)), *others, "chunked"]))


def _whole_rows(traced: GraphModule, finding: Finding, site: Site, options: Options, carriers: Carriers) -> bool:
    """What no score program describes may still be computed row by row. True where the graph changed."""
    if "chunked" not in options.tiers or op_name(finding.final) in SDPA:
        return False
    facts = Facts(traced)
    found = find_region(facts, finding)
    if not isinstance(found, Region):
        if site.refusal is not None and found.message != site.refusal.message:
            hint = f"{site.refusal.hint} {found.message[0].upper()}{found.message[1:]}.".strip()
            site.refusal = replace(site.refusal, hint=hint)
        return False
    held = value(finding.final)
    values = number(found.weight) * number(held.shape[found.rows[finding.final]])
    training = torch.is_grad_enabled() and finding.final in facts.differentiable
    _, device = target_of(options, held.device)
    decision = cost.decide_rows(values, held.dtype.itemsize, device.type, training, options, found.gives_scores)
    try:
        if decision.tier != "kept":
            replace_region(traced, facts, found, ROWS, carriers)
    except CannotEmit:
        return False
    site.refusal, site.decision = None, decision
    return decision.tier != "kept" or _shielded(traced, finding, site)


def _shielded(traced: GraphModule, finding: Finding, site: Site, only_risky: bool = False) -> bool:
    if not shield(traced, finding, only_risky):
        return False
    site.notes = (*site.notes, "shielded from other rewriters")
    return True
