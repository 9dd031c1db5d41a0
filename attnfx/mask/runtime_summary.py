"""The part of a mask that stands in tensors: which tiles it leaves empty or full is known at run time alone.

One pass over those tensors, the summary, says for each grain of GRAIN x GRAIN scores whether some of them is live,
whether the mask's predicate is false for some, and whether each row has a live one. A score is live where the predicate
holds and no addend drowns it. The summary has a dim for b, h, i and j, of size 1 where the tensors do not depend on the
index: one serves all heads of a mask m[b, i, j], and all rows of a padding mask p[b, j].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from attnfx.ir import algebra as A
from attnfx.ir.algebra import substitute
from attnfx.ir.expr import FLOAT, INT, Expr, walk
from attnfx.mask.additive import addend
from attnfx.mask.predicate import kept
from attnfx.spec import AXES, AttentionSpec, canonical

GRAIN = 64  # rows and keys; tiles of the kernels are multiples of it, or divide it
# bits of a grain: some score of it is live; for some the predicate is false; each of its rows has a live score in it
LIVE, DEAD, EVERY = 1, 2, 4
LEAST = 1 << 26  # scores: a kernel takes some 100 us for them, the launches of a summary and its lists 10 to 20
SHORTEST = 512  # rows and keys: less is but a few tiles
SHARED = 4  # heads, or passes, that each evaluation of the predicate must serve: it costs a kernel a quarter of a score


@dataclass(frozen=True)
class Summary:
    """What a summary of a spec's mask is made from.

    fixed   the part of the mask that the indices alone decide
    spec    a softmax whose mask is the rest, over dot and the addend: it has no captures but those that these read
    slots   those captures among the whole spec's, in the order of `spec`
    names   the whole spec's names of the sizes in `spec`
    """

    fixed: Expr
    spec: AttentionSpec
    slots: tuple[int, ...]
    names: tuple[str, ...]


@lru_cache(maxsize=1024)
def of(spec: AttentionSpec) -> Summary | None:
    """What can be summarised of a spec's mask; None where no tensor takes part in it, or the scores do."""
    if not spec.captures:
        return None
    added = addend(spec.score) if spec.normaliser == "softmax" else None
    keep = kept(spec)
    parts = keep.args if keep.op == "and" else (keep,)
    fixed = [e for e in parts if not any(x.op in ("load", "dot", "prob") for x in walk(e))]
    rest = A.and_(*(e for e in parts if e not in fixed))
    if (rest is A.TRUE and added is None) or any(x.op in ("dot", "prob") for x in walk(rest)):
        return None
    score = A.where(rest, A.DOT if added is None else A.add(A.DOT, added), A.const(-math.inf))
    slots = sorted({x.value for x in walk(score) if x.op == "load"})  # type: ignore[type-var]
    made = AttentionSpec(
        score=score,
        captures=tuple((s, replace(spec.captures[s], grad=False)) for s in slots),  # type: ignore[arg-type,index]
    )
    blind, found, names = canonical(made)
    return Summary(A.and_(*fixed), blind, tuple(found), tuple(names))  # type: ignore[arg-type]


def predicate(spec: AttentionSpec) -> Expr:
    """The mask of `Summary.spec`."""
    return spec.score.args[0] if spec.score.op == "where" else A.TRUE


def added(spec: AttentionSpec) -> Expr | None:
    """What is added to dot in `Summary.spec`, if anything is."""
    score = spec.score.args[1] if spec.score.op == "where" else spec.score
    return None if score is A.DOT else substitute(score, {A.DOT: A.const(0.0)})


def axes(spec: AttentionSpec) -> frozenset[str]:
    """The names of the indices that a `Summary.spec` depends on."""
    return spec.score.free


def shape(spec: AttentionSpec, sizes: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Of what is made from a `Summary.spec`: batches, heads, grains of rows and of keys, each 1 where all share it."""
    free = axes(spec)
    counts = [sizes[size] if name in free else 1 for name, size in AXES.items()]
    return (*counts[:2], *(-(-n // GRAIN) for n in counts[2:]))  # type: ignore[return-value]


@dataclass(frozen=True)
class Cost:
    """Of one summary.

    evaluations  of the predicate and the addend, some ten instructions each
    read         bytes of the captures that it loads
    written      bytes of the summary itself
    """

    evaluations: int
    read: int
    written: int


def cost(summary: Summary, sizes: Mapping[str, int]) -> Cost:
    """What the pass takes, once for all heads and layers that share it. `sizes` has numbers for B, H, T, S."""

    def points(free: frozenset[str]) -> int:
        return math.prod(sizes[size] for name, size in AXES.items() if name in free)

    loads = [x for x in walk(summary.spec.score) if x.op == "load"]
    width = {FLOAT: 4, INT: 8}
    read = sum(points(x.free) * width.get(x.kind, 1) for x in loads)
    return Cost(points(axes(summary.spec)), read, math.prod(shape(summary.spec, sizes)))


def worth(spec: AttentionSpec, sizes: Mapping[str, int], passes: int = 1) -> Summary | None:
    """The summary, where it is cheap beside the flash kernels on any GPU, whatever the mask holds; else None. It is for
    calls that stand alone; in a graph, the cost model knows more.

    `passes` is how many kernels walk by it: one, or three where a backward pass follows.
    """
    found = of(spec)
    scores = math.prod(sizes[n] for n in AXES.values())
    if found is None or min(sizes["T"], sizes["S"]) < SHORTEST or scores < LEAST:
        return None
    return found if SHARED * cost(found, sizes).evaluations <= passes * scores else None
