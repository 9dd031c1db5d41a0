"""Find the rows of its operands that an operator needs for given rows of its result: dimension analysis of whole rows.

`split(at, row, extent)` returns the call that computes some rows of a result, which lie along its dimension `row` of
size `extent`. In the call, an operand is `Along(node, dim)` if the same rows of it are enough. It is the node itself if
it lacks these rows and every row reads all of it. `split` raises `NotSeparable` if the operator mixes rows, changes
their order, or is unknown. With `keys`, another dimension and its size, the call computes some rows at some keys, and
an operand may be `Along(node, dim, keys)`. With NONE as the row, the operator sums over the rows: the call computes
the part of some rows.

A rule tells where each dimension of the result lies in the operands. Operators that PyTorch tags as pointwise, and
operators with an index map in VIEWS, need no rule. Operators without either are not known to keep rows separate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.analysis import is_random, written_operands
from attnfx.passes.fx.einsum import MULTIPLYING, einsum, of_matrices
from attnfx.passes.fx.nodes import Opaque, Product, dims, is_tensor, label, op_name, shape, value, where_in_source
from attnfx.passes.lift.access import variables
from attnfx.passes.lift.indexing import by_mask
from attnfx.passes.lift.tables import VIEWS, rule
from attnfx.spec.rows import Ref

NONE = -1  # no dimension
ROWS, COLUMNS = Ref("rows", 0), Ref("columns", 0)
OPERANDS = ("self", "input", "tensors", "index", "indices", "src")  # arguments that have the rows of the result
Dims = Collection[int]


class NotSeparable(Exception):
    """The rows cannot be computed one by one; the message gives the reason, and `node` the operator, if any. `cause` is
    the operator to change, if it is another one. `facts` are others that the advice needs."""

    def __init__(self, message: str, node: Node | None = None, cause: Node | None = None, **facts: object):
        super().__init__(message)
        self.node, self.cause, self.facts = node, cause or node, facts


@dataclass(frozen=True)
class Along:
    """The rows of a node, which lie along `dim`, restricted to a chunk's keys along `keys`. NONE stands for all rows or
    all keys; only in a call for some keys does an operand have all rows."""

    node: Node
    dim: int
    keys: int = NONE


@dataclass(frozen=True)
class Made:
    """A call that computes some rows; `op` is its name in a row program."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def operands(self) -> list[Along]:
        """Return the operands that the call reads, also the numbers; a bare node is read as a whole."""
        out: list[Along] = []

        def visit(x: Any) -> Any:
            if isinstance(x, Along | Node):
                out.append(x if isinstance(x, Along) else Along(x, NONE))
            return x

        map_aggregate((self.args, dict(self.kwargs)), visit)
        return out


