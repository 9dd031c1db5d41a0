"""Define the choices for a place: the actions that rewrite it, or keeping it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnfx.compiler.find import Place
from attnfx.kernels.flex import tier as flex
from attnfx.kernels.library import cuda
from attnfx.mask.runtime_summary import Summary
from attnfx.passes.match.results import Finding, Match, Reduction
from attnfx.passes.rows.region import Region
from attnfx.report.records import Decision, Refusal, Site

SHIELD, SHIELD_RISKY, LEAVE = "shield", "shield where risky", "leave"


@dataclass(frozen=True)
class Attention:
    """Replace a match by a call of attnfx's operator, with `fused` of PyTorch's fused operator, or with `flex` of its
    `flex_attention`."""

    match: Match
    reductions: tuple[Reduction, ...]
    tiers: tuple[str, ...]
    summary: Summary | None
    fused: cuda.Fused | None
    flex: flex.Call | None = None


@dataclass(frozen=True)
class WholeRows:
    """Replace a region by a call that computes it in chunks of rows."""

    region: Region
    compiled: bool
    training: bool


@dataclass(frozen=True)
class Choice:
    """The choice for one place.

    action     how the graph is changed; None if the place is kept
    site       its entry in the report
    shield     how a kept place is shielded from other rewriters: SHIELD, SHIELD_RISKY or LEAVE
    otherwise  the choice that applies if the action's code cannot be emitted
    """

    place: Place
    action: Attention | WholeRows | None
    site: Site
    shield: str = LEAVE
    otherwise: Choice | None = None

    @property
    def finding(self) -> Finding:
        return self.place.finding

    @property
    def name(self) -> str:
        """Return the action's tiers, or the decision as text; equal for equal actions at this place."""
        action = self.action
        return ",".join(action.tiers) if isinstance(action, Attention) else str(self.site.decision)

    def kept(self, decision: Decision | None, refused: Refusal | None, shield: str) -> Choice:
        return Choice(self.place, None, replace(self.site, decision=decision, refusal=refused), shield)

    def noted(self, *notes: str) -> Choice:
        return replace(self, site=replace(self.site, notes=(*self.site.notes, *notes)))
