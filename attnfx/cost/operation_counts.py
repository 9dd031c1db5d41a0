"""Count the operations per score that a score program adds to the kernel it is inlined in, from the IR."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from attnfx.ir.expr import Expr, walk
from attnfx.mask import mask_of
from attnfx.memory.workspace import scaled_dot
from attnfx.spec import AttentionSpec

# Instructions and special-function results of one operation on a score; an unlisted operation is one instruction.
# Counted from the functions that the kernels' generated programs call (kernels/flash/triton/functions.py).
INSTRUCTIONS = {
    "load": 6, "exp": 2, "exp2": 1, "log": 2, "log2": 1, "recip": 2, "sigmoid": 4, "tanh": 14, "sqrt": 2, "expm1": 9,
    "log1p": 14, "softplus": 18, "sin": 20, "cos": 20, "erf": 20, "atan": 30, "pow": 30, "floordiv": 12, "mod": 13,
    "half": 2, "const": 0, "var": 0, "size": 0, "dot": 0, "prob": 0, "detach": 0,
}  # fmt: skip
SPECIALS = {
    "exp": 1, "exp2": 1, "log": 1, "log2": 1, "recip": 1, "sigmoid": 2, "tanh": 2, "sqrt": 1, "expm1": 1, "log1p": 2,
    "softplus": 3, "sin": 1, "cos": 1, "erf": 1, "atan": 2, "pow": 2,
}  # fmt: skip
# Philox4x32-7 returns four random numbers, for 4 keys: 7 rounds of 2 wide products (4 instructions), 4 xors and 2
# additions; then a comparison and a selection for each key.
DROPOUT = 7 * (4 + 4 + 2) / 4 + 2


@dataclass(frozen=True)
class Operations:
    """Instructions and special-function results per score.

    always, special         in every tile
    masked, masked_special  in addition, in tiles that the mask cuts
    """

    always: float
    special: float
    masked: float
    masked_special: float


@lru_cache(maxsize=1024)
def operations(spec: AttentionSpec) -> Operations:
    """Count the operations of a spec's programs per score. Values that depend on only a row or only a key are computed
    once per tile, so they do not count. A constant factor is part of the exponential's instruction. The mask is tested
    only in tiles that it cuts."""
    mask = mask_of(spec.score) if spec.normaliser == "softmax" else None
    tested = set(_of_scores([mask.keep])) if mask is not None else set()
    rest = [e for e in _of_scores([spec.score, spec.weight]) if e not in tested and not scaled_dot(e)]
    if mask is not None:  # the selection between score and fill counts with the mask
        rest = [e for e in rest if not (e.op == "where" and e.args[0] in tested)]
    gone = DROPOUT if spec.random else 0.0
    return Operations(
        gone + sum(_cost(e) for e in rest), sum(SPECIALS.get(e.op, 0) for e in rest),
        sum(_cost(e) for e in tested) + bool(tested), sum(SPECIALS.get(e.op, 0) for e in tested),
    )  # fmt: skip


def _of_scores(roots: Iterable[Expr]) -> list[Expr]:
    """Return the distinct nodes whose value differs from score to score."""
    found: dict[Expr, None] = {}
    differs: dict[Expr, bool] = {}
    for root in roots:
        for e in walk(root):  # arguments come first
            inside = e.op in ("dot", "prob") or {"i", "j"} <= e.free or any(differs.get(a, False) for a in e.args)
            differs[e] = inside
            if inside:
                found[e] = None
    return list(found)


def _cost(e: Expr) -> float:
    n_ary = len(e.args) - 1 if e.op in ("add", "mul", "and", "or", "min", "max") else 1
    return INSTRUCTIONS.get(e.op, max(n_ary, 1))
