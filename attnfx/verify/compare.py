"""Two functions that should be one: compared on given inputs, held to float64.

The original in float64 is the truth. What the original in its own dtype is away from it is rounding, and so is what the
truth moves when the inputs are changed in their last bit; another way to compute the same may be away by a few times
that, row by row, and by the rounding of its own result.
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

TIMES = 4.0  # of eager's own error
DRAWS, SIGMAS = 16, 8.0  # of dropout: how many are compared, and when they are not of one distribution
SLIGHT = 1e-3  # of the result: what rounding may make of a mean or a strength
Function = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Difference:
    """One result, or one gradient, of both. Errors against float64, as a part of the largest number in it.

    `problem` says in words what is wrong, "" where both are the same but for rounding.
    """

    name: str
    error: float
    eager: float
    problem: str = ""


def compare(
    original: GraphModule, rewritten: Function, inputs: Sequence[Any], taught: Sequence[bool], names: Sequence[str]
) -> list[Difference]:
    """The results (called `names`), then the gradients of the inputs that are `taught`, under one fixed cotangent."""
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
    """What is wrong with the dropout of two functions that are the same without it, or "".

    They draw different numbers. Over several draws, how far the result lies along the one without dropout, and how
    strong the noise is, must be of one distribution: that tells a wrong probability and a missing scale.
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
    """Runs a graph with every operator in float64 that any float64 reaches; what is computed of indices alone stays."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(_wide, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double()
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _moved(x: Any, n: int) -> Any:
    """A tensor with its last bits changed. Whole numbers stay: they are flags, positions, or a mask's fill."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    step = 1 + torch.finfo(x.dtype).eps * (2 * _random(x.shape, n, torch.rand) - 1).to(x.device)
    wide = x.double()
    return torch.where(wide == wide.round(), wide, wide * step)


def _random(shape: Sequence[int], n: int, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    """The same numbers at each call, on every device."""
    return draw(tuple(shape), generator=torch.Generator().manual_seed(n), dtype=torch.float32)


def _outcome(
    run: Function, inputs: Sequence[Any], taught: Sequence[bool], like: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Results, then gradients. The cotangents are rounded as the results of `like` are, which have the same shapes."""
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
    """Whether a tensor holds a NaN, or an infinity that is no mask: what it does where it is masked is not kept."""
    return isinstance(x, Tensor) and x.is_floating_point() and bool((x.isnan() | x.isposinf()).any())


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()] if x.is_floating_point() else x[:0]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _tolerance(dtype: torch.dtype) -> float:
    """The rounding of a result of this dtype that was accumulated in float32 or better."""
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
    # eager may overflow where another way does not; a NaN of the inputs may have been masked
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
    """The largest error of each row. By rows, so that one in which eager itself is far off excuses no other."""
    rows = (x - exact).abs().where(x.isfinite() & exact.isfinite(), 0.0)
    return rows.reshape(-1, rows.shape[-1] if rows.ndim and rows.numel() else 1).amax(-1)


def _most(noise: Tensor) -> Tensor | float:
    """What nine of ten rows stay below."""
    return noise.kthvalue(math.ceil(0.9 * noise.numel())).values if noise.numel() else 0.0


def _form(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


def _noise(run: Function, inputs: Sequence[Any], at: int, base: Tensor) -> tuple[Tensor, Tensor]:
    """Of several draws: the noise along the result without dropout, and its energy, both as a part of that result's."""
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
