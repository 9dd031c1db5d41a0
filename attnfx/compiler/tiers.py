"""Determine which tiers can run a match, and write them as the operator's `tier` argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from attnfx.kernels import gpu
from attnfx.kernels.flash import tier as flash
from attnfx.kernels.flex import tier as flex
from attnfx.kernels.library import cuda
from attnfx.kernels.operators import attention as operator
from attnfx.kernels.operators import configuration
from attnfx.options import Options
from attnfx.passes.fx.nodes import value
from attnfx.passes.match.results import Match, Reduction
from attnfx.passes.rewrite.attention import dimensions
from attnfx.report.records import Candidate
from attnfx.targets import Target, detect
from attnfx.targets.detection import present_backends
from attnfx.targets.sdpa_dispatch import FLASH4, IMPLEMENTATIONS, Backends


def target_of(options: Options, present: torch.device) -> Target | None:
    """Return the target to decide for; None for a present CPU or an unknown device."""
    if isinstance(options.target, Target):
        return options.target
    return detect(present) if present.type == "cuda" and torch.cuda.is_available() else None


def backends_of(target: Target | None) -> Backends:
    """Return the kernels of PyTorch's fused operator on a target, or in this process."""
    return present_backends() if target is None else Backends(target.cudnn, target.flash_attention)


def refusals(
    match: Match, sizes: Mapping[str, int], device: torch.device, target: Target | None = None, compiled: bool = True
) -> dict[str, str]:
    """Map each tier that cannot run a match to the reason, on the present `device` or on `target`. `compiled`: Inductor
    compiles the graph."""
    dtype, capability = value(match.query).dtype, None if target is None else target.capability
    found = operator.refusals(match.spec, dtype, device, sizes["D"], sizes["Dv"], capability)
    if (why := flash.beyond(sizes["B"], sizes["H"])) is not None:
        found = {"decode": why, "flash": why, **found}
    if device.type == "cuda" and "library" not in found:
        kernels = _fused_kernels(match, sizes, device, target)
        if match.reductions:
            found["library"] = (
                "parts of the weights are read, and PyTorch's operator does not return the log-sum-exp that these need"
            )
        elif isinstance(kernels, str):
            found["library"] = kernels
    found.pop("flex", None)
    if (why := _refused_by_flex(match, sizes, device, capability, compiled)) is not None:
        found["flex"] = why
    return found


def _fused_kernels(
    match: Match, sizes: Mapping[str, int], device: torch.device, target: Target | None = None
) -> tuple[str, ...] | str:
    """Return the kernels of PyTorch's fused operator that can compute a match, or the reason against all."""
    extents, training = dimensions(match), torch.is_grad_enabled() and match.training
    capability = None if target is None else target.capability
    return cuda.kernels(
        match.spec, value(match.query).dtype, device, sizes["D"], sizes["Dv"], capability, backends_of(target),
        grouped=extents["G"] is not extents["H"], square=extents["T"] is extents["S"], training=training,
    )  # fmt: skip


def _refused_by_flex(
    match: Match, sizes: Mapping[str, int], device: torch.device, capability: int | None, compiled: bool
) -> str | None:  # fmt: skip
    spec, dtype, live = match.spec, value(match.query).dtype, match.every_row_live
    why = flex.expresses(
        spec, dtype, device, sizes["D"], sizes["Dv"], capability, live=live,
        training=torch.is_grad_enabled() and match.training, summed=bool(match.reductions),
    )  # fmt: skip
    known = _known(match)
    if compiled and device.type == "cpu" and not known:
        why = why or "PyTorch's C++ code of flex_attention does not compile with symbolic sizes"
    return why or flex.takes(spec, live, sizes, known)


def fused_call(match: Match, sizes: Mapping[str, int], tier: str, kernel: str) -> cuda.Fused | None:
    """Return the call of PyTorch's fused operator that replaces a match directly: only for a GPU's library tier. It is
    of the chosen kernel if the present device has it, else of the first one that it has."""
    call, device = cuda.call_of(match.spec), value(match.query).device
    if device.type != "cuda" or tier != "library" or isinstance(call, str):
        return None
    here = _fused_kernels(match, sizes, device)
    name = kernel if kernel in here else here[0]
    return call._replace(flash=name in IMPLEMENTATIONS.values())


def flex_call(match: Match, sizes: Mapping[str, int], tier: str, kernel: str) -> flex.Call | None:
    """Return the call of PyTorch's `flex_attention` that replaces a match with this tier, else None."""
    device = value(match.query).device
    call = flex.call_of(match.spec, match.every_row_live, device) if tier == "flex" else None
    flash = kernel == FLASH4 and flex_on_flash(match, sizes, device)
    return replace(call, flash=True) if call is not None and flash else call


def flex_on_flash(match: Match, sizes: Mapping[str, int], device: torch.device, target: Target | None = None) -> bool:
    """Return whether FlashAttention-4 can run a match's `flex_attention`, on the present device or on `target`."""
    there = flex.flash_installed() if target is None else target.flash_attention == "FA4"
    if not there or device.type != "cuda" or (target is None and not torch.cuda.is_available()):
        return False
    why = flex.on_flash(
        match.spec, value(match.query).dtype, sizes["D"], sizes["Dv"], sizes,
        gpu.capability(device) if target is None else target.capability, live=match.every_row_live,
        known=_known(match), training=torch.is_grad_enabled() and match.training, summed=bool(match.reductions),
    )  # fmt: skip
    return why is None


def _known(match: Match) -> bool:
    """Return whether all sizes of a match are constants."""
    return not match.sizes and all(n.op == "const" for n in dimensions(match).values())


def tiers_of(
    chosen: Candidate, here: Mapping[str, str], present: torch.device, reductions: Sequence[Reduction] = ()
) -> list[str]:
    """Return the operator's tiers for a decision, in the order to try them.

    `here` holds the tiers that the present device cannot run. If the chosen tier is among them, as the decision is for
    another device, tiers that can run follow it. "chunked" comes last, for conditions known only at the call: most
    tiers cannot run empty tensors, for example. Sums of dropped weights use "chunked" alone: it computes them in
    blocks, and other tiers would drop other weights.
    """
    if any(r.spec.random and r.kind != "logsumexp" for r in reductions):
        return ["chunked"]
    others = [t for t in operator.AUTO.get(present.type, ()) if t not in here] if chosen.tier in here else []
    return list(dict.fromkeys([str(configuration.of(chosen)), *others, "chunked"]))
