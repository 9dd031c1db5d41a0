"""Define the records of one attention: its site, candidates, and decision or refusal."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from attnfx.report.advice import Advice, advise
from attnfx.report.codes import known
from attnfx.spec import AttentionSpec


def advice_on(code: str, facts: Mapping[str, str]) -> Advice:
    """Return the advice for a site with these facts, or the code's own where they do not suffice."""
    own = known(code)
    return advise(code, facts) or Advice(own.closest, own.edit)


@dataclass(frozen=True)
class Refusal:
    """The reason why a place that looks like attention was not rewritten.

    code     stable, one of `attnfx.report.codes.CODES`
    message  the first condition that failed, a sentence
    nodes    the graph nodes that failed it
    hint     the smallest edit that would help; by default worked out from the facts, or the code's own
    where    the user's line ("file.py:88") that the nodes came from
    facts    what `attnfx.report.advice` works out the advice from, as text

    Raises ValueError for an unknown code.
    """

    code: str
    message: str
    nodes: tuple[str, ...] = ()
    hint: str = ""
    where: str = ""
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        known(self.code)
        if not self.hint:
            object.__setattr__(self, "hint", advice_on(self.code, self.facts).edit)

    @property
    def closest(self) -> str:
        """Return the nearest form that is rewritten, for this site if the facts tell it."""
        return advice_on(self.code, self.facts).closest

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where and self.where not in self.message else ""
        return f"{self.message}{place} [{self.code}]" + (f". {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Candidate:
    """A way to compute a site, with its predicted cost. docs/targets.md explains the cost model.

    tier              "flash", "decode", "library", "flex", "chunked", or "kept" for the original code
    kernel            "triton" for flash and decode; "triton", "cpp" or "dense" for flex; "blocks", "rows" or "rows
                      compiled" for chunked; the name of PyTorch's kernel for library; "inductor", or "aten" for
                      PyTorch's fused operator, for kept
    predicted_ms      milliseconds of a call: forward, plus backward in training; 0 if not predicted
    predicted_bytes   bytes allocated at the peak of a call, without the inputs and the output
    saved_bytes       bytes saved for the backward pass, without the operands and the output
    tile              (rows, keys) of the kernel's tile; None if the tier chooses its own
    warps             warps of a Triton program; 0 without a tile
    stages            pipeline stages of a Triton program; 0 without a tile
    splits            number of parts into which the decode kernel divides the keys; 0 for its own choice
    measured_ms       measured milliseconds of a call, like `predicted_ms` (`tune`), else None
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
    """The candidate that was chosen for a site.

    reason        why it was chosen; may be empty with rewrite="always"
    alternatives  the other candidates, including those of tiers that the options exclude
    code          why the site is kept, one of `attnfx.report.codes.CODES`; empty if rewritten
    facts         of a kept site, what `attnfx.report.advice` works out the advice from, as text

    Raises ValueError for an unknown code.
    """

    reason: str = ""
    alternatives: tuple[Candidate, ...] = ()
    code: str = ""
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.code:
            known(self.code)

    @property
    def hint(self) -> str:
        """Return the smallest edit by which a kept site would be rewritten; empty if it is."""
        return advice_on(self.code, self.facts).edit if self.code else ""

    @property
    def closest(self) -> str:
        """Return the nearest form that is rewritten; empty if the site is."""
        return advice_on(self.code, self.facts).closest if self.code else ""

    @property
    def original(self) -> Candidate | None:
        """Return the candidate that keeps the original code, or None if it was not predicted."""
        if self.tier == "kept":
            return self
        return next((c for c in self.alternatives if c.tier == "kept"), None)


@dataclass
class Site:
    """An attention found in a graph.

    name      "attention_3", by its place in the report; "softmax_0" in `Report.others`
    where     the user's line ("file.py:88"); empty if unknown
    spec      the spec; None if whole rows are computed or the attention was not understood
    dims      B, H, G, T, S, D, Dv as numbers, or as text if symbolic; only T and S if whole rows are computed
    mask      the mask in words, such as "causal", or "none"; empty without a spec
    decision  the chosen candidate, which may keep the original; None if refused
    refusal   the reason why the site cannot be rewritten, else None
    notes     assumptions, the result of verification, and whether a kept site was shielded from other rewriters
    sizes     B, H, G, T, S, D, Dv as the spec counts them, at the example inputs, and the spec's own sizes
    flops     FLOPs of its two products, forward, as if unmasked: 2 * B * H * T * S * (D + Dv); 0 if unknown
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
        """Return the code in `attnfx.report.codes.CODES` for a kept site; "" if rewritten."""
        if self.refusal is not None:
            return self.refusal.code
        return self.decision.code if self.decision is not None else ""

    @property
    def rewritten(self) -> bool:
        """Return whether the decision replaces the original code."""
        return self.decision is not None and self.decision.tier != "kept"

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Return a sentence for each deviation from a decision in this process so far, on any site of the same spec."""
        with _lock:
            return () if self.spec is None else tuple(_fallbacks.get(self.spec, ()))

    def summary(self) -> str:
        """Describe heads, sizes, batch and dropout in words."""
        d = self.dims
        if not d or self.spec is None:
            return f"{d['T']} rows x {d['S']} keys" if d else ""
        heads = f"{d['H']} heads" + (f" ({d['G']} for keys)" if d["G"] != d["H"] else "")
        widths = f"{d['D']}" + (f"/{d['Dv']}" if d["Dv"] != d["D"] else "")
        text = f"{heads}, {d['T']} x {d['S']} x {widths}, batch {d['B']}"
        return text + (f", dropout {self.spec.dropout:g}" if self.spec.dropout else "")


def share(site: Site, total: int) -> float | None:
    """Return the site's share of `total` FLOPs; None if unknown."""
    return site.flops / total if total and site.flops else None


_fallbacks: dict[AttentionSpec, list[str]] = {}  # by spec, because a kernel does not know its site
_lock = threading.Lock()


def fell_back(spec: AttentionSpec, sentence: str) -> None:
    """Record that a kernel could not run as decided, for the reports of all sites of this spec; warn once."""
    with _lock:
        told = _fallbacks.setdefault(spec, [])
        if sentence in told:
            return
        told.append(sentence)
    warnings.warn(f"attnfx: {sentence}", RuntimeWarning, stacklevel=2)
