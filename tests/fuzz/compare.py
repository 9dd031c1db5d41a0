"""Record the observable behavior of a program, and compare two runs of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from tests.fuzz.programs import Program, inputs
from tests.fuzz.recipes import Recipe

CALLS = 2
COARSE = (torch.bfloat16, torch.float16)
FAULT, UNTRACED = "attnfx failed", "attnfx could not trace"


@dataclass
class Seen:
    """All values that a caller can observe, by name, or the exception raised, and the warnings of attnfx (`said`)."""

    values: dict[str, Any] = field(default_factory=dict)
    raised: str = ""
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """A difference: the `name` of the value, and the `kind`: values, gradient, strides, dtype, alias, raises .."""

    name: str
    kind: str
    told: str

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}: {self.told}"


def observe(recipe: Recipe, compiled: Callable[[Program], Callable[..., Any]], mode: str,
            dtype: torch.dtype = torch.float32) -> Seen:  # fmt: skip
    seen = Seen()
    model = Program(recipe).to(dtype).train(mode == "train")
    function = compiled(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for call in range(CALLS):
                _call(seen, recipe, model, function, call, mode == "train", dtype)
        except Exception as problem:
            problem = getattr(problem, "inner_exception", problem)
            seen.raised = f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"
    seen.said = [str(w.message) for w in said if str(w.message).startswith("attnfx")]
    return seen


def _call(seen: Seen, recipe: Recipe, model: Program, function: Callable[..., Any], call: int, train: bool,
          dtype: torch.dtype) -> None:  # fmt: skip
    given, leaves = inputs(recipe, call, train, dtype)
    if recipe.dynamic == "marked":
        for name in ("x", "y", "keep", "ids"):
            torch._dynamo.maybe_mark_dynamic(given[name], 1)
    torch.manual_seed(recipe.seed)
    with torch.set_grad_enabled(train), torch._dynamo.config.patch(capture_scalar_outputs=True):
        made = function(**given)
    flat, structure = tree_flatten(made)
    values = seen.values
    values[f"call {call} structure"] = str(structure)
    tensors = {n: t for n, t in given.items() if isinstance(t, Tensor)}
    state = dict(model.named_buffers()) | dict(model.named_parameters())
    holders: dict[int, str] = {}
    for name, t in (*tensors.items(), *state.items()):
        holders.setdefault(_memory(t), name)
    for n, x in enumerate(flat):
        name = f"call {call} output {n}"
        if not isinstance(x, Tensor):
            values[name] = x
            continue
        values[name] = x.detach().clone()
        values[f"{name} strides"] = _strides(x)
        values[f"{name} type"] = f"{type(x).__name__} {x.dtype} requires_grad={x.requires_grad}"
        values[f"{name} alias"] = holders.setdefault(_memory(x), name) if x.numel() else ""
    for name, t in tensors.items():
        values[f"call {call} input {name}"] = t.detach().clone()
    if train:
        _backward(flat)
        for n, leaf in enumerate(leaves):
            values[f"call {call} gradient of input {n}"] = leaf.grad
        for name, p in model.named_parameters():
            values[f"call {call} gradient of {name}"] = None if p.grad is None else p.grad.clone()
    for name, t in state.items():
        values[f"call {call} state {name}"] = t.detach().clone()
    values[f"call {call} generator"] = torch.get_rng_state()


def _backward(flat: list[Any]) -> None:
    generator = torch.Generator().manual_seed(7)
    outs = [x for x in flat if isinstance(x, Tensor) and x.requires_grad]
    seeds = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
    if outs:
        torch.autograd.backward(outs, seeds)


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _strides(t: Tensor) -> tuple[int, ...]:
    """Return the observable strides: skip dims of size one, and return () for an empty tensor."""
    return tuple(s for s, n in zip(t.stride(), t.shape) if n > 1) if t.numel() else ()


# -- differences ----------------------------------------------------------------------------------------
def error(got: Tensor, want: Tensor, least: float = 1e-2) -> float:
    """Return the largest difference over the largest value, or over `least`; inf if shapes, NaNs or infs differ."""
    got, want = got.double(), want.double()
    if got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
        return math.inf
    if not want.numel() or torch.equal(got.nan_to_num(), want.nan_to_num()):
        return 0.0
    if not torch.equal(got.isinf(), want.isinf()):
        return math.inf
    worst = (got - want).nan_to_num(0, 0, 0).abs().max() / largest(want).clamp_min(least)
    return worst.item()


def largest(x: Tensor) -> Tensor:
    return x.double().nan_to_num(0, 0, 0).abs().max() if x.numel() else torch.zeros((), dtype=torch.double)


def differences(
    got: Seen, want: Seen, truth: Callable[[], Seen | None], coarse: bool, times: float = 1.0
) -> list[Difference]:
    """List the differences of `got` from `want`. `truth` runs the program in float64, only if numbers differ. `times`
    multiplies the rounding that is allowed."""
    if got.raised:
        return [Difference("program", "raises", got.raised)]
    found: list[Difference] = []
    gradients = [largest(x).item() for n, x in want.values.items() if "gradient" in n and isinstance(x, Tensor)]
    scale = max(gradients, default=0.0)  # a gradient that cancels out has the rounding error of the others
    for name in [*want.values, *(n for n in got.values if n not in want.values)]:
        x, y = got.values.get(name), want.values.get(name)
        kind = "gradient" if "gradient" in name else name.split()[2] if "output" not in name else name.split()[-1]
        kind = "values" if kind.isdigit() else kind
        told = _differs(x, y, name, truth, coarse, scale if kind == "gradient" else 0.0, times)
        if told:
            found.append(Difference(name, kind, told))
    return found


def _differs(
    x: Any, y: Any, name: str, truth: Callable[[], Seen | None], coarse: bool, scale: float, times: float
) -> str:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        one = next((t for t in (x, y) if isinstance(t, Tensor)), None)
        if one is not None and "gradient" in name and (x is None or y is None):  # None equals a gradient of zeros
            return "" if not one.count_nonzero() else f"{_told(x)}, eager {_told(y)}"
        return "" if type(x) is type(y) and x == y else f"{_told(x)}, eager {_told(y)}"
    if x.dtype != y.dtype or x.shape != y.shape:
        return f"{_told(x)}, eager {_told(y)}"
    if not x.is_floating_point():
        return "" if torch.equal(x, y) else f"{int((x != y).sum())} of {x.numel()} differ"
    # a backward pass that recomputes cancels dp - delta, which a saturated softmax rounds at the scale of dp
    exactly = 5e-5 if "gradient" in name else 1e-5
    rounding = times * (3e-2 if coarse or y.dtype in COARSE else exactly)
    least = max(scale / 2, 1e-2)
    apart = error(x, y, least)
    if apart <= rounding / 4:
        return ""
    run = truth()
    exact = run.values.get(name) if run is not None else None
    if not isinstance(exact, Tensor) or exact.shape != y.shape:
        return f"off by {apart:.2g}" if apart > 10 * rounding else ""
    mine, own = error(x, exact, least), error(y, exact, least)
    return f"off by {mine:.2g}, eager by {own:.2g}" if not mine <= 4 * own + rounding else ""


def _told(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else str(x)
