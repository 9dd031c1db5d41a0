"""Record what became of one attention: site, decision, refusal."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field

from attnfx.report.codes import known
from attnfx.spec import AttentionSpec


@dataclass(frozen=True)
class Refusal:
    """Why something that looks like attention was left as it was.

    code     stable, one of `attnfx.report.codes.CODES`
    message  the first condition that failed, a sentence
    nodes    the graph nodes that stopped the walk
    hint     the smallest edit that would change it; the code's own where it is empty
    where    the user's line ("file.py:88") that the nodes came from

    Raises ValueError for a code that does not exist.
    """

    code: str
    message: str
    nodes: tuple[str, ...] = ()
    hint: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        edit = known(self.code).edit
        if not self.hint:
            object.__setattr__(self, "hint", edit)

    @property
    def closest(self) -> str:
        """The form nearest to this one that is rewritten."""
        return known(self.code).closest

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where and self.where not in self.message else ""
        return f"{self.message}{place} [{self.code}]" + (f". {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Candidate:
    """One way to compute a site, with its predicted cost.

    predicted_ms      of one call: forward, or forward and backward where a backward pass follows
    predicted_bytes   what is alive at its peak beyond the inputs and the output
    saved_bytes       what is kept for the backward pass beyond the operands and the output
    tile              rows and keys of a kernel's tile; warps and stages as Triton counts them
    splits            parts that the decode kernel cuts the keys into
    measured_ms       the same as predicted_ms where it was timed (`tune`), else None
    """

    tier: str
    kernel: str
    predicted_ms: float = 0.0
    predicted_bytes: int = 0
    saved_bytes: int = 0
    tile: tuple[int, int] | None = None
    warps: int = 0
    stages: int = 0
    splits: int = 0
    measured_ms: float | None = None


@dataclass(frozen=True)
class Decision(Candidate):
    """The candidate that was chosen for a site. `reason` is a sentence; `alternatives` are the other candidates; the
    `code` of a site that is kept is one of `attnfx.report.codes.CODES`."""

    reason: str = ""
    alternatives: tuple[Candidate, ...] = ()
    code: str = ""

    def __post_init__(self) -> None:
        if self.code:
            known(self.code)

    @property
    def original(self) -> Candidate | None:
        """What the site costs as it was written, where that was predicted."""
        if self.tier == "kept":
            return self
        return next((c for c in self.alternatives if c.tier == "kept"), None)


@dataclass
class Site:
    """One attention found in a graph.

    dims    (B, H, G, T, S, D, Dv) as numbers, or text where symbolic; (T, S) where whole rows are computed; `sizes` are
            the example's numbers, with those of the spec's own sizes
    where   the user's "file.py:88"
    notes   assumptions, and whether a kept site was shielded from other rewriters
    flops   of its two products, forward, masks not counted; 0 where not known
    """

    name: str
    where: str = ""
    spec: AttentionSpec | None = None
    dims: dict[str, int | str] = field(default_factory=dict)
    mask: str = ""
    decision: Decision | None = None
    refusal: Refusal | None = None
    notes: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    flops: int = 0

    @property
    def code(self) -> str:
        """Why it was kept, as a stable code of `attnfx.report.codes.CODES`; "" where it was rewritten."""
        if self.refusal is not None:
            return self.refusal.code
        return self.decision.code if self.decision is not None else ""

    @property
    def rewritten(self) -> bool:
        return self.decision is not None and self.decision.tier != "kept"

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What had to run otherwise than decided in this process so far, a sentence each: for the site's spec."""
        with _lock:
            return () if self.spec is None else tuple(_fallbacks.get(self.spec, ()))

    def summary(self) -> str:
        """Heads, sizes, scale and dropout in words."""
        d = self.dims
        if not d or self.spec is None:
            return f"{d['T']} rows x {d['S']} keys" if d else ""
        heads = f"{d['H']} heads" + (f" ({d['G']} for keys)" if d["G"] != d["H"] else "")
        widths = f"{d['D']}" + (f"/{d['Dv']}" if d["Dv"] != d["D"] else "")
        text = f"{heads}, {d['T']} x {d['S']} x {widths}, batch {d['B']}"
        return text + (f", dropout {self.spec.dropout:g}" if self.spec.dropout else "")


def share(site: Site, total: int) -> float | None:
    """The site's part of `total` FLOPs; None where it is not known."""
    return site.flops / total if total and site.flops else None


_fallbacks: dict[AttentionSpec, list[str]] = {}  # by spec: kernels know no sites
_lock = threading.Lock()


def fell_back(spec: AttentionSpec, sentence: str) -> None:
    """Say, in the reports of every site of this spec and in one warning, that a kernel could not run as decided."""
    with _lock:
        told = _fallbacks.setdefault(spec, [])
        if sentence in told:
            return
        told.append(sentence)
    warnings.warn(f"attnfx: {sentence}", RuntimeWarning, stacklevel=2)
