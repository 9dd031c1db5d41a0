"""Build a recipe's module and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tests.fuzz.attentions import attend
from tests.fuzz.parts import ATTENTIONS, ENTRIES, LONGEST, NEIGHBORS, WRAPS, B, Context, E, H, Part, named

if TYPE_CHECKING:
    from tests.fuzz.recipes import Recipe, Step


# -- from the input to the first activations ---------------------------------------------------------
@named(ENTRIES)
def scaled(c: Context, x: Tensor) -> Tensor:
    return x * 1.5


@named(ENTRIES)
def projected(c: Context, x: Tensor) -> Tensor:
    return x @ c.weight()


@named(ENTRIES)
def tokened(c: Context, x: Tensor) -> Tensor:
    return torch.cat([c.model.bias.expand(x.shape[0], 1, -1), x[:, 1:]], dim=1)


@named(ENTRIES)
def copied(c: Context, x: Tensor) -> Tensor:
    return x.clone()


@named(ENTRIES)
def direct(c: Context, x: Tensor) -> Tensor:
    return x


# -- inputs --------------------------------------------------------------------------------------------
Pair = tuple[Tensor, Tensor, list[Tensor]]  # x, y, and the leaves that have a gradient
INPUTS: dict[str, Callable[[Callable[..., Tensor], int], Pair]] = {}


@named(INPUTS)
def plain(leaf: Callable[..., Tensor], t: int) -> Pair:
    x, y = leaf(B, t, E), leaf(B, t, E)
    return x, y, [x, y]


@named(INPUTS)
def inner(leaf: Callable[..., Tensor], t: int) -> Pair:
    """Create inputs that may be changed in place, because they are not leaves."""
    x, y = leaf(B, t, E), leaf(B, t, E)
    return x * 1.0, y * 1.0, [x, y]


@named(INPUTS)
def same(leaf: Callable[..., Tensor], t: int) -> Pair:
    x = leaf(B, t, E)
    made = x * 1.0
    return made, made, [x]


@named(INPUTS)
def overlapping(leaf: Callable[..., Tensor], t: int) -> Pair:
    x = leaf(B, t + 1, E)
    made = x * 1.0
    return made[:, :-1], made[:, 1:], [x]


@named(INPUTS)
def strided(leaf: Callable[..., Tensor], t: int) -> Pair:
    x, y = leaf(t, B, E), leaf(1, t, E)
    return (x * 1.0).transpose(0, 1), y.expand(B, -1, -1), [x, y]


@named(INPUTS)
def frozen(leaf: Callable[..., Tensor], t: int) -> Pair:
    x, y = leaf(B, t, E), leaf(B, t, E)
    return x.detach(), y, [y]


def inputs(recipe: Recipe, call: int, train: bool, dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor]]:
    """Create the inputs of a call, and their leaves. With dynamic sizes, the second call has more tokens."""
    generator = torch.Generator().manual_seed(recipe.seed + 1000 * call)
    t = recipe.tokens + (2 * call if recipe.dynamic != "no" else 0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, y, leaves = INPUTS[recipe.inputs](lambda *shape: drawn(*shape).requires_grad_(train), t)
    keep = torch.rand(B, t, generator=generator) < 0.7
    keep[:, 0] = True
    ids = torch.randint(0, 8, (B, t), generator=generator)
    named = dict(x=x, y=y, keep=keep, ids=ids, memory=drawn(B, LONGEST, E), number=0.5, count=2)
    return named, leaves


# -- the module ------------------------------------------------------------------------------------------
class Program(nn.Module):
    """The steps of a recipe in sequence, with all parameters and buffers that parts may use."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            self.weights = nn.ParameterList([torch.randn(E, E) * 0.4 for _ in range(5)])
            self.places, self.table = nn.Parameter(torch.randn(LONGEST, E)), nn.Parameter(torch.randn(8, H))
            self.bias, self.scale = nn.Parameter(torch.randn(E)), nn.Parameter(torch.rand(E) + 0.5)
            self.packed, self.hooked = nn.Linear(E, 3 * E), nn.Linear(E, E)
            self.embedding, self.norm, self.batch = nn.Embedding(8, E), nn.LayerNorm(E), nn.BatchNorm1d(E)
            self.group, self.conv, self.dropout = nn.GroupNorm(2, E), nn.Conv1d(E, E, 3, padding=1), nn.Dropout(0.2)
            self.register_buffer("mean", torch.randn(E))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("cache", torch.randn(B, LONGEST, E))
            triangle = torch.ones(1, 1, LONGEST, LONGEST, dtype=torch.bool).tril()
            self.register_buffer("triangle", triangle, persistent=False)
        self.hooked.register_forward_hook(lambda module, args, out: out * 0.5)
        self.hooked.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.entry = ENTRIES[recipe.entry]
        self.parts = [_part(step) for step in recipe.steps]

    def forward(self, **given: Any) -> tuple[Any, ...]:
        out: list[Any] = []
        x = self.entry(Context(self, given, out, 0), given["x"])
        for at, part in enumerate(self.parts):
            x = part(Context(self, given, out, at), x)
        return x, *out


def _part(step: Step) -> Part:
    if step.name == "attend":
        chosen = dict(step.made)
        part = lambda c, x: attend(c, x, chosen)  # noqa: E731
    else:
        part = ATTENTIONS[step.name] if step.name in ATTENTIONS else NEIGHBORS[step.name].call
    for wrap in step.wraps:
        part = _within(WRAPS[wrap], part)
    return part


def _within(wrap: Callable[[Part, Context, Tensor], Tensor], part: Part) -> Part:
    return lambda c, x: wrap(part, c, x)


__all__ = ["INPUTS", "Program", "inputs"]
