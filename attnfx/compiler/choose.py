"""What is decided for one site, and the change of the graph that carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from attnfx import cost
from attnfx.compiler.faults import Exercised
from attnfx.kernels.flash import tier as flash
from attnfx.kernels.library import cuda as fused
from attnfx.kernels.operators import attention as operator
from attnfx.kernels.operators import configuration
from attnfx.kernels.operators import mask_summary as operator_summary  # noqa: F401  (their imports register)
from attnfx.kernels.operators import rows as operator_rows  # noqa: F401  (their imports register)
from attnfx.kernels.operators import weights as operator_weights  # noqa: F401  (their imports register)
from attnfx.kernels.operators.exercise import Like, exercise
from attnfx.options import Options
from attnfx.passes.fx.analysis import Facts
from attnfx.passes.fx.cleanup import check, clean
from attnfx.passes.fx.nodes import SDPA, number, op_name, refusal, value, where_in_source
from attnfx.passes.lift.emitter import CannotEmit, Carriers, size_carriers
from attnfx.passes.match.matcher import Finder
from attnfx.passes.match.results import Finding, Match, Reduction
from attnfx.passes.match.weight_reductions import find_reductions
from attnfx.passes.match.weight_uses import drawn_for_others
from attnfx.passes.prepare.functionalize import functionalise
from attnfx.passes.prepare.table_lookups import find_tables
from attnfx.passes.prepare.trace import trace
from attnfx.passes.rewrite.attention import Operators, dimensions, rewrite
from attnfx.passes.rewrite.shield import shield
from attnfx.passes.rewrite.site_pairs import Trial
from attnfx.passes.rewrite.subgraph import cut
from attnfx.passes.rows.find_region import find_region
from attnfx.passes.rows.region import Region
from attnfx.passes.rows.replace_region import replace_region
from attnfx.report.records import Candidate, Decision, Site
from attnfx.targets import Target, detect
from attnfx.tuning import calibrate as calibration
from attnfx.tuning import tune as tuning

OPERATORS = Operators(
    torch.ops.attnfx.attention.default,
    torch.ops.attnfx.attention_weights.default,
    torch.ops.attnfx.attention_weights_max.default,
    torch.ops.attnfx.mask_summary.default,
)
ROWS = torch.ops.attnfx.attention_rows.default
# Codes of refusals after which rows that are computed one by one would be the next form.
THEN_ROWS = ("not_lifted", "score_used", "reduction", "normaliser", "no_product", "layout", "axes")


@dataclass
class Deciding:
    """One traced graph, whose sites are decided one by one.

    carriers  what holds the graph's symbolic sizes
    trial     is given every rewritten site, and says which sites to keep (`verify`)
    facts     of the graph as it is; None where it has changed since
    original  facts of the graph before any change
    exercise  whether each new call is run once on tiny tensors
    """

    traced: GraphModule
    options: Options
    carriers: Carriers
    trial: Trial | None = None
    facts: Facts | None = None
    original: Facts = None  # type: ignore[assignment]
    exercise: bool = False

    def decide(self, finding: Finding, site: Site, sizes: dict[str, int], reader: Node | None,
               told: Decision | None = None) -> bool:  # fmt: skip
        """Choose for one site and carry it out. True where the graph changed. `reader` is what else its weights are
        for; `told` takes the place of the choice."""
        changed = self._decide(finding, site, sizes, reader, told)
        if changed:
            self.facts = None
        return changed

    def _decide(self, finding: Finding, site: Site, sizes: dict[str, int], reader: Node | None,
                told: Decision | None) -> bool:  # fmt: skip
        match, trial = finding.match, self.trial
        if trial is not None and (why := trial.keep.get(trial.name(finding.final))):
            site.refusal, site.decision = None, Decision("kept", "", reason=why, code="mismatch")
            return op_name(finding.final) not in SDPA and self.shielded(finding, site)
        if match is None:
            return self._whole_rows(finding, site, told) or (not finding.loose and self.shielded(finding, site))
        apart = drawn_for_others(match, [] if reader is not None else match.reductions)
        if (reader is not None or apart is not None) and self._whole_rows(finding, site, told, lean=True):
            return True
        if apart is not None:
            message = "the dropped weights are read beside the attention, which would be of another draw than they are"
            site.refusal = refusal("one_draw", message, *finding.anchors, apart)
            return self.shielded(finding, site)
        query = value(match.query.node)
        here = refusals(match, sizes, query.device)
        question = self._question(match, finding, sizes, reader, here)
        site.decision = told or self._choose(question, match, site, reader)
        if site.decision.tier == "kept":
            return not question.native and self.shielded(finding, site, only_risky=True)
        reductions = [] if reader is not None else match.reductions
        tiers = tiers_of(site.decision, here, query.device, reductions)
        target, _ = target_of(self.options, query.device)
        tier = tiers[0].partition(":")[0]
        summary = None if target is None or tier in here else cost.summary(question, target, tier)
        try:
            call = None if tier in here else fused_call(match, tier)
            replaced = rewrite(
                self.traced,
                self.original,
                match,
                OPERATORS,
                ",".join(tiers),
                self.carriers,
                reductions,
                summary=summary,
                fused=call,
            )
        except CannotEmit as problem:
            site.refusal, site.decision = refusal("layout", str(problem), finding.final), None
            return self.shielded(finding, site)
        self._exercise(replaced, match.training)
        if trial is not None:
            trial.add(site, finding.final, replaced)
        self._say(site, match, reductions, tiers, here)
        return True

    def _question(
        self, match: Match, finding: Finding, sizes: dict[str, int], reader: Node | None, here: Mapping[str, str]
    ) -> cost.Question:
        query, target = value(match.query.node), self.options.target
        device, refused = query.device, here
        if isinstance(target, Target):
            device = torch.device(target.kind)
            refused = refusals(match, sizes, device, target.capability)
        return cost.Question(
            match.spec,
            sizes,
            str(query.dtype).removeprefix("torch."),
            device.type,
            training=torch.is_grad_enabled() and match.training,
            native=op_name(finding.final) in SDPA,
            sums=0 if reader is not None else sum(r.kind not in ("rows", "logsumexp") for r in match.reductions),
            weights_read="" if reader is None else where_in_source(reader) or reader.name,
            cudnn=isinstance(target, Target) or fused.prefers_cudnn(),
            refused=refused,
        )

    def _choose(self, question: cost.Question, match: Match, site: Site, reader: Node | None) -> Decision:
        present, options = value(match.query.node).device, self.options
        target, _ = target_of(options, present)
        at_hand = options.target == "auto"
        corrections = calibration.corrections(present) if at_hand else None
        decision = cost.decide(question, options, torch.get_num_threads(), target, corrections)
        if target is not None and target.note and at_hand:
            site.notes = (*site.notes, target.note)
        if options.tune and reader is None and at_hand:
            decision = tuning.tune(question, decision, options, present, _variants(self.traced, match))
        return decision

    def _say(
        self, site: Site, match: Match, reductions: Sequence[Reduction], tiers: Sequence[str], here: Mapping[str, str]
    ) -> None:
        target = self.options.target
        present = value(match.query.node).device.type
        if isinstance(target, Target) and (tiers[0].partition(":")[0] in here or target.kind != present):
            instead = next(t for t in tiers if t.partition(":")[0] not in here)
            site.notes = (*site.notes, f"decided for {target.name}; the {present} at hand runs it as {instead}")
        if reductions:
            places = ", ".join(dict.fromkeys(where_in_source(r.final) or r.final.name for r in reductions))
            what = "sums" if all(r.kind in ("sum", "logsumexp") for r in reductions) else "parts"
            site.notes = (*site.notes, f"{what} of its weights are computed without them ({places})")

    def _whole_rows(self, finding: Finding, site: Site, told: Decision | None, lean: bool = False) -> bool:
        """What no score program describes may still be computed row by row. True where the graph changed. `lean`: only
        where all that is read of the weights is computed with it, and they are not."""
        if op_name(finding.final) in SDPA or (lean and told is not None and told.kernel not in cost.ROW_KERNELS):
            return False
        if "chunked" not in self.options.tiers:
            if lean:
                return False
            if site.refusal is not None:
                allowed = 'The tier "chunked" may compute it row by row, and `tiers` does not allow it.'
                site.refusal = replace(site.refusal, hint=f"{site.refusal.hint} {allowed}")
            return False
        facts = self.facts = self.facts or Facts(self.traced)
        found = find_region(facts, finding)
        if not isinstance(found, Region):
            first = site.refusal
            if first is not None and first.code in THEN_ROWS and found.code == "rows_mixed":
                site.refusal = replace(found, message=f"{first.message}, and {found.message}")
            return False
        if lean and found.gives_scores:
            return False
        held = value(finding.final)
        lengths = {"T": found.extent, "S": found.columns}
        if site.spec is None:
            site.dims = {k: int(n.value) if n.op == "const" else str(n) for k, n in lengths.items()}  # type: ignore[call-overload]
        length = number(held.shape[found.rows[finding.final]])
        values = number(found.weight) * length
        training = torch.is_grad_enabled() and finding.final in facts.differentiable
        target, device = target_of(self.options, held.device)
        width = number(held.shape[-1])
        live = 1.0
        if found.narrowed is not None:
            live = cost.live_share(found.narrowed.score, length, number(found.keys))
        asked = cost.Rows(found.work, values, held.dtype.itemsize, width, training, device.type, live)
        decision = told or cost.decide_rows(asked, self.options, found.gives_scores, torch.get_num_threads(), target)
        if lean and decision.tier == "kept":
            return False
        try:
            if decision.tier != "kept":
                compiled = decision.kernel == cost.COMPILED
                replaced = replace_region(self.traced, facts, found, ROWS, self.carriers, compiled)
                self._exercise(replaced, training)
                if self.trial is not None:
                    self.trial.add(site, finding.final, replaced)
        except CannotEmit:
            return False
        if decision.tier != "kept" and live < 1:
            site.notes = (*site.notes, f"chunks take live keys only: {live:.0%} of the scores")
        site.refusal, site.decision = None, decision
        if others := [n for n in found.results if n is not found.final]:
            places = ", ".join(dict.fromkeys(where_in_source(n) or n.name for n in others))
            site.notes = (*site.notes, f"parts of its weights are computed with it, row by row ({places})")
        return decision.tier != "kept" or self.shielded(finding, site)

    def _exercise(self, replaced: Sequence[tuple[Node, Node]], training: bool) -> None:
        """Run each new call once on tiny tensors. Raises Exercised where one fails."""
        if not self.exercise:
            return
        stack, seen = [new for _, new in replaced], set()
        while stack:
            n = stack.pop()
            name = op_name(n)
            if n in seen or name in SDPA or name == "sym_size":
                continue
            seen.add(n)
            if not name.startswith("attnfx::"):
                stack.extend(n.all_input_nodes)
                continue
            if n.target is OPERATORS.summary:
                continue
            try:
                exercise(n.target, _likes(n.args), training and torch.is_grad_enabled())
            except Exception as problem:
                raise Exercised from problem
            stack.extend(a for a in n.all_input_nodes if op_name(a) == "getitem")

    def shielded(self, finding: Finding, site: Site, only_risky: bool = False) -> bool:
        if site.refusal is not None and site.refusal.code == "mutated":
            return False  # what the compiler saves of a graph that writes in place is left to it alone
        if not shield(self.traced, finding, only_risky):
            return False
        site.notes = (*site.notes, "shielded from other rewriters")
        return True


def _likes(args: Any) -> Any:
    """The arguments of a call, each tensor by its shape, symbolic sizes as the example has them."""

    def like(x: Any) -> Any:
        held = value(x)
        if isinstance(held, torch.Tensor):
            return Like(tuple(map(number, held.shape)), held.dtype, held.device)
        return number(held) if isinstance(held, torch.SymInt) else held

    return tree_map(like, args)


def target_of(options: Options, present: torch.device) -> tuple[Target | None, torch.device]:
    """(what to decide for, or None for a CPU and for what nothing is known of; a device of its kind)."""
    if isinstance(options.target, Target):
        return options.target, torch.device(options.target.kind)
    if present.type == "cuda" and torch.cuda.is_available():
        return detect(present), present
    return None, present


def refusals(
    match: Match, sizes: Mapping[str, int], device: torch.device, capability: int | None = None
) -> dict[str, str]:
    """Why each tier that cannot run a site cannot, on a device or on any with that compute capability."""
    dtype, extents = value(match.query.node).dtype, dimensions(match)
    found = operator.refusals(match.spec, dtype, device, sizes["D"], sizes["Dv"], capability)
    if (why := flash.beyond(sizes["B"], sizes["H"])) is not None:
        found = {"decode": why, "flash": why, **found}
    if device.type == "cuda" and "library" not in found:
        shape = {"grouped": extents["G"] is not extents["H"], "square": extents["T"] is extents["S"]}
        if match.reductions:
            found["library"] = "parts of the weights are read, and it gives no log-sum-exp to compute them from"
        elif why := fused.expresses(match.spec, dtype, device, sizes["D"], sizes["Dv"], capability, **shape):
            found["library"] = why
    return found


def fused_call(match: Match, tier: str) -> fused.Fused | None:
    """How PyTorch's fused operator is called for a match, where the graph itself calls it: a GPU's library tier."""
    call = fused.call_of(match.spec)
    gpu = value(match.query.node).device.type == "cuda"
    return call if gpu and tier == "library" and isinstance(call, fused.Fused) else None


def tiers_of(
    chosen: Candidate, here: Mapping[str, str], present: torch.device, reductions: Sequence[Reduction] = ()
) -> list[str]:
    """The operator's tiers for a decision. `here`: the tiers that the present device cannot run.

    Behind the chosen one come those that it can, where the decision is for another device, and the one for what only
    the call shows: an empty tensor, say, is beyond most tiers. Sums of dropped weights are computed in blocks, and
    other tiers drop others.
    """
    if any(r.spec.random and r.kind != "logsumexp" for r in reductions):
        return ["chunked"]
    others = [t for t in operator.AUTO.get(present.type, ()) if t not in here] if chosen.tier in here else []
    return list(dict.fromkeys([str(configuration.of(chosen)), *others, "chunked"]))


def _variants(traced: GraphModule, match: Match) -> tuning.Build:
    """For a candidate, the site cut out of its graph and rewritten accordingly; None where it is not found again."""
    made: list[GraphModule] = []

    def build(candidate: Candidate) -> GraphModule | None:
        if not made:
            made.append(cut(traced, match, number))
        if candidate.tier == "kept":
            return made[0]
        again = trace(made[0])
        functionalise(again)
        finder = Finder(again, find_tables(again))
        (found, *more) = [f.match for f in finder.find() if f.match is not None] or [None]
        if found is None or more:
            return None
        find_reductions(finder, [found])
        tiers = tiers_of(candidate, {}, value(found.query.node).device, found.reductions)
        call = fused_call(found, candidate.tier)
        rewrite(
            again, finder.facts, found, OPERATORS, ",".join(tiers), size_carriers(again), found.reductions, fused=call
        )
        clean(again)
        check(again)
        return again

    return build


__all__ = ["OPERATORS", "Deciding", "fused_call", "refusals", "target_of", "tiers_of"]
