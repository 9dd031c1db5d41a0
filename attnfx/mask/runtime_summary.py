"""Summarize the part of a mask that is stored in tensors, whose empty and full tiles are known only at run time.

One pass over these tensors computes the summary. For each grain of GRAIN x GRAIN scores it records whether some score
is live, whether the mask's predicate is false for some score, and whether each row has a live score. A score is live if
the predicate holds and no addend drowns it. The summary has a dim for each of b, h, i and j, of size 1 if the tensors
do not depend on that index: one serves all heads of a mask m[b, i, j], and all rows of a padding mask p[b, j].
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
# bits of a grain: some score is live; the predicate is false for some score; each row has a live score in the grain
LIVE, DEAD, EVERY = 1, 2, 4
LEAST = 1 << 26  # scores: a kernel takes about 100 us for them, the launches of a summary and its lists 10 to 20 us
SHORTEST = 512  # rows and keys: fewer are only a few tiles
SHARED = 4  # heads or passes to share an evaluation of the predicate, a quarter of a kernel's work for a score


@dataclass(frozen=True)
class Summary:
    """The inputs of a mask's summary.

    fixed   the part of the mask that depends only on the indices
    spec    a softmax over dot and the addend, whose mask is the rest; it has only the captures that these read
    slots   the slots of these captures in the whole spec, in the order of `spec`
    names   the whole spec's names of the sizes in `spec`
    """

    fixed: Expr
    spec: AttentionSpec
    slots: tuple[int, ...]
    names: tuple[str, ...]


@lru_cache(maxsize=1024)
def of(spec: AttentionSpec) -> Summary | None:
    """Return the part of a spec's mask to summarize; None if the mask does not read tensors, or reads the scores."""
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


def added(spec: AttentionSpec) -> Expr | None:
    """Return the expression added to dot in `Summary.spec`, or None."""
    score = spec.score.args[1] if spec.score.op == "where" else spec.score
    return None if score is A.DOT else substitute(score, {A.DOT: A.const(0.0)})


def axes(spec: AttentionSpec) -> frozenset[str]:
    """Return the names of the indices on which a `Summary.spec` depends."""
    return spec.score.free


def shape(spec: AttentionSpec, sizes: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Return the summary's shape: batches, heads, grains of rows and of keys, each 1 if all share the values."""
    free = axes(spec)
    counts = [sizes[size] if name in free else 1 for name, size in AXES.items()]
    return (*counts[:2], *(-(-n // GRAIN) for n in counts[2:]))  # type: ignore[return-value]


@dataclass(frozen=True)
class Cost:
    """The cost of one summary.

    evaluations  of the predicate and the addend, about ten instructions each
    read         bytes of the captures that it loads
    written      bytes of the summary itself
    """

    evaluations: int
    read: int
    written: int


def cost(summary: Summary, sizes: Mapping[str, int]) -> Cost:
    """Return the cost of one pass, for all heads and layers that share it. `sizes` has the values of B, H, T, S."""

    def points(free: frozenset[str]) -> int:
        return math.prod(sizes[size] for name, size in AXES.items() if name in free)

    loads = [x for x in walk(summary.spec.score) if x.op == "load"]
    width = {FLOAT: 4, INT: 8}
    read = sum(points(x.free) * width.get(x.kind, 1) for x in loads)
    return Cost(points(axes(summary.spec)), read, math.prod(shape(summary.spec, sizes)))


def worth(spec: AttentionSpec, sizes: Mapping[str, int], passes: int = 1) -> Summary | None:
    """Return the summary if it is cheap next to the flash kernels on any GPU and for any mask values, else None.

    This is for calls outside a graph; in a graph, the cost model decides with more knowledge. `passes` is how many
    kernels use the summary: one, or three if a backward pass follows.
    """
    found = of(spec)
    scores = math.prod(sizes[n] for n in AXES.values())
    if found is None or min(sizes["T"], sizes["S"]) < SHORTEST or scores < LEAST:
        return None
    return found if SHARED * cost(found, sizes).evaluations <= passes * scores else None