class Use:
    """An operator in use, with the dimensions of its result that are `asked` for (the rows, then perhaps the keys) and
    their sizes; `given` holds its arguments by name, for a rule to change."""

    def __init__(self, at: Node, asked: Mapping[int, Expr]):
        self.at, self.asked = at, asked
        schema = at.target._schema.arguments  # type: ignore[union-attr]
        self.defaults = {a.name: a.default_value for a in schema}
        self.given: dict[str, Any] = {a.name: x for a, x in zip(schema, at.args)} | dict(at.kwargs)
        self.op = f"{at.target._overloadpacket.__name__}.{at.target._overloadname}"  # type: ignore[union-attr]
        self.positional = set(list(self.given)[: len(at.args)])

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, self.defaults.get(name))

    def rank(self) -> int:
        return len(shape(self.at))

    def source(self) -> Node:
        """Return the first operand."""
        x = next(iter(self.given.values()))
        return x[0] if isinstance(x, list | tuple) else x

    def named(self, rank: int | None = None) -> list[int]:
        """Return the dimensions that `dim` names, counted from the front; refuse an operator over all dimensions."""
        which = self["dims"] if "dims" in self.defaults else self["dim"]
        which = which if isinstance(which, list | tuple) else [which]
        if not which or None in which:
            raise self.refuse("works over all dimensions, including the rows")
        rank = len(shape(self.source())) if rank is None else rank
        return [int(d) % max(rank, 1) for d in which]

    def read(self, x: Node, where: Mapping[int, int]) -> Along | Node:
        """Return the part of an operand that the call reads. `where` maps dimensions of the result to the operand's; an
        operand of size 1 is broadcast."""
        found = [self._place(x, where.get(d, NONE), extent) for d, extent in self.asked.items()]
        return x if set(found) == {NONE} else Along(x, *found)

    def _place(self, x: Node, dim: int, extent: Expr) -> int:
        if dim == NONE or dims(x)[dim] is extent:
            return dim
        if dims(x)[dim] is A.ONE:
            return NONE
        raise self.refuse(f"reads {label(x)}, which has another number of rows")

    def broadcast(self, x: Any) -> Any:
        """Return the part of an operand that is aligned with the result from the last dimension on."""
        if not is_tensor(x):
            return x
        missing = self.rank() - len(shape(x))
        return self.read(x, {d: d - missing for d in self.asked if d >= missing})

    def apart(self, gone: Dims, new: Dims, why: str = "works along the rows", names: Sequence[str] = OPERANDS) -> None:
        """Read the operands whose dimensions lie in the result in the same order, apart from the operands' `gone` and
        the result's `new` dimensions. `why` refuses rows along a new dimension."""
        if any(d in new for d in self.asked):
            raise self.refuse(why)

        def read(x: Any) -> Any:
            if not is_tensor(x):
                return x
            kept = [d for d in range(len(shape(x))) if d not in gone]
            left = [d for d in range(len(kept) + len(new)) if d not in new]
            where = dict(zip(left, kept))
            if any(d not in where or dims(x)[where[d]] is not extent for d, extent in self.asked.items()):
                raise self.refuse(f"reads {label(x)}, which has another number of rows")
            return self.read(x, where)

        for name in self.given:
            if name in names:
                self.given[name] = map_aggregate(self.given[name], read)

    def made(self) -> Made:
        for name in ("size", "shape"):
            if isinstance(self[name], list | tuple):
                refs = dict(zip(self.asked, (ROWS, COLUMNS)))
                self.given[name] = [refs.get(d, n) for d, n in enumerate(self[name])]
        args = tuple(v for k, v in self.given.items() if k in self.positional)
        return Made(self.op, args, {k: v for k, v in self.given.items() if k not in self.positional})

    def refuse(self, why: str) -> NotSeparable:
        return NotSeparable(f"{label(self.at)} {why}")


RULES: dict[str, Callable[[Use], None]] = {}


def split(at: Node, row: int, extent: Expr, keys: tuple[int, Expr] | None = None) -> Made:
    """Return the call that computes some rows of a result, as the module's docstring describes."""
    asked = {row: extent} if keys is None else {row: extent, keys[0]: keys[1]}
    try:
        return _split(at, asked)
    except NotSeparable as problem:
        place = where_in_source(at)
        raise NotSeparable(f"{problem} ({place})" if place else str(problem), at) from None


def _split(at: Node, asked: Mapping[int, Expr]) -> Made:
    name = op_name(at)
    if name == "getitem":
        return _result_of_tuple(at, list(asked))
    if not isinstance(at.target, torch._ops.OpOverload) or at.target.namespace != "aten":
        raise NotSeparable(f"{label(at)} is not known to keep rows separate")
    if written_operands(at):
        raise NotSeparable(f"{name} writes in place")
    sums = name in (*MULTIPLYING, "sum") or (name == "linalg_vector_norm" and at.args[1:2] == (1,))
    if NONE in asked and not sums:
        raise NotSeparable(f"{name} does not sum over the rows")
    use = Use(at, asked)
    if name in RULES:
        RULES[name](use)
    elif torch.Tag.pointwise in at.target.tags and not is_random(at.target) and is_tensor(at):
        _pointwise(use)
    elif name in VIEWS:
        _view(use)
    else:
        raise NotSeparable(f"{name} is not known to keep rows separate")
    return use.made()


