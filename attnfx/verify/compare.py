"""Compare two functions that should be equal on given inputs, with float64 as the reference.

The reference is the original run in float64. Two differences measure rounding noise: the original in its own dtype
against the reference, and the change of the reference when the last bits of the inputs change. In each row, the other
function's error may be a few times that noise, plus the rounding of its own result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_leaves, tree_map

from attnfx.passes.fx.dropout import without_dropout

TIMES = 4.0  # the allowed error, in multiples of the rounding noise
DRAWS, SIGMAS = 16, 8.0  # dropout: the number of draws, and the allowed difference in standard deviations
SLIGHT = 1e-3  # dropout: the allowed difference from rounding, relative to the result
Function = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Difference:
    """The difference in one result or gradient. Errors are against float64, relative to its largest value.

    `error` is the rewrite's, `eager` the original's. `problem` is a sentence; "" if they agree up to rounding.
    """

    name: str
    error: float
    eager: float
    problem: str = ""


def compare(
    original: GraphModule, rewritten: Function, inputs: Sequence[Any], taught: Sequence[bool], names: Sequence[str]
) -> list[Difference]:
    """Compare the results (called `names`), then the gradients of the `taught` inputs, for fixed random cotangents."""
    eager = _outcome(original, inputs, taught)
    got = _outcome(rewritten, inputs, taught, eager)
    in_double = InDouble(original).run
    exact = _outcome(in_double, tree_map(_wide, list(inputs)), taught, eager)
    moved = _outcome(in_double, [_wide(_moved(x, n)) for n, x in enumerate(inputs)], taught, eager)
    held = [n.name for n in original.graph.nodes if n.op == "placeholder"]
    labels = [*names, *(f"gradient of {n}" for n, t in zip(held, taught, strict=True) if t)]
    excused = any(_broken(x) for x in inputs)
    largest = max((_largest(x) for x in exact[len(names) :]), default=0.0)
    return [
        _judged(*five, floor=largest / 4 if at >= len(names) else 0.0, excused=excused)
        for at, five in enumerate(zip(labels, got, eager, exact, moved, strict=True))
    ]


def compare_dropout(original: GraphModule, rewritten: GraphModule, inputs: Sequence[Any]) -> str:
    """Compare the dropout of two functions that are equal without it; return a problem, or "".

    The functions draw different random numbers, so statistics over several draws are compared: the noise's projection
    onto the result without dropout, and its energy. They show a wrong probability or a missing scale.
    """
    calm = without_dropout(original)(*inputs)
    for at, base in enumerate(calm):
        if not base.is_floating_point():
            continue
        (a, b), (c, d) = (_noise(f, inputs, at, base) for f in (original, rewritten))
        for what, x, y in (("mean", a, c), ("strength", b, d)):
            apart = (x.mean() - y.mean()).abs()
            spread = ((x.var() + y.var()) / DRAWS).sqrt()
            if apart > SIGMAS * spread + SLIGHT:
                return f"the {what} of the dropout noise is {y.mean():.3g}, and {x.mean():.3g} in the original"
    return ""


class InDouble(Interpreter):
    """Run a graph with each operator that receives a float64 tensor in float64; index computations stay as they are."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(_wide, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double()
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _moved(x: Any, n: int) -> Any:
    """Change the last bits of a tensor, except of whole numbers: those are flags, positions or mask fills."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    step = 1 + torch.finfo(x.dtype).eps * (2 * _random(x.shape, n, torch.rand) - 1).to(x.device)
    wide = x.double()
    return torch.where(wide == wide.round(), wide, wide * step)


def _random(shape: Sequence[int], n: int, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Return random numbers that are the same at each call and on every device."""
    return draw(tuple(shape), generator=torch.Generator().manual_seed(n), dtype=torch.float32)


