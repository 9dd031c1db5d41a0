"""The spec: a frozen, hashable, serializable description of one attention."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache

from attnfx.ir import algebra as A
from attnfx.ir.algebra import rebuild
from attnfx.ir.expr import Expr, show, walk
from attnfx.ir.serialize import dump, parse

VERSION = 1  # of the serialized form and of its meaning to the operators; part of every spec, so of every cache key

UNKNOWN_SIZE = 1024  # value assumed for a symbolic size without an example

AXES = {"b": "B", "h": "H", "i": "T", "j": "S"}  # the program's variables and the sizes that bound them
B, H, I, J = (A.var(name, A.size(extent)) for name, extent in AXES.items())


@dataclass(frozen=True)
class Capture:
    """A tensor that the program loads from.

    kind  the kind of its elements: "f" for floats, "i" for integers, "b" for bools
    ndim  its number of dims
    grad  whether its gradient may be needed; a float capture that needs none in this graph has False
    """

    kind: str
    ndim: int
    grad: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """One attention as a program.

        out[b, h, i, :] = sum_j  weight( normalize_j( score(b, h, i, j) ) ) * v[b, h // (H // G), j, :]
        dot(b, h, i, j) = sum_d  q[b, h, i, d] * k[b, h // (H // G), j, d]

    with q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv), G a divisor of H. Sizes are not part of a spec: they come with
    the tensors and, if the program names other sizes, with the operator's `sizes`.

    score        program over `dot`, the variables b, h, i, j and loads; its value is the normalizer's input
    normaliser   "softmax" over j, or "none": the weight program then takes the score itself
    extra        logits in the softmax without a value (sinks; off-by-one is the logit 0.0); independent of j
    weight       program over `prob`, the normalized value: head masks, masks after the softmax, sigmoid of a score
    dropout      probability that a weight becomes zero; the others are divided by 1 - dropout
    safe         whether a row without a live key (all scores -inf) is zero, as in PyTorch's own operator, or NaN
    compute      "float32" or "float64": the type of the accumulation and of the program
    out_dtype    dtype of the result; its name without "torch."
    captures     a `Capture` for each tensor that the programs load from; a load names it by its index here
    sizes        names of the program's symbolic sizes beyond B, H, T, S; each call passes their values
    version      of the serialized form and its meaning: the operator refuses the text of any other version
    """

    score: Expr = A.DOT
    normaliser: str = "softmax"
    extra: tuple[Expr, ...] = ()
    weight: Expr = A.PROB
    dropout: float = 0.0
    safe: bool = False
    compute: str = "float32"
    out_dtype: str = "float32"
    captures: tuple[Capture, ...] = ()
    sizes: tuple[str, ...] = ()
    version: int = field(default=VERSION)

    @property
    def programs(self) -> tuple[Expr, ...]:
        """Return all programs: the score, the weight, then the extra logits."""
        return (self.score, self.weight, *self.extra)

    @property
    def random(self) -> bool:
        """Return whether the result depends on a seed: whether there is dropout."""
        return self.dropout > 0.0

    def to_json(self) -> str:
        """Serialize to the text that the operator takes and `attnfx.spec.from_json` reads."""
        data = dict(
            version=self.version, programs=dump(list(self.programs)), normaliser=self.normaliser, dropout=self.dropout,
            safe=self.safe, compute=self.compute, out_dtype=self.out_dtype, sizes=self.sizes,
            captures=[(c.kind, c.ndim, c.grad) for c in self.captures],
        )  # fmt: skip
        return json.dumps(data, separators=(",", ":"), sort_keys=True)

    def __str__(self) -> str:
        lines = [f"score   {show(self.score)}"]
        if self.extra:
            lines.append("extra   " + ", ".join(show(e) for e in self.extra))
        if self.normaliser != "softmax":
            lines.append(f"norm    {self.normaliser}")
        if self.weight is not A.PROB:
            lines.append(f"weight  {show(self.weight)}")
        if self.dropout:
            lines.append(f"dropout {self.dropout:g}")
        return "\n".join(lines)


@lru_cache(maxsize=1024)
def from_json(text: str) -> AttentionSpec:
    """Parse the text of `AttentionSpec.to_json`. Raises ValueError for any other text and for another version's."""
    data = json.loads(text)
    if not isinstance(data, dict) or "version" not in data:
        raise ValueError("the text is not an attention spec")
    if data.pop("version") != VERSION:
        raise ValueError(f"the attention spec has another version than {VERSION}; compile the model again")
    score, weight, *extra = parse(data.pop("programs"))
    data["captures"] = tuple(Capture(*c) for c in data["captures"])
    data["sizes"] = tuple(data["sizes"])
    return AttentionSpec(score=score, weight=weight, extra=tuple(extra), **data)


@lru_cache(maxsize=1024)
def reads_pairs(spec: AttentionSpec) -> bool:
    """Return whether each score loads a value from memory: a mask or bias by row and key, or by their distance."""
    some = (e for root in spec.programs for e in walk(root))
    return any(e.op in ("load", "aten") and {"i", "j"} <= e.free for e in some)


def additive(score: Expr) -> tuple[float | Expr, Expr, Expr | None] | None:
    """Decompose score = where(keep, scale * dot + bias, fill) into (scale, bias, keep); None if it has another form.

    `bias` does not depend on dot; `keep=None` means unmasked. The scale is a constant, or an expression free of
    b, h, i and j (a scalar or a load). The fill is drowning: `fill_of(score)`.
    """
    keep = None
    if fill_of(score) is not None:
        keep, score = score.args[0], score.args[1]
        if A.DOT in walk(keep):
            return None
    scale: float | Expr | None = None
    bias: list[Expr] = []
    for term in score.args if score.op == "add" else (score,):
        if A.DOT not in walk(term):
            bias.append(term)
            continue
        factors = term.args if term.op == "mul" else (term,)
        if scale is not None or A.DOT not in factors:
            return None
        factor = A.mul(A.const(1.0), *(f for f in factors if f is not A.DOT))
        if AXES.keys() & factor.free or A.DOT in walk(factor):
            return None
        scale = float(factor.value) if factor.op == "const" else factor  # type: ignore[arg-type]
    return None if scale is None else (scale, A.add(*bias) if bias else A.const(0.0), keep)


def fill_of(score: Expr) -> float | None:
    """Return the drowning constant of masked scores, or None."""
    if score.op == "where" and A.drowning(score.args[2]):
        return float(score.args[2].value)  # type: ignore[arg-type]
    return None


def loads(spec: AttentionSpec) -> list[Expr]:
    """Return the distinct loads of the spec's programs."""
    return list(dict.fromkeys(e for program in spec.programs for e in walk(program) if e.op == "load"))


def canonical(spec: AttentionSpec) -> tuple[AttentionSpec, list[object], list[str]]:
    """Number the capture slots and name the symbolic sizes independently of their origin.

    Takes a spec whose loads have any hashable slots and whose `captures` holds (slot, Capture) pairs. Returns the spec
    with slots 0.. and sizes n0.., the old slots in that order, and the old names of the sizes in that order.
    """
    by_slot: dict[object, Capture] = dict(spec.captures)  # type: ignore[arg-type]
    blind: dict[Expr, Expr] = {}

    def anonymous(old: Expr, args: tuple[Expr, ...]) -> Expr:
        if old.op == "load":
            capture = by_slot[old.value]
            new = A.load(f"{capture.kind}{capture.ndim}", args, old.kind)
        elif old.op == "size" and old.value not in AXES.values():
            new = A.size("n")
        else:
            new = A.make(old.op, old.kind, args, old.value)
        return blind.setdefault(old, new)

    for program in spec.programs:
        rebuild(program, anonymous)
    slots: dict[object, int] = {}
    sizes: dict[str, str] = {}
    # order by the surrounding expression, not by origin; ties are interchangeable
    for e in sorted((e for e in blind if e.op in ("load", "size")), key=lambda e: blind[e].digest):
        if e.op == "load":
            slots.setdefault(e.value, len(slots))
        elif e.value not in AXES.values():
            sizes.setdefault(str(e.value), f"n{len(sizes)}")

    def rename(old: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if old.op == "load":
            return A.load(slots[old.value], args, old.kind)
        if old.op == "size" and old.value in sizes:
            return A.size(sizes[str(old.value)])
        return None

    new = [rebuild(p, rename) for p in spec.programs]
    captures = tuple(by_slot[s] for s in slots)
    result = replace(
        spec, score=new[0], weight=new[1], extra=tuple(new[2:]), captures=captures, sizes=tuple(sizes.values())
    )
    return result, list(slots), list(sizes)
