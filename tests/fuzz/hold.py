"""Compare a program compiled by attnfx with eager."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from attnfx.report.report import reports
from tests.fuzz.compare import FAULT, UNTRACED, Difference, Seen, differences, observe
from tests.fuzz.recipes import Recipe, shrink

HOW = {"no": False, "all": True, "marked": None, "auto": None}


@dataclass
class Outcome:
    """The outcome of a recipe.

    verdict    "same"; "fault" or "differs", which are findings; "eager raises"; "PyTorch's own"; "rounding"
    told       the differences, or the fault
    rewritten  the number of rewritten sites, of `sites`; `untraced` lists code that attnfx could not trace
    """

    recipe: Recipe
    verdict: str = "same"
    told: list[str] = field(default_factory=list)
    kinds: frozenset[str] = frozenset()
    rewritten: int = 0
    sites: int = 0
    untraced: list[str] = field(default_factory=list)

    @property
    def finding(self) -> bool:
        return self.verdict in ("fault", "differs")


def _by(backend: str, recipe: Recipe, **options: Any) -> Callable[[torch.nn.Module], Callable[..., Any]]:
    def compiled(model: torch.nn.Module) -> Callable[..., Any]:
        return torch.compile(model, backend=backend, dynamic=HOW[recipe.dynamic], **options)

    return compiled


def hold(recipe: Recipe) -> Outcome:
    """Run the recipe in eager and through attnfx, in each of its modes, and return the differences. If there are any,
    also run PyTorch's own compiler without attnfx."""
    outcome = Outcome(recipe)
    for mode in recipe.modes:
        want = observe(recipe, lambda model: model, mode)
        if want.raised:
            outcome.told.append(f"{mode}: {want.raised}")
            continue
        _hold(outcome, mode, want)
        if outcome.finding:
            return outcome
    if len(outcome.told) == len(recipe.modes):
        outcome.verdict = "eager raises"
    return outcome


def _hold(outcome: Outcome, mode: str, want: Seen) -> None:
    recipe = outcome.recipe
    torch._dynamo.reset()
    before = {id(r): r for r in reports()}
    got = observe(recipe, _by("attnfx", recipe, options={"rewrite": "always", "inner": recipe.inner}), mode)
    sites = [s for r in reports() if id(r) not in before for s in r.sites]
    outcome.sites += len(sites)
    outcome.rewritten += sum(s.rewritten for s in sites)
    outcome.untraced += [s for s in got.said if s.startswith(UNTRACED)]
    faults = [s for s in got.said if s.startswith(FAULT)]

    @cache
    def truth() -> Seen | None:
        run = None if recipe.draws else observe(recipe, lambda model: model, mode, torch.float64)
        return run if run is not None and not run.raised else None

    found = differences(got, want, truth, recipe.coarse)
    if faults or found:
        torch._dynamo.reset()
        plain = observe(recipe, _by(recipe.inner, recipe), mode)
        own = {(d.name, d.kind) for d in differences(plain, want, truth, recipe.coarse)}
        left = [d for d in found if (d.name, d.kind) not in own]
        if plain.raised or not (faults or left):
            outcome.verdict, left = "PyTorch's own", found
        elif not faults and _rounds(recipe, mode, got, want, truth):
            outcome.verdict = "rounding"
        else:
            outcome.verdict = "fault" if faults else "differs"
        outcome.told = [f"{mode}: {x}" for x in (*faults, *left)]
        outcome.kinds = frozenset([_fault(x) for x in faults] or [_kind(d) for d in left])
    torch._dynamo.reset()


def _rounds(recipe: Recipe, mode: str, got: Seen, want: Seen, truth: Callable[[], Seen | None]) -> bool:
    """Return whether a difference is rounding: not far above what is allowed, and gone if all is computed in float64.

    If one score is far above the others, the backward pass of a softmax takes the difference of two large sums. Eager
    may happen to round both alike.
    """
    exact = observe(recipe, lambda model: model, mode, torch.float64)  # also of a program that draws
    if exact.raised or differences(got, want, truth, recipe.coarse, times=20):
        return False
    torch._dynamo.reset()
    options = {"rewrite": "always", "inner": recipe.inner}
    precise = observe(recipe, _by("attnfx", recipe, options=options), mode, torch.float64)
    return not differences(precise, exact, lambda: None, False, times=1e-4)


def _fault(text: str) -> str:
    """Return the name of the exception in a warning of attnfx."""
    return next(iter(re.findall(r"\b[A-Z]\w+(?:Error|Exception|Fault)\b", text)), "fault")


def _kind(d: Difference) -> str:
    return f"raises {d.told.split(':')[0]}" if d.kind == "raises" else d.kind


def shrunk(outcome: Outcome, tries: int = 60) -> Outcome:
    """Return the outcome of the smallest recipe with the same verdict and a common kind of difference."""
    best = [outcome]

    def found(recipe: Recipe) -> bool:
        made = hold(recipe)
        if made.verdict != outcome.verdict or not made.kinds & outcome.kinds:
            return False
        best.append(made)
        return True

    shrink(outcome.recipe, found, tries)
    return best[-1]


__all__ = ["Difference", "Outcome", "hold", "shrunk"]