def _outcome(
    run: Function, inputs: Sequence[Any], taught: Sequence[bool], like: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return results, then gradients. Cotangents are rounded to the dtypes of `like`, results of the same shapes."""
    leaves = [x.detach().requires_grad_(t) if isinstance(x, Tensor) else x for x, t in zip(inputs, taught, strict=True)]
    with torch.set_grad_enabled(any(taught)):
        results = list(run(*leaves))
    learners = [x for x, t in zip(leaves, taught, strict=True) if t]
    ends = [(n, r) for n, r in enumerate(results) if r.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(learners)
    if ends and learners:
        seeds = [_random(r.shape, n).to(r.device, (like or results)[n].dtype).to(r.dtype) for n, r in ends]
        grads = torch.autograd.grad([r for _, r in ends], learners, seeds, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(learners, grads, strict=True)]
    return [*(r.detach() for r in results), *filled]


def _broken(x: Any) -> bool:
    """Check for NaN or +inf: if they are masked, a rewrite need not reproduce their effect. -inf is a mask's fill."""
    return isinstance(x, Tensor) and x.is_floating_point() and bool((x.isnan() | x.isposinf()).any())


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()] if x.is_floating_point() else x[:0]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _tolerance(dtype: torch.dtype) -> float:
    """Return the rounding error of a result of this dtype, accumulated in float32 or better."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return max(2 * torch.finfo(dtype).eps, 64 * torch.finfo(compute).eps)


def _judged(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, moved: Tensor, floor: float, excused: bool
) -> Difference:
    if got.shape != eager.shape or got.dtype != eager.dtype:
        return Difference(name, math.inf, 0.0, f"{_form(got)} instead of {_form(eager)}")
    if not eager.is_floating_point():
        clear = (eager == exact) & (eager == moved)
        wrong = int((got != eager)[clear].sum())
        return Difference(name, wrong / max(1, eager.numel()), 0.0, f"{wrong} elements differ" if wrong else "")
    scale = max(_largest(exact), floor, torch.finfo(torch.float32).tiny)
    g, e = got.double(), eager.double()
    lost = (g.isnan() & ~e.isnan()) | (g.isinf() & (g != e))
    # eager may overflow while the rewrite does not; the rewrite may have masked a NaN of the inputs
    better = exact.isfinite() | (e.isnan() & excused)
    strange = lost | (g.isfinite() & ~e.isfinite() & ~better)
    errors, eagers, noise = _apart(g, exact), _apart(e, exact), torch.maximum(_apart(e, exact), _apart(moved, exact))
    error, eagers_own = _largest(errors) / scale, _largest(eagers) / scale
    if strange.any():
        problem = f"{int(strange.sum())} elements are NaN or infinite in only one of the two"
    elif (errors > TIMES * noise.clamp_min(_most(noise)) + _tolerance(eager.dtype) * scale).any():
        problem = f"an error of {error:.2g} relative to the largest element (eager's is {eagers_own:.2g})"
    else:
        problem = ""
    return Difference(name, error, eagers_own, problem)


def _apart(x: Tensor, exact: Tensor) -> Tensor:
    """Return the largest error of each row. Per row, so that eager's large error in one row excuses only that row."""
    rows = (x - exact).abs().where(x.isfinite() & exact.isfinite(), 0.0)
    return rows.reshape(-1, rows.shape[-1] if rows.ndim and rows.numel() else 1).amax(-1)


def _most(noise: Tensor) -> Tensor | float:
    """Return the 90th percentile of the rows' noise."""
    return noise.kthvalue(math.ceil(0.9 * noise.numel())).values if noise.numel() else 0.0


def _form(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


def _noise(run: Function, inputs: Sequence[Any], at: int, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return each draw's noise projected onto the result without dropout, and its energy, relative to that result."""
    along, energy = [], []
    finite = base.isfinite()
    calm = base[finite].double()
    whole = calm.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    with torch.no_grad():
        for _ in range(DRAWS):
            noise = run(*inputs)[at][finite].double() - calm
            along.append((noise * calm).sum() / whole)
            energy.append(noise.square().sum() / whole)
    return torch.stack(along), torch.stack(energy)
