"""The node of the expression IR: one scalar value as a function of indices.

An expression is immutable and interned: equal expressions are the same object, so equality is identity, and memo
tables may be keyed by the expression. Build expressions with the constructors of `attnfx.ir.algebra`, which keep
them in canonical form; nothing else should call `node`.

Kinds: `b` truth values, `i` mathematical integers, `f` floats of the spec's compute type.

    op        value      args            meaning
    const     number     -               a bool, int or float
    var       name       size            an index, 0 <= var < size
    size      name       -               a symbolic size, an integer >= 1
    load      slot       indices         an element of a captured tensor (the slot is a node while lifting)
    dot       -          -               sum_d q[b, h, i, d] * k[b, h', j, d]
    prob      -          -               the normalised weight of (b, h, i, j)
    add, mul  -          terms, factors  n-ary, sorted; a constant comes first
    floordiv, mod        x, y            integers, rounding to minus infinity
    ge0, eq0  -          x               x >= 0, x == 0 for an integer x
    lt, le, eq           x, y            comparisons of floats
    and, or, not         ...             logic
    where     -          c, x, y
    float, int           x               conversions (int truncates)
    half      -          x               rounded to float16 and back: overflow to inf is part of the meaning
    detach    -          x               no gradient flows through
    recip, exp, log, tanh, ...           unary functions of a float, see FLOAT_UNARY
    rsum, rmax           body, size      reduction over the variable called `value`
    aten      op:dtype   x, ...          a float operator kept exactly as PyTorch runs it, constants as Python numbers
    softmax   name, safe body, size, at  (while lifting) softmax of body over the variable `name`, read at `at`
    dropout   p          x               (while lifting) x with probability 1 - p, divided by 1 - p; else zero
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import lru_cache
from weakref import WeakValueDictionary

BOOL, INT, FLOAT = "b", "i", "f"

FLOAT_UNARY = frozenset(
    "recip exp exp2 expm1 log log2 log1p tanh sigmoid sqrt sin cos erf floor ceil round trunc atan softplus".split()
)


class Added(float):
    """The value of a fill that was added to the scores, and not put in their place: it swallows them, but what they are
    made of keeps its gradient. That shows in rows without a live key alone, where a masked weight is not zero."""

    __slots__ = ()


class Expr:
    """One interned node. `free` holds the names of the variables that occur in it and are not bound by a reduction."""

    __slots__ = ("__weakref__", "args", "digest", "free", "kind", "op", "value")
    op: str
    value: object
    args: tuple[Expr, ...]
    kind: str
    digest: bytes
    free: frozenset[str]

    def __repr__(self) -> str:
        from attnfx.ir.serialize import show

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
    """The one expression with these fields. Does not simplify."""
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
    elif op == "softmax":  # only its first operand is under the binder; the others are read outside
        free = (args[0].free - {value[0]}) | args[1].free | args[2].free  # type: ignore[index]
    made.free = free
    with _lock:
        return _interned.setdefault(key, made)


@lru_cache(maxsize=4096)
def walk(root: Expr) -> tuple[Expr, ...]:
    """Every distinct node below and including `root`, operands before their users."""
    seen: set[Expr] = set()
    found: list[Expr] = []
    stack = [(root, False)]
    while stack:
        at, ready = stack.pop()
        if ready:
            found.append(at)
        elif at not in seen:
            seen.add(at)
            stack.append((at, True))
            stack.extend([(a, False) for a in reversed(at.args)])
    return tuple(found)


def rebuild(root: Expr, change: Callable[[Expr, tuple[Expr, ...]], Expr | None]) -> Expr:
    """Rebuild bottom-up through the canonical constructors.

    `change(old, new_args)` gives the replacement of a node, or None to rebuild it from its new operands.
    """
    from attnfx.ir.algebra import make

    done: dict[Expr, Expr] = {}
    for at in walk(root):
        args = tuple(done[a] for a in at.args)
        new = change(at, args)
        if new is None:
            new = at if args == at.args else make(at.op, at.kind, args, at.value)
        done[at] = new
    return done[root]


def substitute(root: Expr, by: dict[Expr, Expr]) -> Expr:
    """Replace each occurrence of a key (any expression) by its value; bound variables are not special."""
    return rebuild(root, lambda old, _: by.get(old)) if by else root
