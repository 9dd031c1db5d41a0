"""Choose for each place that was found: rewrite or keep it. Leaves the graph as it is; `apply` applies the choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnfx import cost
from attnfx.compiler.apply import cut_out
from attnfx.compiler.choices import LEAVE, SHIELD, SHIELD_RISKY, Attention, Choice, WholeRows
from attnfx.compiler.context import Context
from attnfx.compiler.find import Found, Place
from attnfx.compiler.mask_values import share_of_tiles
from attnfx.compiler.tiers import backends_of, flex_call, flex_on_flash, fused_call, refusals, target_of, tiers_of
from attnfx.mask import prepare
from attnfx.options import Options
from attnfx.passes.fx.nodes import SDPA, label, number, op_name, refusal, value, where_in_source
from attnfx.passes.match.results import Match
from attnfx.passes.match.weight_uses import drawn_for_others
from attnfx.passes.rows.find_region import find_region
from attnfx.passes.rows.region import Region
from attnfx.report.records import Candidate, Decision
from attnfx.targets import Target
from attnfx.tuning import calibrate, tune

# Refusal codes after which computing whole rows is tried; if that fails too, the message gives both reasons.
THEN_ROWS = ("not_lifted", "score_used", "reduction", "normaliser", "no_product", "layout", "axes")


def choose(found: Found, context: Context, options: Options) -> list[Choice]:
    """Make one choice for each place of a graph. `options` may differ from the context's."""
    chosen: list[Choice] = []
    regions: list[Region] = []
    for place in reversed(found.places):  # the last of several products with the same weights replaces all of them
        told = context.told.get((found.path, place.number))
        kept = Choice(place, None, place.site, LEAVE if place.finding.loose else SHIELD)
        inputs = () if found.path else context.inputs
        choosing = _Choosing(found, options, told, kept, context.exercise, regions, inputs)
        chosen.append(context.attempt(place.part, choosing.choice, kept))
    return chosen[::-1]