def _result_of_tuple(at: Node, places: list[int]) -> Made:
    source, number = at.args
    if op_name(source) == "unbind":  # type: ignore[arg-type]
        (gone,) = Use(source, {}).named()  # type: ignore[arg-type]
        places = [d + (d >= gone) for d in places]
    return Made("getitem", (Along(source, *places), number), {})  # type: ignore[arg-type]


# -- pointwise operators ---------------------------------------------------------------------------
@rule(RULES, "to", "_to_copy", "detach", "__and__", "__or__", "floor_divide", "where",
      "masked_fill", "zeros_like", "ones_like", "full_like", "true_divide", "subtract", "multiply", "divide", "greater",
      "greater_equal", "less", "less_equal", "not_equal", "square", "float_power", "clip", "log_sigmoid", "fix",
      "absolute", "negative", "leaky_relu", "_prelu_kernel", "expand", "expand_as", "broadcast_to")  # fmt: skip
def _pointwise(use: Use) -> None:
    for name, x in use.given.items():
        if name != "other" or not use.op.startswith("to."):
            use.given[name] = map_aggregate(x, use.broadcast)


@rule(RULES, "type_as")
def _type_as(use: Use) -> None:
    use.op = "to.dtype"
    use.given = {"self": use.broadcast(use["self"]), "dtype": value(use.at).dtype}


@rule(RULES, "dropout")
def _dropout(use: Use) -> None:
    x, p, training = use.broadcast(use["input"]), use["p"], use["train"]
    if not isinstance(p, int | float) or not isinstance(training, bool):
        raise use.refuse("has a probability that is not a number")
    if training and p > 0:
        use.op, use.given = "dropout", {"input": x, "p": float(p)}
    else:
        use.op, use.given = "alias.default", {"input": x}


# -- along other dimensions than the rows ---------------------------------------------------------
@rule(RULES, "softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp",
      "cummax", "cummin", "sort", "argsort", "topk", "flip", "roll", "gather", "scatter", "scatter_add",
      "take_along_dim", "cat", "concat", "concatenate", "split", "split_with_sizes", "chunk", "unbind",
      "tensor_split", "slice_scatter")  # fmt: skip
def _keeps_shape(use: Use) -> None:
    along = use.named()
    use.apart(along, along)


@rule(RULES, "index_fill", "index_copy", "index_add")
def _indexed_write(use: Use) -> None:
    along = use.named()
    use.apart(along, along, "writes some of the rows", ["self", "source"])


@rule(RULES, "select_scatter")
def _select_scatter(use: Use) -> None:
    (along,) = use.named()
    if along in use.asked:
        raise use.refuse("writes one of the rows")
    use.given["self"] = use.read(use["self"], {d: d for d in use.asked})
    use.given["src"] = use.read(use["src"], {d: d - (d > along) for d in use.asked})


@rule(RULES, "sum", "mean", "amax", "amin", "max", "min", "logsumexp", "prod", "var", "std", "var_mean", "std_mean",
      "norm", "linalg_vector_norm", "any", "all", "argmax", "argmin", "median", "mode", "kthvalue", "count_nonzero",
      "nansum", "nanmean", "aminmax")  # fmt: skip
def _reduces(use: Use) -> None:
    if use.op in ("max.other", "min.other"):
        return _pointwise(use)
    gone = use.named()
    if NONE in use.asked:
        if len(gone) != 1:
            raise use.refuse("sums over other dimensions than the rows")
        use.given["self"] = use.read(use["self"], {NONE: gone[0]})
        return None
    use.apart(gone, gone if use["keepdim"] else ())


