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

from attnfx.ir import algebra as A
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
    sizes = {name: f"(sizes[{n}] >> 1)" for n, name in enumerate((*_SIZES, *spec.sizes))}
    dims = [*(c.ndim for c in spec.captures), *(len(t.axes) for t in program.tables)]
    every = [(slot, n) for slot, count in enumerate(dims) for n in range(count)]
    lengths = {at: f"(sizes[{n}] >> 1)" for n, at in enumerate(every, len(sizes))}

    def function(name: str, arguments: str, roots: list[Expr], known: dict[Expr, str], as_tuple: bool = True) -> str:
        body = Body(known, sizes, lengths, wide, inside)
        values = body.add(*roots)
        result = f"({', '.join(values)},)" if values else "(0,)"
        lines = [*body.lines, f"return {result if as_tuple else values[0]}"]
        return f"@triton.jit\ndef {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines)

    tile = {name: [separate(regroup(e)) for e in roots] for name, roots in _of_tile(program).items()}
    outer = boundary([e for roots in tile.values() for e in roots], TILE)
    rows, columns, heads = (outer.get(at, []) for at in (ROW, COLUMN, HEAD))
    for at, some in ((ROW, [*rows, *program.extras]), (COLUMN, columns)):
        heads = [*heads, *boundary([e for e in some if level(e) == at], at).get(HEAD, [])]
    heads = list(dict.fromkeys(heads))
    of_head = {e: f"H[{n}]" for n, e in enumerate(heads)}
    of_row = of_head | {e: f"R[{n}]" for n, e in enumerate(rows)}
    known = of_row | {e: f"C[{n}]" for n, e in enumerate(columns)}
    functions = {
        "heads": function("heads", "captures, sizes, b, h", heads, {}),
        "rows": function("rows", "captures, sizes, H, b, h, i", rows, of_head),
        "columns": function("columns", "captures, sizes, H, b, h, j", columns, of_head),
    }
    if program.extras:
        functions["extras"] = function("extras", "captures, sizes, H, R, b, h, i", list(program.extras), of_row)
    functions |= {name: function(name, _TILE, e, known, name.startswith("leaf")) for name, e in tile.items()}
    about = f"Of the program\n{spec}".replace("\\", " ")
    return Source("\n\n".join([_HEADER.format(about=about), *functions.values()]), frozenset(functions))


def _of_tile(program: Program) -> dict[str, list[Expr]]:
    """Return the values of each function per tile element that the program needs."""
    some = dict(score=program.score, keep=program.keep, whole=program.whole, whole_slope=program.whole_slope)
    found = {name: [e] for name, e in some.items() if e is not None and (program.softmax or name == "keep")}
    found["slope"] = [program.slope]
    if program.weight is not None and program.weight is not A.const(1.0):
        found["weight"] = [program.weight]
    if program.leaves:
        found["leaf_scores"] = [x.score for x in program.leaves]
        if program.whole is not None:
            found["leaf_wholes"] = [x.whole for x in program.leaves]
        found["leaf_weights"] = [x.weight for x in program.leaves]
    return found
