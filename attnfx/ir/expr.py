"""The node of the expression IR: one scalar value as a function of indices.

An expression is immutable and interned: equal expressions are the same object, so equality is identity, and memo
tables may be keyed by the expression. Build expressions with the constructors of `attnfx.ir.algebra`, which keep
them in canonical form; nothing else should call `node`.

Kinds: `b` truth values, `i` mathematical integers, `f` floats of the spec's compute type.

    op        value      args            meaning
    const     constant   -               a bool, int or float
    var       name       size            an index, 0 <= var < size
    size      name       -               a symbolic size, an integer >= 1
    load      slot       indices         an element of a captured tensor (the slot is a node while lifting)
    dot       -          -               sum_d q[b, h, i, d] * k[b, h', j, d]
    prob      -          -               the normalized weight of (b, h, i, j)
    add, mul  -          terms, factors  n-ary, sorted; a constant comes first
    floordiv, mod        x, y            integers, rounding to minus infinity
    ge0, eq0  -          x               x >= 0, x == 0 for an integer x
    lt, le, eq           x, y            comparisons of floats
    and, or, not         ...             logic
    where     -          c, x, y
    float, int           x               conversions (int truncates)
    half      -          x               rounded to float16 and back: overflow to inf is part of the meaning
    detach    -          x               stops the gradient
    recip, exp, log, tanh, ...           unary functions of a float, see FLOAT_UNARY
    rsum, rmax           body, size      reduction over the variable called `value`
    aten      op:dtype   x, ...          a float operator that runs exactly as in PyTorch, constants as Python numbers
    softmax   name, safe body, size, at  (while lifting) softmax of body over the variable `name`, read at `at`
    dropout   p          x               (while lifting) x with probability 1 - p, divided by 1 - p; else zero
"""

from __future__ import annotations

import hashlib
import threading
from functools import lru_cache
from weakref import WeakValueDictionary

from attnfx.ir.reach import postorder

BOOL, INT, FLOAT = "b", "i", "f"

FLOAT_UNARY = frozenset(
    "recip exp exp2 expm1 log log2 log1p tanh sigmoid sqrt sin cos erf floor ceil round trunc atan softplus".split()
)


class Added(float):
    """The value of a fill that was added to the scores instead of replacing them. It swallows the scores, but their
    operands keep a gradient. The difference only shows in rows without a live key: their masked weights are not
    zero."""

    __slots__ = ()


class Expr:
    """One interned node. `free` holds the names of its free variables: those not bound by a reduction."""

    __slots__ = ("__weakref__", "args", "digest", "free", "kind", "op", "value")
    op: str
    value: object
    args: tuple[Expr, ...]
    kind: str
    digest: bytes
    free: frozenset[str]

    def __repr__(self) -> str:
        return show(self)

    def __reduce__(self):
        return node, (self.op, self.kind, self.args, self.value)

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self


_interned: WeakValueDictionary[tuple, Expr] = WeakValueDictionary()
_lock = threading.Lock()
_NONE: frozenset[str] = frozenset()


def node(op: str, kind: str, args: tuple[Expr, ...] = (), value: object = None) -> Expr:
    """Return the interned expression with these fields, without simplifying it."""
    # 0.0 and -0.0, 1 and True are equal as keys, and must not be merged
    key = (op, kind, args, (type(value), repr(value)) if isinstance(value, (float, bool)) else value)
    found = _interned.get(key)
    if found is not None:
        return found
    made = Expr.__new__(Expr)
    made.op, made.kind, made.args, made.value = op, kind, args, value
    text = f"{op}|{kind}|{value!r}|".encode()
    made.digest = hashlib.blake2b(text + b"".join(a.digest for a in args), digest_size=12).digest()
    free = _NONE.union(*(a.free for a in args)) if args else _NONE
    if op == "var":
        free = free | {str(value)}
    elif op in ("rsum", "rmax"):
        free = free - {str(value)}
    elif op == "softmax":  # binds its variable in the first operand only
        free = (args[0].free - {value[0]}) | args[1].free | args[2].free  # type: ignore[index]
    made.free = free
    with _lock:
        return _interned.setdefault(key, made)


@lru_cache(maxsize=4096)
def walk(root: Expr) -> tuple[Expr, ...]:
    """Return every distinct node of `root`, itself included, operands before their users."""
    return tuple(postorder([root], lambda e: e.args))


_INFIX = {"add": " + ", "mul": " * ", "and": " and ", "or": " or ", "floordiv": " // ", "mod": " % ",
          "lt": " < ", "le": " <= ", "eq": " == "}  # fmt: skip


def show(e: Expr, names: dict[object, str] | None = None) -> str:
    """Format an expression as one line of infix text; `names` maps captures to readable names."""
    names = names or {}
    done: dict[Expr, str] = {}
    for at in walk(e):
        done[at] = _show(at, done, names)
    return done[e]


def _show(e: Expr, done: dict[Expr, str], names: dict[object, str]) -> str:
    def inner(a: Expr) -> str:
        text = done[a]
        return f"({text})" if a.op in _INFIX or a.op in ("ge0", "eq0", "not") else text

    if e.op == "const":
        value = e.value
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if e.op in ("var", "size"):
        return str(e.value)
    if e.op in ("dot", "prob"):
        return e.op
    if e.op == "load":
        slot = names.get(e.value, f"c{e.value}" if isinstance(e.value, int) else str(e.value))
        return f"{slot}[{', '.join(done[a] for a in e.args)}]"
    if e.op in _INFIX:
        return _INFIX[e.op].join(inner(a) for a in e.args).replace("+ -", "- ")
    if e.op in ("ge0", "eq0"):
        return f"{inner(e.args[0])} {'>=' if e.op == 'ge0' else '=='} 0"
    if e.op == "not":
        return f"not {inner(e.args[0])}"
    if e.op in ("rsum", "rmax"):
        return f"{e.op[1:]}_{e.value}({done[e.args[0]]})"
    name = str(e.value).split(":")[0] if e.op == "aten" else e.op
    return f"{name}({', '.join(done[a] for a in e.args)})"
