"""Separate the rows of views, joins, splits, gathers and new tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from attnfx.ir import algebra as A
from attnfx.ir.expr import Expr
from attnfx.passes.fx.nodes import dims, is_tensor, shape, value
from attnfx.passes.lift.row_rules import Along, Use, rule
from attnfx.spec.rows import Ref

ROWS = Ref("rows", 0)


def _product(sizes: Sequence[Expr]) -> Expr:
    return A.mul(*sizes) if len(sizes) > 1 else sizes[0] if sizes else A.ONE


def _same_place(use: Use, x: Node) -> Along | Node:
    """Return the dimension of a reshaped operand that is the whole row dimension of the result."""
    have, want = dims(x), dims(use.at)
    before, after = _product(want[: use.row]), _product(want[use.row + 1 :])
    for d, n in enumerate(have):
        if n is use.extent and _product(have[:d]) is before and _product(have[d + 1 :]) is after:
            return Along(x, d)
    raise use.refuse("splits or merges the rows")


def _with_rows(sizes: Sequence[object], at: int) -> list[object]:
    return [ROWS if d == at else n for d, n in enumerate(sizes)]


@rule("view", "reshape", "_unsafe_view")
def _view(use: Use) -> None:
    if "dtype" in use.defaults:
        raise use.refuse("reinterprets the bits as another dtype")
    name = use.names("size", "shape")
    use.op = "reshape.default"
    use.given["self"] = _same_place(use, use["self"])
    use.given[name] = _with_rows(use[name], use.row)


@rule("flatten")
def _flatten(use: Use) -> None:
    use.given["self"] = _same_place(use, use["self"])


@rule("unflatten")
def _unflatten(use: Use) -> None:
    x = use["self"]
    dim, count = use["dim"] % len(shape(x)), len(use["sizes"])
    if dim <= use.row < dim + count:
        raise use.refuse("splits the rows")
    use.given["self"] = use.along(x, use.row if use.row < dim else use.row - count + 1)


@rule("expand")
def _expand(use: Use) -> None:
    use.given["self"] = use.broadcast(use["self"])
    use.given["size"] = _with_rows(use["size"], use.row)


@rule("expand_as", "view_as", "reshape_as")
def _as(use: Use) -> None:
    x, rank = use["self"], use.rank()
    use.given["self"] = use.broadcast(x) if use.op.startswith("expand_as") else _same_place(use, x)
    use.given["other"] = use.along(use["other"], use.row - rank + len(shape(use["other"])))


@rule("permute")
def _permute(use: Use) -> None:
    x = use["self"]
    use.given["self"] = use.along(x, use["dims"][use.row] % len(shape(x)))


@rule("transpose", "t", "mT", "adjoint", "swapaxes", "swapdims", "numpy_T")
def _transpose(use: Use) -> None:
    x = use["self"]
    rank = len(shape(x))
    pair = [n for n in ("dim0", "axis0") if n in use.defaults]
    a, b = (use[pair[0]] % rank, use[pair[0].replace("0", "1")] % rank) if pair else (rank - 2, rank - 1)
    use.given["self"] = use.along(x, b if use.row == a else a if use.row == b else use.row)


@rule("unsqueeze")
def _unsqueeze(use: Use) -> None:
    dim = use["dim"] % use.rank()
    if use.row == dim:
        raise use.refuse("creates the dimension of the rows")
    use.given["self"] = use.along(use["self"], use.row if use.row < dim else use.row - 1)


@rule("squeeze")
def _squeeze(use: Use) -> None:
    x = use["self"]
    have = dims(x)
    which = use["dim"] if "dim" in use.defaults else [d for d, n in enumerate(have) if n is A.ONE]
    gone = {d % len(have) for d in (which if isinstance(which, list | tuple) else [which])}
    left = [d for d, n in enumerate(have) if d not in gone or n is not A.ONE]
    use.given["self"] = use.along(x, left[use.row])
    if "dim" not in use.defaults:  # in a chunk of one row, squeeze would drop the rows too
        use.op, use.given["dim"] = "squeeze.dims", sorted(gone)


@rule("select")
def _select(use: Use) -> None:
    x = use["self"]
    dim = use["dim"] % len(shape(x))
    use.given["self"] = use.along(x, use.row if use.row < dim else use.row + 1)


@rule("slice", "narrow", "index_select", "repeat_interleave")
def _part(use: Use) -> None:
    x = use["self"]
    if use["dim"] is None or use["dim"] % len(shape(x)) == use.row:
        start, end, step = use["start"], use["end"], use["step"]
        whole = use.op == "slice.Tensor" and start in (None, 0) and step in (None, 1)
        if not (whole and isinstance(end, int | None) and (end is None or end >= 1 << 60)):
            raise use.refuse("selects some of the rows")
        use.given["end"] = None
    use.given["self"] = use.along(x, use.row)


@rule("repeat")
def _repeat(use: Use) -> None:
    if use["repeats"][use.row] != 1:
        raise use.refuse("repeats the rows")
    use.given["self"] = use.broadcast(use["self"])


@rule("constant_pad_nd", "pad")
def _pad(use: Use) -> None:
    x, pads = use["self"], use["pad"]
    if use["mode"] not in (None, "constant"):
        raise use.refuse("is not known to keep rows separate")
    at = 2 * (len(shape(x)) - 1 - use.row)
    if any(n != 0 for n in pads[at : at + 2]):
        raise use.refuse("pads the rows")
    use.given["self"] = use.along(x, use.row)


# -- joins and splits ------------------------------------------------------------------------------
@rule("cat", "concat", "concatenate")
def _cat(use: Use) -> None:
    if use["dim"] % use.rank() == use.row:
        raise use.refuse("concatenates along the rows")
    use.given["tensors"] = [use.along(x, use.row) for x in use["tensors"]]
    if any(not isinstance(x, Along) for x in use.given["tensors"]):
        raise use.refuse("concatenates a tensor without rows")


@rule("stack")
def _stack(use: Use) -> None:
    dim = use["dim"] % use.rank()
    if dim == use.row:
        raise use.refuse("creates the dimension of the rows")
    use.given["tensors"] = [use.along(x, use.row if use.row < dim else use.row - 1) for x in use["tensors"]]


@rule("split", "split_with_sizes", "chunk", "unbind", "tensor_split")
def _taken_apart(use: Use) -> None:
    x = use["self"]
    if use["dim"] % len(shape(x)) == use.row:
        raise use.refuse("splits along the rows")
    use.given["self"] = use.along(x, use.row)


# -- by index -------------------------------------------------------------------------------------
@rule("gather", "scatter", "scatter_add", "take_along_dim")
def _gather(use: Use) -> None:
    dim = use["dim"]
    if dim is None or dim % use.rank() == use.row:
        raise use.refuse("reads elements of other rows")
    for name in ("self", "index", "indices", "src"):
        if is_tensor(use[name]):
            use.given[name] = use.along(use[name], use.row)
            if not isinstance(use.given[name], Along):
                raise use.refuse("reads a tensor without rows")


@rule("one_hot")
def _one_hot(use: Use) -> None:
    if use["num_classes"] == -1 or use.row == use.rank() - 1:
        raise use.refuse("is not known to keep rows separate")
    use.given["self"] = use.along(use["self"], use.row)


@rule("index")
def _index(use: Use) -> None:
    """Separate x[:, i, j]: the indices' own dimensions replace the first indexed one, or come first if not adjacent."""
    x, indices = use["self"], list(use["indices"])
    given = [d for d, i in enumerate(indices) if i is not None]
    if any(value(indices[d]).dtype in (torch.bool, torch.uint8) for d in given):
        raise use.refuse("by a mask returns a size that depends on the data")
    count = max(len(shape(indices[d])) for d in given)
    first = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    if first <= use.row < first + count:
        end = first + count
        use.given["indices"] = [
            i if i is None else use.along(i, use.row - end + len(shape(i))) for i in indices
        ]  # fmt: skip
    else:
        left = [d for d in range(len(shape(x))) if d not in given]
        use.given["self"] = use.along(x, left[use.row if use.row < first else use.row - count])


# -- new tensors and triangles ----------------------------------------------------------------------
@rule("ones", "zeros", "full", "new_ones", "new_zeros", "new_full")
def _constant(use: Use) -> None:
    made = value(use.at)
    if use.op.startswith("new_"):  # the given tensor only sets dtype and device
        use.op = use.op.removeprefix("new_")
        use.given = {k: v for k, v in use.given.items() if k in ("size", "fill_value")}
        use.given |= {"dtype": made.dtype, "device": made.device}
    use.given["size"] = _with_rows(use["size"], use.row)


@rule("tril", "triu")
def _triangle(use: Use) -> None:
    x, diagonal = use["self"], use["diagonal"]
    if use.row == use.rank() - 1 or not isinstance(diagonal, int):
        raise use.refuse("has rows along its last dimension, or a diagonal that is not a number")
    use.given["self"] = use.along(x, use.row)
    if use.row == use.rank() - 2:
        use.given["diagonal"] = Ref("start", diagonal)
