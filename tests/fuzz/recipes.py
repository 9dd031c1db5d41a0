"""Recipes: descriptions of random programs, each one line that can be printed, replayed and shrunk.

seed=3 train,infer dynamic=auto inner=eager tokens=9 inputs=plain entry=scaled | clamped | attend[mask=biased]@no_grad
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tests.fuzz import beside, edits, regions, whole, writes  # noqa: F401  (the imports register their parts)
from tests.fuzz.attentions import PARTS, PLACES
from tests.fuzz.parts import ATTENTIONS, EDITS, ENTRIES, NEIGHBORS, WRAPS, Neighbor
from tests.fuzz.programs import INPUTS
from tests.fuzz.regions import COARSE_WRAPS, PURE_WRAPS

DYNAMIC = ("no", "all", "marked", "auto")
MODES = (("train",), ("train",), ("infer",), ("train", "infer"))
UNDER_COND = ("library", "library_causal", "without_heads", "with_a_sink", "rotated")


@dataclass(frozen=True)
class Step:
    """One part: a neighbor or an attention, the choices it is built from, and its regions, the innermost first."""

    name: str
    made: tuple[tuple[str, str], ...] = ()
    wraps: tuple[str, ...] = ()

    def __str__(self) -> str:
        inside = f"[{' '.join(f'{k}={v}' for k, v in self.made)}]" if self.made else ""
        return "@".join([self.name + inside, *self.wraps])

    @staticmethod
    def parse(text: str) -> Step:
        name, inside, rest = re.fullmatch(r"(\w+)(?:\[([^\]]*)\])?((?:@\w+)*)", text.strip()).groups()  # type: ignore[union-attr]
        made = tuple(tuple(x.split("=")) for x in (inside or "").split())
        return Step(name, made, tuple(rest.split("@")[1:]))  # type: ignore[arg-type]

    @property
    def attention(self) -> bool:
        return self.name == "attend" or self.name in ATTENTIONS

    def facts(self, fact: str) -> bool:
        found = [EDITS[v] for k, v in self.made if k in PLACES] + [NEIGHBORS[n] for n in (self.name,) if n in NEIGHBORS]
        return any(getattr(n, fact) for n in found)


@dataclass(frozen=True)
class Recipe:
    """A program with its compile options and calls; `seed` determines the tensors' values."""

    seed: int
    steps: tuple[Step, ...]
    modes: tuple[str, ...] = ("train", "infer")
    dynamic: str = "no"
    inner: str = "eager"
    tokens: int = 8
    inputs: str = "plain"
    entry: str = "scaled"

    def __str__(self) -> str:
        how = f"seed={self.seed} {','.join(self.modes)} dynamic={self.dynamic} inner={self.inner}"
        given = f"tokens={self.tokens} inputs={self.inputs} entry={self.entry}"
        return " | ".join([f"{how} {given}", *map(str, self.steps)])

    @staticmethod
    def parse(text: str) -> Recipe:
        """Parse a line. Raise KeyError for an unknown name."""
        first, *steps = text.split(" | ")
        words = first.split()
        named = dict(w.split("=") for w in words if "=" in w)
        modes = next(w for w in words if "=" not in w)
        made = Recipe(
            int(named["seed"]), tuple(map(Step.parse, steps)), tuple(modes.split(",")), named["dynamic"],
            named["inner"], int(named["tokens"]), named["inputs"], named["entry"],
        )  # fmt: skip
        for step in made.steps:
            assert step.name in NEIGHBORS or step.attention, f"{step.name} is no part"
        return made

    @property
    def coarse(self) -> bool:
        """Return whether some of it is computed in less than float32."""
        return any(s.facts("coarse") or COARSE_WRAPS & set(s.wraps) for s in self.steps)

    @property
    def draws(self) -> bool:
        """Return whether it samples other random values in float64."""
        return any(s.facts("draws") for s in self.steps)