@dataclass(frozen=True)
class _Choosing:
    """The inputs of one choice.

    told      a decision given in advance
    keeping   the choice to keep the place
    compiles  whether the graph will run, and not only be explained
    regions   the regions of whole rows that were found so far
    inputs    the values of the graph's inputs, if they are known
    """

    found: Found
    options: Options
    told: Decision | None
    keeping: Choice
    compiles: bool
    regions: list[Region]
    inputs: Sequence[Any] = ()

    @property
    def inductor(self) -> bool:
        """Return whether Inductor compiles the rewritten graph."""
        return self.options.inner == "inductor"

    @property
    def place(self) -> Place:
        return self.keeping.place

    def choice(self) -> Choice:
        place, keep = self.place, self.keeping
        finding, match, reader = place.finding, place.finding.match, place.reader
        if match is None:
            return self._whole_rows(keep)
        apart = drawn_for_others(match, [] if reader is not None else match.reductions)
        if apart is not None:
            message = f"the weights after dropout are also read outside the attention, by way of {label(apart)}"
            reader = "the other reader" if apart.name == match.draw else f"`{label(apart)}`"
            rate = f"{match.spec.dropout:g}"
            why = refusal("one_draw", message, *finding.anchors, apart, p=rate, reader=reader)
            return self._whole_rows(keep.kept(None, why, SHIELD), lean=True)
        chosen = self._attention(match)
        return self._whole_rows(chosen, lean=True) if reader is not None or place.scored else chosen

    # -- one call of the operator -------------------------------------------------------------------
    def _attention(self, match: Match) -> Choice:
        place, keep = self.place, self.keeping
        query = value(match.query)
        prepare(match.spec, place.site.sizes)
        here = refusals(match, place.site.sizes, query.device, compiled=self.inductor)
        question = self._question(match, here)
        decision, notes = (self.told, ()) if self.told else self._decided(question, match)
        if question.tiles < 1:
            told = f"at the values of the first call, its mask in tensors leaves {question.tiles:.0%} of the tiles"
            notes = (*notes, told)
        keep = keep.noted(*notes)
        if decision.tier == "kept":
            return keep.kept(decision, None, LEAVE if question.native else SHIELD_RISKY)
        action = self._action(match, decision, here, question)
        site = replace(keep.site, decision=decision, refusal=None)
        return Choice(place, action, site).noted(*self._said(action, here))

    def _question(self, match: Match, here: Mapping[str, str]) -> cost.Question:
        place, target = self.place, self.options.target
        query, reader = value(match.query), place.reader
        device, refused, known = query.device, here, target if isinstance(target, Target) else None
        if isinstance(target, Target):
            device = torch.device(target.kind)
            refused = refusals(match, place.site.sizes, device, target, self.inductor)
        tiles = 1.0
        if device.type == "cpu" and "flex" not in refused:
            tiles = share_of_tiles(self.found.graph.gm, self.inputs, match, place.site.sizes)
        return cost.Question(
            match.spec,
            place.site.sizes,
            str(query.dtype).removeprefix("torch."),
            device.type,
            training=torch.is_grad_enabled() and match.training,
            native=op_name(match.final) in SDPA,
            sums=0 if reader is not None else sum(r.kind not in ("rows", "logsumexp") for r in match.reductions),
            weights_read="" if reader is None else where_in_source(reader) or reader.name,
            backends=backends_of(known),
            flex_flash=self.inductor and flex_on_flash(match, place.site.sizes, device, known),
            compiled=self.inductor,
            single=op_name(match.final) in ("matmul", "bmm") and value(match.final).shape[-2] == 1,
            tiles=tiles,
            refused=refused,
        )

    def _decided(self, question: cost.Question, match: Match) -> tuple[Decision, tuple[str, ...]]:
        """Decide by prediction, or by measured times if the options ask for them; also return the target's notes."""
        present, options = value(match.query).device, self.options
        target = target_of(options, present)
        at_hand = options.target == "auto"
        corrections = calibrate.corrections(present) if at_hand else None
        decision = cost.select(question, options, torch.get_num_threads(), target, corrections)
        if options.tune and self.place.reader is None and at_hand:

            def build(candidate: Candidate) -> GraphModule | None:
                kept = candidate.tier == "kept"
                action = None if kept else self._action(match, candidate, {}, question, summarized=False)
                return cut_out(self.found, replace(self.keeping, action=action))

            decision = tune.tune(question, decision, options, present, build)
        notes = [target.note] if target is not None and at_hand else []
        if target is not None and target.kind == "cuda" and "library" in options.tiers:
            notes.append(cost.activation(question, target, decision))
        return decision, tuple(filter(None, notes))

    def _action(
        self, match: Match, chosen: Candidate, here: Mapping[str, str], question: cost.Question, summarized: bool = True
    ) -> Attention:
        query = value(match.query)
        reductions = () if self.place.reader is not None else tuple(match.reductions)
        tiers = tiers_of(chosen, here, query.device, reductions)
        target, tier = target_of(self.options, query.device), tiers[0].partition(":")[0]
        if tier in here:
            return Attention(match, reductions, tuple(tiers), None, None)
        summary = cost.summary(question, target, tier) if summarized and target is not None else None
        asked = match, self.place.site.sizes, tier, chosen.kernel
        return Attention(match, reductions, tuple(tiers), summary, fused_call(*asked), flex_call(*asked))

    def _said(self, action: Attention, here: Mapping[str, str]) -> Iterator[str]:
        target, tiers = self.options.target, action.tiers
        present = value(action.match.query).device.type
        cannot = tiers[0].partition(":")[0] in here
        if self.compiles and isinstance(target, Target) and (cannot or target.kind != present):
            instead = next(t for t in tiers if t.partition(":")[0] not in here)
            yield f"decided for {target.name}; the present {present} device runs tier {instead} instead"
        if action.reductions:
            what = "sums" if all(r.kind in ("sum", "logsumexp") for r in action.reductions) else "parts"
            places = _places([r.final for r in action.reductions])
            yield f"{what} of its weights are computed without storing the weights ({places})"

    # -- whole rows ---------------------------------------------------------------------------------
    def _whole_rows(self, otherwise: Choice, lean: bool = False) -> Choice:
        """Choose to compute in chunks of rows if that is possible and predicted to help, else `otherwise`. `lean`: only
        if the region covers every reader of the weights, so that they need not be materialized."""
        finding, told = self.place.finding, self.told
        refused = otherwise.site.refusal
        if op_name(finding.final) in SDPA or (lean and told is not None and told.kernel not in cost.ROW_KERNELS):
            return otherwise
        if "chunked" not in self.options.tiers:
            if lean or refused is None:
                return otherwise
            allowed = 'Or add "chunked" to the option `tiers`: that tier may compute the attention row by row.'
            return otherwise.kept(None, replace(refused, hint=f"{refused.hint} {allowed}"), otherwise.shield)
        region = find_region(self.found.graph, finding, self.regions)
        if not isinstance(region, Region):
            if refused is not None and refused.code in THEN_ROWS and region.code == "rows_mixed":
                facts = region.facts if {"operator", "most"} & region.facts.keys() else refused.facts
                why = replace(region, message=f"{refused.message}, and {region.message}", hint="", facts=facts)
                return otherwise.kept(None, why, otherwise.shield)
            return otherwise
        self.regions.append(region)
        if lean and region.gives_scores:
            return otherwise
        return self._region(region, otherwise, lean)

    def _region(self, region: Region, otherwise: Choice, lean: bool) -> Choice:
        held = value(region.final)
        site = replace(self.keeping.site, refusal=None)
        if site.spec is None:
            lengths = {"T": region.extent, "S": region.columns}
            site.dims = {k: int(n.value) if n.op == "const" else str(n) for k, n in lengths.items()}  # type: ignore[call-overload]
        length = number(region.length)
        training = torch.is_grad_enabled() and region.final in self.found.graph.facts.differentiable
        target = target_of(self.options, held.device)
        live = 1.0
        if region.narrowed is not None:
            live = cost.live_share(region.narrowed.score, length, number(region.keys))
        asked = cost.Rows(
            region.work, number(region.weight) * length, held.dtype.itemsize, number(held.shape[-1]), training,
            held.device.type if target is None else target.kind, live,
        )  # fmt: skip
        threads = torch.get_num_threads()
        decision = self.told or cost.select_rows(asked, self.options, region.gives_scores, threads, target)
        if lean and decision.tier == "kept":
            return otherwise
        notes = []
        if decision.tier != "kept" and live < 1:
            notes.append(f"only keys that the mask leaves live are computed: {live:.0%} of the scores")
        if others := [n for n in region.results if n is not region.final]:
            notes.append(f"parts of its weights are computed row by row together with it ({_places(others)})")
        site.decision = decision
        if decision.tier == "kept":
            return Choice(self.place, None, site, SHIELD).noted(*notes)
        action = WholeRows(region, decision.kernel == cost.COMPILED, training)
        return Choice(self.place, action, site, otherwise=otherwise).noted(*notes)


def _places(nodes: Sequence[Node]) -> str:
    return ", ".join(dict.fromkeys(where_in_source(n) or n.name for n in nodes))
