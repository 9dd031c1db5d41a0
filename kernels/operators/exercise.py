"""Exercise an operator of a rewritten graph once on tiny tensors, forward and, in training, backward.

Exceptions of the chosen tier pass through. Sizes are shortened so that a program takes a few milliseconds: batch,
heads, rows and keys for a spec, rows alone for a row program. Each distinct call is exercised once per process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from attnfx.kernels.rows import call as rowcall
from attnfx.kernels.rows import run as rows
from attnfx.spec import AXES, AttentionSpec, from_json, loads
from attnfx.spec import rows as rowprogram

LARGEST = 1 << 21  # the most elements of a row program's operands for a run on real tensors
_done: set[str] = set()


class Like(NamedTuple):
    """A tensor described by its shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def exercise(operator: Any, args: Sequence[Any], training: bool) -> None:
    """Call `operator`, an overload of torch.ops.attnfx, on small tensors like `args`, which has a `Like` per tensor.
    With `training`, also compute the gradients of its differentiable operands."""
    known = repr((str(operator), args, training))
    if known in _done:
        return
    name = operator._schema.name.removeprefix("attnfx::")
    with unset_fake_temporarily(), tracing(None), torch.set_grad_enabled(training), rows.without_autocast():
        if name == "attention_rows":
            _exercise_rows(*args, training=training)
        else:
            _run(operator, *_shortened(name, args, training))
    _done.add(known)


def _run(operator: Any, args: Sequence[Any], leaves: Sequence[Tensor]) -> None:
    made = operator(*args)
    outs = list(made) if isinstance(made, list | tuple) else [made]
    if operator._schema.name == "attnfx::attention" and from_json(args[6]).normaliser != "softmax":
        outs = outs[:1]  # drop the logsumexp, which only a softmax has
    outs = [x for x in outs if x.requires_grad]
    if outs and leaves:
        torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs], allow_unused=True)


def _shortened(name: str, args: Sequence[Any], training: bool) -> tuple[list[Any], list[Tensor]]:
    """The arguments of `attention`, `attention_weights` or `attention_weights_max`, and which of them learn."""
    query, key, third, captures, sizes, seed, text, last, *_ = args
    spec = from_json(text)
    ratio = query.shape[1] // key.shape[1] if key.shape[1] else 0
    batch, groups = min(query.shape[0], 2), min(key.shape[1], 2)
    short = {"b": batch, "h": groups * ratio, "i": _short(query.shape[2]), "j": _short(key.shape[2])}
    q = _made(query, (batch, short["h"], short["i"], query.shape[3]), training)
    k = _made(key, (batch, groups, short["j"], key.shape[3]), training)
    if name == "attention":
        v = _made(third, (batch, groups, short["j"], third.shape[3]), training)
    else:
        v = _made(third, (batch, short["h"], short["i"]), False)
    held = [
        _made(c, shape, training and known.grad)
        for c, shape, known in zip(captures, _capture_shapes(spec, captures, short), spec.captures)
    ]
    learning = [x for x in (q, k, v, *held) if x.requires_grad]
    made = None if seed is None else _made(seed, seed.shape, False)
    return [q, k, v, held, list(sizes), made, text, last], learning


def _short(n: int) -> int:
    """Shorten a size but keep its remainder modulo 16, for which kernels are specialized."""
    return n if n <= 16 else 16 + n % 16


def _capture_shapes(
    spec: AttentionSpec, captures: Sequence[Like], short: Mapping[str, int]
) -> list[tuple[int, ...]]:  # fmt: skip
    """Shorten each dim that is indexed by exactly one variable to that variable's range; keep all other dims."""
    shapes = [list(c.shape) for c in captures]
    read: dict[tuple[int, int], set[str]] = {}
    for e in loads(spec):
        for d, index in enumerate(e.args):
            read.setdefault((int(e.value), d), set()).add(str(index.value) if index.op == "var" else "")  # type: ignore[call-overload]
    for (slot, d), names in read.items():
        if len(names) == 1 and (name := next(iter(names))) in AXES and shapes[slot][d] > 1:
            shapes[slot][d] = short[name]
    return [tuple(s) for s in shapes]


def _made(like: Like, shape: Sequence[int], learns: bool) -> Tensor:
    """Create a tensor of zeros (of ones if bool). A large one without a gradient is one element, expanded."""
    fill = True if like.dtype == torch.bool else 0
    if learns and like.dtype.is_floating_point:
        return torch.full(tuple(shape), fill, dtype=like.dtype, device=like.device, requires_grad=True)
    if prod(shape) <= 1 << 12:
        return torch.full(tuple(shape), fill, dtype=like.dtype, device=like.device)
    return torch.full((), fill, dtype=like.dtype, device=like.device).expand(tuple(shape))


def _exercise_rows(inputs: Sequence[Like], sizes: Sequence[int], seed: Like | None, text: str, training: bool) -> None:
    """Run a row program on two rows, call by call. Use fake tensors if the operands are large."""
    program = replace(rowprogram.from_json(text), compiled=False)
    shapes = [
        [min(n, 2) if d == row else n for d, n in enumerate(x.shape)] for x, row in zip(inputs, program.inputs)
    ]  # fmt: skip
    small = sum(map(prod, shapes)) <= LARGEST
    if not small and program.random:
        return  # a fake seed cannot be read

    with nullcontext() if small else FakeTensorMode():
        drawn = None if seed is None else _made(seed, seed.shape, False)
        call = rowcall.prepare(program.to_json(), _views(inputs, shapes), sizes, drawn)
        outs = rows.forward(call)
        if training and any(program.grads):
            rows.backward(call, [torch.ones_like(x) if x.is_floating_point() else None for x in outs])


def _views(likes: Sequence[Like], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Create tensors that share memory by dtype, because touching new memory takes most of an exercise's time."""
    filled: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for x, shape in sorted(zip(likes, shapes), key=lambda pair: -prod(pair[1])):
        if (x.dtype, x.device) not in filled:
            filled[x.dtype, x.device] = _made(x, (prod(shape),), True)
    return [filled[x.dtype, x.device][: prod(shape)].view(tuple(shape)) for x, shape in zip(likes, shapes)]
