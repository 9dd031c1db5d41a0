"""Implement `attnfx bench`: time standard sites tier by tier; `--calibrate` corrects the cost model by the times."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attnfx.cli.loading import EXIT_CODES
from attnfx.compiler import pipeline
from attnfx.fingerprint import device_name
from attnfx.options import Options
from attnfx.report.records import Decision
from attnfx.tuning import calibrate as calibration
from attnfx.tuning import timing


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None, cap: float = 0.0) -> Tensor:
    """Compute attention of query, key and value, (B, H, T, D) each; `seen` is a (T, S) bool mask of visible keys."""
    score = query @ key.mT * query.shape[-1] ** -0.5
    if cap:
        score = torch.tanh(score / cap) * cap
    if seen is not None:
        score = score.masked_fill(~seen, -math.inf)
    return torch.softmax(score, -1, dtype=torch.float32).to(query.dtype) @ value


def causal(query: Tensor, key: Tensor, value: Tensor, cap: float = 0.0) -> Tensor:
    length = query.shape[-2]
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return attend(query, key, value, seen, cap)


def window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute causal attention over a window of an eighth of the length."""
    at = torch.arange(query.shape[-2], device=query.device)
    behind = at[:, None] - at[None, :]
    return attend(query, key, value, (behind >= 0) & (behind < max(32, query.shape[-2] // 8)))


PROGRAMS: dict[str, Callable[..., Tensor]] = {
    "plain": attend, "causal": causal, "window": window, "softcap": partial(causal, cap=50.0),
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A standard site: a program on query, key and value of shape (B, H, T, D)."""

    program: str
    B: int
    H: int
    T: int
    D: int
    dtype: str
    training: bool

    def __str__(self) -> str:
        what = "training" if self.training else "forward"
        return f"{self.program}, {self.B} x {self.H} x {self.T} x {self.D}, {self.dtype}, {what}"


def standard(device: torch.device, many: bool) -> list[Site]:
    """Return four standard sites for a device; with `many`, about a dozen for calibration, alternating between forward
    and training so that the first few represent them all."""
    dtype, lengths = ("float32", (128, 512, 1024)) if device.type == "cpu" else ("bfloat16", (512, 2048, 8192))
    heads, width = (8, 64) if device.type == "cpu" else (16, 128)
    if not many:
        return [Site(p, 1, heads, lengths[1], width, dtype, t) for t in (False, True) for p in ("plain", "causal")]
    shapes = [(p, n) for p in PROGRAMS for n in lengths if p != "plain" or n != lengths[1]]
    forward = [Site(p, 1, heads, n, width, dtype, False) for p, n in shapes[:8]]
    training = [Site(p, 1, heads, n, width, dtype, True) for p, n in shapes if n == lengths[1] or p == "causal"]
    ways = (sorted(x, key=lambda s: abs(s.T - lengths[1])) for x in (forward, training))
    return [site for pair in zip_longest(*ways) for site in pair if site is not None]


def in_time(sites: Iterable[Site], seconds: float, clock: Callable[[], float] = time.perf_counter) -> Iterator[Site]:
    """Yield sites while the next one, if it takes as long as the longest so far, would end within `seconds`. Yields at
    least two sites, one of each direction."""
    start = last = clock()
    longest = 0.0
    for n, site in enumerate(sites):
        now = clock()
        longest, last = max(longest, now - last), now
        if n >= 2 and now - start + longest > seconds:
            return
        yield site


def measure(site: Site, device: torch.device) -> Decision | None:
    """Return the decision for a site with its candidates timed; None if none could be timed."""
    torch._dynamo.reset()
    found: list[Decision | None] = []
    options = Options.make({"tune": "again"})

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.extend(s.decision for s in pipeline.run(gm, options).report.sites)
        return gm.forward

    shape, dtype = (site.B, site.H, site.T, site.D), getattr(torch, site.dtype)
    operands = [torch.randn(shape, dtype=dtype, device=device, requires_grad=site.training) for _ in range(3)]
    with torch.set_grad_enabled(site.training):
        torch.compile(PROGRAMS[site.program], backend=backend, dynamic=False)(*operands)
    decision = found[0] if found else None
    return decision if decision is not None and decision.measured_ms is not None else None


def timed(sites: Iterable[Site], device: torch.device, alone: bool) -> list[tuple[Site, Decision]]:
    """Time sites and return them with their decisions; report failures on stderr. With `alone`, drop sites whose times
    are unreliable because other programs kept the processor busy."""
    found = []
    free = not alone or timing.undisturbed(device)
    for site in sites:
        decision, before = measure(site, device), free
        free = not alone or timing.undisturbed(device)
        if decision is None:
            click.echo(f"attnfx bench: {site} could not be timed", err=True)
        elif not (before and free):
            click.echo(f"attnfx bench: {site} is left out, because other programs kept the processor busy", err=True)
        else:
            found.append((site, decision))
    return found


def row(site: Site, decision: Decision) -> dict[str, object]:
    """Build the JSON entry of a site."""
    every = sorted((decision, *decision.alternatives), key=lambda c: c.measured_ms or math.inf)
    timed = [c for c in every if c.measured_ms is not None]
    return {
        "site": str(site), "fastest": timed[0].tier,
        "candidates": [
            {"tier": c.tier, "tile": c.tile, "measured_ms": c.measured_ms, "predicted_ms": c.predicted_ms}
            for c in timed
        ],
    }  # fmt: skip


def table(rows: list[dict[str, object]], name: str) -> Table:
    out = Table(title=f"attention on {name}: ms per call, measured (predicted)", title_justify="left")
    out.add_column("site", overflow="fold")
    tiers = [t for t in ("kept", "library", "flash", "decode", "flex", "chunked") if any(_best(r, t) for r in rows)]
    for tier in tiers:
        out.add_column(tier, justify="right")
    for r in rows:
        cells = []
        for tier in tiers:
            best = _best(r, tier)
            text = f"{best['measured_ms']:.3g} ({best['predicted_ms']:.3g})" if best else ""
            cells.append(f"[bold]* {text}[/bold]" if tier == r["fastest"] else text)
        out.add_row(str(r["site"]), *cells)
    return out


def _best(found: dict, tier: str) -> dict | None:
    """Return the fastest candidate of a tier, or None."""
    return next((c for c in found["candidates"] if c["tier"] == tier), None)


@click.command(epilog=EXIT_CODES)
@click.option("--calibrate", is_flag=True, help="Correct the cost model for this device from a dozen measured sites.")
@click.option("--seconds", type=click.FloatRange(min=0), default=150, show_default=True,
              help="Time limit of --calibrate; a site that would end later is not started.")  # fmt: skip
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, help="cpu or cuda")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(calibrate: bool, seconds: float, device: str, as_json: bool) -> None:
    """Time a few standard attention sites on this device, tier by tier. A star marks the fastest tier."""
    at = _device(device)
    sites = standard(at, calibrate)
    shown = timing.with_progress(sites, "standard sites")
    with calibration.uncorrected() if calibrate else nullcontext():
        found = timed(in_time(shown, seconds) if calibrate else shown, at, alone=calibrate)
    rows = [row(site, decision) for site, decision in found]
    factors = calibration.fit((decision, site.training) for site, decision in found)
    if calibrate and not factors:
        raise click.ClickException(
            "no site was timed, so the previous corrections are kept; rerun when the processor is idle"
        )
    if calibrate:
        calibration.store(at, factors)
    if as_json:
        said = {"corrections": factors} if calibrate else {}
        click.echo(json.dumps({"device": device_name(at), "sites": rows, **said}, indent=1))
        return
    console = Console(file=sys.stdout)
    console.print(table(rows, device_name(at)))
    if calibrate:
        corrected = Table(title=f"corrections from {len(found)} of {len(sites)} sites: measured / predicted time")
        corrected.title_justify = "left"
        corrected.add_column("tier and direction")
        corrected.add_column("factor", justify="right")
        for name, factor in factors.items():
            corrected.add_row(name, f"{factor:.2f}")
        console.print(corrected)
        console.print(f"stored in {calibration.CORRECTIONS.path}", soft_wrap=True)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} is not a supported device; give cpu or cuda", param_hint="--device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("this machine has no CUDA device; give cpu", param_hint="--device")
    return device
