"""Run a function compiled, in eager and in float64, and compare: helpers for tests of the whole backend."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves, tree_map

from attnfx.errors import RefusalError
from attnfx.report.records import Site
from attnfx.report.report import Report, reports

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def rand(*shape: int, seed: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def qkv(
    b: int = 2, h: int = 4, t: int = 40, s: int | None = None, d: int = 8, g: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Create query (b, h, t, d), key and value (b, g, s, d)."""
    s, g = t if s is None else s, h if g is None else g
    return rand(b, h, t, d), rand(b, g, s, d), rand(b, g, s, d)


def compiled(fn: Callable[..., Any], *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any) -> Any:
    """Compile `fn` with attnfx: apply every sound rewrite, and generate code only if `inner` asks for it."""
    options = {"rewrite": "always", "inner": "aot_eager", **options}
    return torch.compile(fn, backend="attnfx", dynamic=dynamic, fullgraph=fullgraph, options=options)


@contextmanager
def new_reports() -> Iterator[list[Report]]:
    """Yield a list that contains, at the end of the block, the reports filed in it."""
    before = reports()
    found: list[Report] = []
    yield found
    found.extend(r for r in reports() if not any(r is b for b in before))


def floats(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]


def cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def run(
    fn: Callable[..., Any], args: Sequence[Any], train: bool, owner: torch.nn.Module | None = None, **kwargs: Any
) -> list[Tensor]:
    """Return the floating outputs of `fn` in float64. In training, append the gradients of a fixed projection of them
    by the floating inputs and `owner`'s parameters."""
    args, kwargs = tree_map(
        lambda a: (
            a.detach().clone(memory_format=torch.preserve_format).requires_grad_(train and a.is_floating_point())
            if isinstance(a, Tensor)
            else a
        ),
        (tuple(args), kwargs),
    )
    parameters = [p for p in owner.parameters() if p.requires_grad] if owner is not None else []
    for p in parameters:
        p.grad = None
    with torch.set_grad_enabled(train):
        outs = floats(fn(*args, **kwargs))
    results = [o.detach().double() for o in outs]
    if train:
        generator = torch.Generator().manual_seed(7)
        seeds = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outs]
        torch.autograd.backward(
            [o for o in outs if o.requires_grad], [g for o, g in zip(outs, seeds) if o.requires_grad]
        )
        leaves = [*(a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.requires_grad), *parameters]
        results += [(x.grad if x.grad is not None else torch.zeros_like(x)).double() for x in leaves]
    return results


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest difference over the largest value of a tensor; inf if shapes, counts or NaNs differ."""
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    for g, w in zip(got, want):
        if g.shape != w.shape or not torch.equal(g.isnan(), w.isnan()):
            return float("inf")
        if g.numel():
            worst = max(worst, ((g - w).nan_to_num().abs().max() / w.nan_to_num().abs().max().clamp_min(1e-3)).item())
    return worst


def compare(
    fn: Any,
    *args: Any,
    train: bool = True,
    dynamic: bool | None = None,
    tolerance: float | None = None,
    exact: bool = True,
    fullgraph: bool = False,
    kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> list[Report]:
    """Run `fn` compiled, require results (and gradients) as close to float64 as eager's, and return the reports.
    `exact=False` compares with eager in its own precision."""
    kwargs = kwargs or {}
    module = fn if isinstance(fn, torch.nn.Module) else None
    dtype = next((a.dtype for a in floats((args, kwargs))), torch.float32)
    with new_reports() as filed, warnings.catch_warnings():
        warnings.filterwarnings("error", message="attnfx failed")
        got = run(compiled(fn, dynamic=dynamic, fullgraph=fullgraph, **options), args, train, module, **kwargs)
    own = run(fn, args, train, module, **kwargs)
    if exact:
        precise = copy.deepcopy(fn).double() if module is not None else fn
        want = run(
            precise,
            cast(args, torch.float64),
            train,
            precise if module is not None else None,
            **cast(kwargs, torch.float64),
        )
    else:
        want = own
    if math.isinf(error(own, want)):  # NaNs of eager's own precision: float64 tells nothing about them
        want = own
    limit = 4 * error(own, want) + (TOLERANCE[dtype] if tolerance is None else tolerance)
    assert error(got, want) <= limit, f"error {error(got, want):.3g}, eager's {error(own, want):.3g}\n{_text(filed)}"
    return filed


def check(fn: Any, *args: Any, sites: int = 1, **how: Any) -> list[Site]:
    """Require correct results (`compare` takes `how`) and exactly `sites` sites, all rewritten. Return the sites."""
    filed = compare(fn, *args, **how)
    found = [site for report in filed for site in report.sites]
    assert (len([s for s in found if s.rewritten]), len(found)) == (sites, sites), _text(filed)
    return found


def assert_right(fn: Any, *args: Any, **how: Any) -> list[Site]:
    """Require correct results (`compare` takes `how`), with or without rewrites. Return the sites."""
    return [site for report in compare(fn, *args, **how) for site in report.sites]


def assert_kept(fn: Any, *args: Any, code: str | Sequence[str], **how: Any) -> list[Site]:
    """Require correct results (`compare` takes `how`) and that every site is kept. Return the sites. There must be one
    site with this code, or sites with these codes in any order. Without any site, the softmaxes outside attention count
    instead."""
    filed = compare(fn, *args, **how)
    sites = [site for report in filed for site in report.sites]
    assert not any(site.rewritten for site in sites), _text(filed)
    found = sites or [site for report in filed for site in report.others]
    assert sorted(s.code for s in found) == sorted([code] if isinstance(code, str) else code), _text(filed)
    return sites


@contextmanager
def raises_refusal(code: str) -> Iterator[None]:
    """Require that compiling in the block raises RefusalError with this code."""
    with pytest.raises(BackendCompilerFailed) as caught:
        yield
    problem = caught.value.inner_exception
    assert isinstance(problem, RefusalError) and f"[{code}]" in str(problem), problem


def _text(filed: list[Report]) -> str:
    return "\n".join(map(str, filed))
