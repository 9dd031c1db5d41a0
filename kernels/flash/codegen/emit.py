"""Generate the source of a module of Triton functions for a spec. The hand-written kernels take them as constants.

    heads(captures, sizes, b, h)                values that depend on b and h alone, a tuple
    rows(captures, sizes, H, b, h, i)           values that depend on i, b and h; H is the result of `heads`
    columns(captures, sizes, H, b, h, j)        values that depend on j, b and h
    score, keep, whole, whole_slope, slope, weight, leaf_scores, leaf_wholes, leaf_weights
        (captures, sizes, H, R, C, dot, prob, b, h, i, j)     values per tile element; R and C from `rows` and `columns`
    extras(captures, sizes, H, R, b, h, i)      extra logits, a tuple

`captures` is a tuple of (pointer, stride, stride, ...), the spec's own first, then tables; a broadcast dim has stride
0. `sizes` is (B, H, T, S, the spec's own sizes, then the lengths of every capture's dims). Each n is encoded as
2 n + 1, because Triton specializes a kernel on integers in a tuple that are 1 or a multiple of 16, and recompiling for
a length is not worth it. `attnfx.kernels.flash.codegen.program.Program` defines the functions' values.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnfx.ir.expr import Expr
from attnfx.kernels.flash.codegen.expressions import COLUMN, HEAD, ROW, TILE, Body, boundary, level, regroup, separate
from attnfx.kernels.flash.codegen.program import Program
from attnfx.spec import AttentionSpec

_SIZES = ("B", "H", "T", "S")
_TILE = "captures, sizes, H, R, C, dot, prob, b, h, i, j"
_HEADER = '''"""{about}"""

import triton
import triton.language as tl

import attnfx.kernels.flash.triton.functions as f
'''


@dataclass(frozen=True)
class Source:
    """The source of a module.

    text   the source text
    names  the functions it defines; functions that the program does not need are absent
    """

    text: str
    names: frozenset[str]


def emit(
    spec: AttentionSpec,
    program: Program,
    wide: frozenset[int] = frozenset(),
    inside: frozenset[int] = frozenset(),
) -> Source:
    """Generate the module of a program. Raise `NotEmitted` if an operation cannot be translated. Captures in `wide` get
    64-bit offsets. Loads from captures in `inside` must be in bounds at all valid indices."""
    return _Emitter(spec, program, wide, inside).source()


class _Emitter:
    def __init__(self, spec: AttentionSpec, program: Program, wide: frozenset[int], inside: frozenset[int]) -> None:
        self.spec, self.program, self.wide, self.inside = spec, program, wide, inside
        self.sizes = {name: f"(sizes[{n}] >> 1)" for n, name in enumerate((*_SIZES, *spec.sizes))}
        dims = [*(c.ndim for c in spec.captures), *(len(t.axes) for t in program.tables)]
        every = [(slot, n) for slot, count in enumerate(dims) for n in range(count)]
        self.lengths = {at: f"(sizes[{n}] >> 1)" for n, at in enumerate(every, len(self.sizes))}
        one = program.softmax
        self.tile: dict[str, list[Expr]] = {}
        some = dict(score=program.score, keep=program.keep, whole=program.whole, whole_slope=program.whole_slope)
        for name, e in some.items():
            if e is not None and (one or name == "keep"):
                self.tile[name] = [e]
        self.tile["slope"] = [program.slope]
        if program.weight is not None and not _is_one(program.weight):
            self.tile["weight"] = [program.weight]
        if program.leaves:
            self.tile["leaf_scores"] = [x.score for x in program.leaves]
            if program.whole is not None:
                self.tile["leaf_wholes"] = [x.whole for x in program.leaves]
            self.tile["leaf_weights"] = [x.weight for x in program.leaves]
        self.tile = {name: [separate(regroup(e)) for e in roots] for name, roots in self.tile.items()}
        self.extras = list(program.extras)
        roots = [e for some in self.tile.values() for e in some]
        outer = boundary(roots, TILE)
        self.rows, self.columns = outer.get(ROW, []), outer.get(COLUMN, [])
        self.heads = list(dict.fromkeys(outer.get(HEAD, [])))
        for at, some in ((ROW, [*self.rows, *self.extras]), (COLUMN, self.columns)):
            below = [e for e in some if level(e) == at]
            for e in boundary(below, at).get(HEAD, []):
                if e not in self.heads:
                    self.heads.append(e)

    def source(self) -> Source:
        about = "\n".join(f"Of the program\n{self.spec}".splitlines())
        parts = [_HEADER.format(about=about.replace("\\", " "))]
        known: dict[Expr, str] = {}
        parts.append(self._function("heads", "captures, sizes, b, h", self.heads, known, True))
        known = {e: f"H[{n}]" for n, e in enumerate(self.heads)}
        parts.append(self._function("rows", "captures, sizes, H, b, h, i", self.rows, known, True))
        parts.append(self._function("columns", "captures, sizes, H, b, h, j", self.columns, known, True))
        names = {"heads", "rows", "columns"}
        known |= {e: f"R[{n}]" for n, e in enumerate(self.rows)}
        if self.extras:
            parts.append(self._function("extras", "captures, sizes, H, R, b, h, i", self.extras, known, True))
            names.add("extras")
        known |= {e: f"C[{n}]" for n, e in enumerate(self.columns)}
        for name, roots in self.tile.items():
            parts.append(self._function(name, _TILE, roots, known, name.startswith("leaf")))
            names.add(name)
        return Source("\n\n".join(parts), frozenset(names))

    def _function(self, name: str, arguments: str, roots: list[Expr], known: dict[Expr, str], as_tuple: bool) -> str:
        body = Body(known, self.sizes, self.lengths, self.wide, self.inside)
        values = body.add(*roots)
        result = f"({', '.join(values)},)" if values else "(0,)"
        lines = [*body.lines, f"return {result if as_tuple else values[0]}"]
        return f"@triton.jit\ndef {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines)


def _is_one(e: Expr) -> bool:
    return e.op == "const" and e.value == 1.0
