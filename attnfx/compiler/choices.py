"""Record what becomes of each place that was found."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnfx.compiler.find import Place
from attnfx.kernels.library import cuda
from attnfx.mask.runtime_summary import Summary
from attnfx.passes.match.results import Finding, Match, Reduction
from attnfx.passes.rows.region import Region
from attnfx.report.records import Decision, Refusal, Site

SHIELD, SHIELD_RISKY, LEAVE = "shield", "shield where risky", "leave"


@dataclass(frozen=True)
class Attention:
    """Replace a match by a call of the operator, or with `fused` by PyTorch's own."""

    match: Match
    reductions: tuple[Reduction, ...]
    tiers: tuple[str, ...]
    summary: Summary | None
    fused: cuda.Fused | None


@dataclass(frozen=True)
class WholeRows:
    """Replace a region by a call that computes it in chunks of rows."""

    region: Region
    compiled: bool
    training: bool


@dataclass(frozen=True)
class Choice:
    """What becomes of one place.

    action     how the graph is changed; None where it is kept
    site       what the report says of it
    shield     what is done where it is kept: one of SHIELD, SHIELD_RISKY, LEAVE
    otherwise  the choice that holds where the action cannot be written
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
        """What the action comes to, the same in every choice for this place."""
        action = self.action
        return ",".join(action.tiers) if isinstance(action, Attention) else str(self.site.decision)

    def kept(self, decision: Decision | None, refused: Refusal | None, shield: str) -> Choice:
        return Choice(self.place, None, replace(self.site, decision=decision, refusal=refused), shield)

    def noted(self, *notes: str) -> Choice:
        return replace(self, site=replace(self.site, notes=(*self.site.notes, *notes)))
