"""Row programs: straight-line ATen calls that compute some rows of a result from the same rows of the inputs.

A row program is the serializable form of a region of a graph whose rows are independent of each other, as proven by
`passes/lift/row_rules.py`. `kernels/rows/run.py` runs it chunk by chunk. Values are numbered: first the inputs, then
the result of each call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Ref:
    """An argument that is not a constant.

    "value" n         value number n
    "size" n          integer number n among the sizes passed to the call
    "number" n        value number n, a tensor of one element, as a Python number
    "rows" 0          number of rows in the chunk
    "start" n         first row of the chunk, plus the constant n
    "columns" 0       number of keys in the chunk
    "corner" n        first row of the chunk minus its first key, plus the constant n
    "dtype" "int64"   a dtype; likewise "device", "layout", "memory_format"
    """

    kind: str
    what: int | str


@dataclass(frozen=True)
class Call:
    """One call: `op` is an ATen overload such as "topk.default", or "getitem", or "dropout" (input, probability)."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Result:
    """A result of the program.

    value  its number
    row    the dimension of its rows; None if it is a sum over all rows
    shape  the shape of the whole result: integers, and Ref of a size or the rows
    dtype  its dtype
    order  its dimensions by stride, the largest first; empty for contiguous
    """

    value: int
    row: int | None
    shape: tuple[int | Ref, ...]
    dtype: str
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Live:
    """The keys that a chunk takes.

    columns  the dimension of the keys in each input, or None
    score    where(a key may be live, 0, -inf) over row i and key j, as JSON
    least    the fewest keys of a chunk
    """

    columns: tuple[int | None, ...]
    score: str
    least: int


@dataclass(frozen=True)
class RowProgram:
    """The calls that compute a chunk of rows.

    inputs   the dimension of the rows in each input, or None: every chunk reads the whole input
    grads    whether each input takes a gradient
    weight   elements of the largest value, for one row
    compiled whether a chunk's calls run as one compiled function
    live     the keys that a chunk takes; None: all
    """

    inputs: tuple[int | None, ...]
    grads: tuple[bool, ...]
    weight: int | Ref
    calls: tuple[Call, ...]
    results: tuple[Result, ...]
    compiled: bool = False
    live: Live | None = None

    @property
    def random(self) -> bool:
        return any(c.op == "dropout" for c in self.calls)

    def to_json(self) -> str:
        return json.dumps(
            {
                "inputs": self.inputs,
                "grads": self.grads,
                "weight": _plain(self.weight),
                "calls": [[c.op, _plain(c.args), {k: _plain(v) for k, v in c.kwargs}] for c in self.calls],
                "results": [[r.value, r.row, _plain(r.shape), r.dtype, r.order] for r in self.results],
                "compiled": self.compiled,
                "live": self.live and [self.live.columns, self.live.score, self.live.least],
            },
            separators=(",", ":"),
        )

    def __str__(self) -> str:
        first = len(self.inputs)
        lines = [f"v{n} = input along {d}" if d is not None else f"v{n} = input" for n, d in enumerate(self.inputs)]
        for n, c in enumerate(self.calls, first):
            shown = [_text(a) for a in c.args] + [f"{k}={_text(v)}" for k, v in c.kwargs]
            lines.append(f"v{n} = {c.op}({', '.join(shown)})")
        return "\n".join(lines + [_returned(r) for r in self.results])


@lru_cache(maxsize=512)
def from_json(text: str) -> RowProgram:
    """Parse the text of `RowProgram.to_json`. Raises ValueError for any other text."""
    try:
        d = json.loads(text)
        calls = [
            Call(op, _made(args), tuple((k, _made(v)) for k, v in named.items())) for op, args, named in d["calls"]
        ]
        results, live = (Result(*_made(r)) for r in d["results"]), d["live"] and Live(*_made(d["live"]))
        inputs, grads, weight = (_made(d[name]) for name in ("inputs", "grads", "weight"))
        return RowProgram(inputs, grads, weight, tuple(calls), tuple(results), d["compiled"], live)
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"the text is not a row program: {problem!r}") from problem


def _plain(x: Any) -> Any:
    if isinstance(x, Ref):
        return {x.kind: x.what}
    return [_plain(a) for a in x] if isinstance(x, list | tuple) else x


def _made(x: Any) -> Any:
    if isinstance(x, dict):
        ((kind, what),) = x.items()
        return Ref(kind, what)
    return tuple(_made(a) for a in x) if isinstance(x, list) else x


def _returned(r: Result) -> str:
    return f"return v{r.value}, summed up" if r.row is None else f"return v{r.value} along {r.row}"


def _text(x: Any) -> str:
    if isinstance(x, Ref):
        return {"value": f"v{x.what}", "size": f"s{x.what}", "rows": "rows", "columns": "columns"}.get(
            x.kind, f"{x.kind}:{x.what}"
        )
    return f"[{', '.join(map(_text, x))}]" if isinstance(x, tuple) else repr(x)