@rule(RULES, "layer_norm", "native_layer_norm", "rms_norm")
def _layer_norm(use: Use) -> None:
    rank = len(shape(use["input"]))
    last = range(rank - len(use["normalized_shape"]), rank)
    use.apart(last, last)


@rule(RULES, "batch_norm")
def _batch_norm(use: Use) -> None:
    if use["training"] is not False or use["running_mean"] is None:
        raise use.refuse("combines rows in training")
    use.apart([1], [1], "has a separate factor for each row")


@rule(RULES, "conv1d", "conv2d", "conv3d")
def _convolution(use: Use) -> None:
    """Accept a kernel of one element along the rows."""
    rank, weight = use.rank(), use["weight"]
    mixed = {0, 1}
    for name, plain in ("stride", (1,)), ("padding", (0, "valid", "same")):
        given = use[name] if isinstance(use[name], list | tuple) else [use[name]]
        mixed |= {d for d in range(2, rank) if given[d - 2 if len(given) > 1 else 0] not in plain}
    mixed |= {d for d, size in enumerate(dims(weight)) if size is not A.ONE}
    if len(shape(use["input"])) != len(shape(weight)):
        raise use.refuse("combines rows")
    use.apart(mixed, mixed, "combines rows")


@rule(RULES, "constant_pad_nd", "pad")
def _pad(use: Use) -> None:
    if use["mode"] not in (None, "constant"):
        raise use.refuse("is not known to keep rows separate")
    padded = {use.rank() - 1 - n // 2 for n, width in enumerate(use["pad"]) if width != 0}
    use.apart(padded, padded, "pads the rows")


@rule(RULES, "tril", "triu")
def _triangle(use: Use) -> None:
    """Move the diagonal to the first row of a chunk, or to its first row and key."""
    diagonal, last = use["diagonal"], use.rank() - 1
    row, *keys = use.asked
    if row == last or not isinstance(diagonal, int):
        raise use.refuse("has rows along its last dimension, or a diagonal that is not a number")
    if any(d >= last - 1 and (row, d) != (last - 1, last) for d in keys):
        raise use.refuse("has keys along its last dimensions, but not rows")
    use.apart((), ())
    if row == last - 1:
        use.given["diagonal"] = Ref("corner" if last in keys else "start", diagonal)


# -- products --------------------------------------------------------------------------------------
@rule(RULES, *MULTIPLYING, "cdist", "_cdist_forward")
def _product(use: Use) -> None:
    given = [name for name, x in use.given.items() if is_tensor(x)]
    try:
        slot = use.at if NONE in use.asked else Product(use.at)  # an added tensor is not a sum over rows
        product = of_matrices([use[x] for x in given], True) if "cdist" in use.op else einsum(slot)
    except Opaque:
        raise use.refuse("does not name each dimension once") from None
    places = {c: d for d, c in enumerate(product.out)}
    if NONE in use.asked:
        summed = {c for term in product.terms for c in term if c not in places}
        if len(summed) != 1:
            raise use.refuse("sums over other dimensions than the rows")
        places[summed.pop()] = NONE
    read = [
        use.read(x, {places[c]: d for d, c in enumerate(term) if c in places})
        for x, term in zip(product.operands, product.terms)
    ]
    if "tensors" in use.given:
        use.given["tensors"] = read
    else:
        factors = given[:2] if "bias" in use.defaults else given[-2:]
        use.given |= zip(factors, read)
        use.given |= {name: use.broadcast(use[name]) for name in given if name not in factors}


@rule(RULES, "embedding")
def _embedding(use: Use) -> None:
    use.apart((), [use.rank() - 1], "takes its rows from the weight")


# -- views ----------------------------------------------------------------------------------------
def _view(use: Use) -> None:
    """Derive the rule of an operator from its index map: the rows stay one dimension of the operand."""
    place = variables(use.at)
    try:
        x, index = VIEWS[op_name(use.at)](use.at, place)
    except Opaque:
        raise use.refuse("is not known to keep rows separate") from None
    for d in use.asked:
        if [e for e in index if place[d].value in e.free] != [place[d]]:
            raise use.refuse("changes the order or the number of the rows")
    use.given[next(iter(use.given))] = use.read(x, {d: index.index(place[d]) for d in use.asked})


@rule(RULES, "view", "reshape", "_unsafe_view", "flatten", "view_as", "reshape_as")
def _reshape(use: Use) -> None:
    if "dtype" in use.defaults:
        raise use.refuse("reinterprets the bits as another dtype")
    _view(use)
    if "other" in use.given:
        use.given["other"] = use.broadcast(use["other"])
    elif "start_dim" not in use.defaults:
        use.op = "reshape.default"


@rule(RULES, "stack")
def _stack(use: Use) -> None:
    use.apart((), use.named(use.rank()), "creates the dimension of the rows")


@rule(RULES, "one_hot")
def _one_hot(use: Use) -> None:
    if use["num_classes"] == -1:
        raise use.refuse("is not known to keep rows separate")
    use.apart((), [use.rank() - 1], "creates the dimension of the rows")


@rule(RULES, "squeeze")
def _squeeze(use: Use) -> None:
    """Name the dimensions, because in a chunk of one row, squeeze would drop the rows too."""
    have = dims(use["self"])
    gone = [d for d in (use.named() if "dim" in use.defaults else range(len(have))) if have[d] is A.ONE]
    use.apart(gone, ())
    use.op, use.given["dim"] = "squeeze.dims", gone


@rule(RULES, "slice", "narrow", "index_select", "repeat_interleave")
def _part(use: Use) -> None:
    along, end = use.named(), use["end"]
    if use.op == "slice.Tensor" and use["start"] in (None, 0) and use["step"] in (None, 1):
        if end is None or (isinstance(end, int) and end >= 1 << 60):
            along, use.given["end"] = [], None
    use.apart(along, along, "selects some of the rows", ["self"])


@rule(RULES, "index")
def _index(use: Use) -> None:
    """Separate x[:, i, j]: the indices' own dimensions replace the first indexed one, or come first if not adjacent."""
    x, indices = use["self"], list(use["indices"])
    given = [d for d, i in enumerate(indices) if i is not None]
    if any(value(indices[d]).dtype in (torch.bool, torch.uint8) for d in given):
        raise use.refuse("by a mask returns a size that depends on the data")
    count = max(len(shape(indices[d])) for d in given)
    first = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    end = first + count
    kept = [d for d in range(len(shape(x))) if d not in given]
    left = [d for d in range(use.rank()) if not first <= d < end]
    use.given["self"] = use.read(x, dict(zip(left, kept)))
    use.given["indices"] = [
        i if i is None else use.read(i, {end - n: len(shape(i)) - n for n in range(1, len(shape(i)) + 1)})
        for i in indices
    ]


@rule(RULES, "index_put")
def _masked_write(use: Use) -> None:
    """Separate x[:, mask] = number; the mask begins at the first dimension that it indexes."""
    if (masked := by_mask(use.at)) is None:
        raise use.refuse("writes at places that tensors give")
    first, mask = masked
    where = {d: d - first for d in use.asked if first <= d < first + len(shape(mask))}
    use.given["self"] = use.broadcast(use["self"])
    use.given["indices"] = [use.read(mask, where) if d == first else None for d in range(first + 1)]


# -- new tensors -----------------------------------------------------------------------------------
@rule(RULES, "ones", "zeros", "full", "new_ones", "new_zeros", "new_full")
def _constant(use: Use) -> None:
    if use.op.startswith("new_"):  # the given tensor only sets dtype and device
        made = value(use.at)
        use.op = use.op.removeprefix("new_")
        use.given = {k: v for k, v in use.given.items() if k in ("size", "fill_value")}
        use.given |= {"dtype": made.dtype, "device": made.device}