def recipe(seed: int, inner: str = "eager", only: str | None = None) -> Recipe:
    """Create a random recipe; `only` names a part that it must contain. With `inner` "mixed", few use aot_eager.

    Recipes that take long to compile, because of symbolic sizes or aot_eager, are rare and short.
    """
    rng = random.Random(seed)
    asked = NEIGHBORS.get(only or "") or EDITS.get(only or "")
    coarse = asked.coarse if asked is not None else only in COARSE_WRAPS or rng.random() < 0.2
    if inner == "mixed":
        inner = "aot_eager" if rng.random() < 0.1 else "eager"
    dynamic = rng.choices(DYNAMIC, (16, 2, 1, 1))[0]
    quick = inner == "eager" and dynamic == "no"
    modes = rng.choice(MODES if quick else MODES[:3])

    def chosen(table: dict[str, Neighbor]) -> str:
        """Choose a part with comparable results: sharp and coarse parts are never in one program."""
        allowed = [n for n in table.values() if (not n.sharp if coarse else not n.coarse)]
        return rng.choices(allowed, [0.2 if n.breaks else 1.0 for n in allowed])[0].name

    attentions = [_attention(rng, lambda: chosen(EDITS)) for _ in range(rng.choice((1, 1, 1, 2 if quick else 1)))]
    neighbors = [Step(chosen(NEIGHBORS)) for _ in range(rng.randint(2, 5 if quick else 3))]
    if only in NEIGHBORS:
        neighbors[0] = Step(only)  # type: ignore[arg-type]
    elif only in ATTENTIONS:
        attentions[0] = Step(only)  # type: ignore[arg-type]
    elif only in EDITS:
        attentions[0] = Step("attend", ((rng.choice(PLACES), only),))  # type: ignore[arg-type]
    steps = [_wrapped(rng, s, coarse, only if only in WRAPS else None) for s in (*attentions, *neighbors)]
    rng.shuffle(steps)
    return Recipe(
        seed, tuple(steps), modes, dynamic=dynamic, inner=inner, tokens=rng.choice((8, 8, 9, 11)),
        inputs=rng.choices(list(INPUTS), [8, *[2] * (len(INPUTS) - 1)])[0], entry=rng.choice(list(ENTRIES)),
    )  # fmt: skip


def _attention(rng: random.Random, edit: Callable[[], str]) -> Step:
    if rng.random() < 0.3:
        return Step(rng.choice(list(ATTENTIONS)))
    made = [(kind, rng.choice(list(parts))) for kind, parts in PARTS.items() if rng.random() < 0.6]
    made = [(kind, name) for kind, name in made if name != next(iter(PARTS[kind]))]
    if rng.random() < 0.4:
        made.append((rng.choice(PLACES), edit()))
    return Step("attend", tuple(made))


def _wrapped(rng: random.Random, step: Step, coarse: bool, only: str | None) -> Step:
    wraps = []
    for _ in range(rng.choices((0, 1, 2), (14, 5, 1))[0]):
        wrap = rng.choices(list(WRAPS), [0.4 if w in PURE_WRAPS else 1.0 for w in WRAPS])[0]
        pure = NEIGHBORS[step.name].pure if step.name in NEIGHBORS else step.name in UNDER_COND
        if (coarse or wrap not in COARSE_WRAPS) and wrap not in wraps and (pure or wrap not in PURE_WRAPS):
            wraps.append(wrap)
    if only is not None and only not in wraps:
        wraps.append(only)
    return replace(step, wraps=tuple(wraps))


def smaller(r: Recipe) -> Iterator[Recipe]:
    """Yield recipes with one element removed, the largest cuts first."""
    for n in range(len(r.steps)):
        yield replace(r, steps=r.steps[:n] + r.steps[n + 1 :])
    for mode in r.modes:
        if len(r.modes) > 1:
            yield replace(r, modes=(mode,))
    for name, plain in (("dynamic", "no"), ("inner", "eager"), ("tokens", 8), ("inputs", "plain"), ("entry", "scaled")):
        if getattr(r, name) != plain:
            yield replace(r, **{name: plain})
    for n, step in enumerate(r.steps):
        less = [replace(step, wraps=step.wraps[:k] + step.wraps[k + 1 :]) for k in range(len(step.wraps))]
        less += [replace(step, made=step.made[:k] + step.made[k + 1 :]) for k in range(len(step.made))]
        if step.name in ATTENTIONS:
            less.append(Step("attend", (), step.wraps))
        for made in less:
            yield replace(r, steps=(*r.steps[:n], made, *r.steps[n + 1 :]))


def shrink(r: Recipe, found: Callable[[Recipe], bool], tries: int = 60) -> Recipe:
    """Drop parts of a recipe as long as `found` confirms the finding, and return the smallest recipe."""
    again = True
    while again and tries > 0:
        again = False
        for less in smaller(r):
            if tries <= 0:
                break
            tries -= 1
            if found(less):
                r, again = less, True
                break
    return r
