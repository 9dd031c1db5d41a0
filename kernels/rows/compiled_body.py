"""Compile the computation of one chunk, forward or backward, into a single function: the body.

A body is the row program traced on tensors of a chunk's sizes. Inductor compiles it to Triton kernels on a GPU and to
C++ on a CPU. The backward body traces the program and its derivative together, so that only the values that a gradient
needs are recomputed. Bodies are compiled at the first call that needs them and cached by program, sizes and device.
The first chunk of each body also runs call by call and the results are compared, because Inductor up to PyTorch 2.13
can return wrong results on a CPU (pytorch/pytorch#185702). If compilation fails or the results differ, a warning is
logged and the chunks run call by call.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from attnfx.inductor import compiled
from attnfx.kernels.gpu import capturing

T = TypeVar("T")

MOST = 256  # cached bodies
FAR = 0.02  # tolerance relative to the norm of the calls' results; bfloat16 rounding and a few broken ties stay below
CLASSES = 16  # bodies of one program; calls of further sizes run without a body
_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A chunk's number of rows and of keys, its first row (start), and first row minus first key (corner). In a body,
    start and corner are int64 tensors."""

    rows: int
    columns: int
    start: int | Tensor
    corner: int | Tensor


Factor = Callable[[Tensor, float], Tensor]  # (operand, probability) -> the factor by which dropout multiplies it
Evaluate = Callable[[Place, Sequence[Tensor], Factor], list[Tensor]]  # computes a chunk's rows of the results


@dataclass(frozen=True)
class Body:
    """A compiled body.

    run      the compiled function: first row, corner, inputs, factors, gradients of results -> tensors
    factors  shape, dtype and probability of each dropout's factors, in sampling order
    given    for each result or gradient, whether the function returns it; False for the gradient of an unused input
    """

    run: Callable[..., Sequence[Tensor]]
    factors: tuple[tuple[torch.Size, torch.dtype, float], ...]
    given: tuple[bool, ...]

    def __call__(
        self, place: Place, inputs: Sequence[Tensor], grads: Sequence[Tensor], draw: Callable[..., Tensor]
    ) -> list[Tensor | None]:
        factors = [draw(shape, dtype, p) for shape, dtype, p in self.factors]
        corners = torch.tensor(place.start), torch.tensor(place.corner)
        made = iter(self.run(*corners, *inputs, *factors, *grads))
        return [next(made) if there else None for there in self.given]


Trial = Callable[[Body], tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]  # results of the body, of the calls


class WrongResults(Exception):
    """A body's results differ from the results of the calls that it was compiled from."""


class Bodies:
    """A least recently used cache of at most `MOST` bodies; None marks a body that failed."""

    def __init__(self) -> None:
        self.made: OrderedDict[Any, Body | None] = OrderedDict()
        self.lock = threading.RLock()

    def get(self, key: tuple[str, Any], make: Callable[[], Body], trial: Trial) -> Body | None:
        """Return the body for (program, the rest of its key), or None if it cannot be compiled or fails its trial."""
        with self.lock:
            if key not in self.made:
                if Counter(program for program, _ in self.made)[key[0]] >= CLASSES or capturing():
                    return None
                self.made[key] = self._try(make, trial)
                while len(self.made) > MOST:
                    self.made.popitem(last=False)
            self.made.move_to_end(key)
            return self.made[key]

    def _try(self, make: Callable[[], Body], trial: Trial) -> Body | None:
        try:
            body = _apart(make)
            _compare(*trial(body))
            return body
        except Exception as problem:
            reason = str(problem).strip().split("\n")[0]
            _log.warning(
                "whole rows run call by call, because their compiled body cannot be used: %s: %s",
                type(problem).__name__,
                reason,
            )
            return None


BODIES = Bodies()


def _apart(make: Callable[[], T]) -> T:
    """Return the result of a call run in a new thread. Modes, dispatch keys and compiler contexts have PyTorch's
    defaults there, regardless of the calling graph."""
    found: list[T] = []
    problems: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            found.append(make())
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run, name="attnfx-bodies")
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    return found[0]


def _compare(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    """Compare two lists of tensors and raise WrongResults if they differ. The tolerance includes rounding relative to
    the largest tensor. Some tensors should be zero, for example the gradient of a constant added to a whole row, so
    their own norm is too small a scale."""
    if [x is None for x in found] != [x is None for x in wanted]:
        raise WrongResults("the compiled body returns other tensors than the calls")
    pairs = [(g, w) for g, w in zip(found, wanted) if g is not None and w is not None and w.numel()]
    largest = max((float(_finite(w).square().mean().sqrt()) for _, w in pairs), default=0.0)
    for n, (got, want) in enumerate(pairs):
        rounding = torch.finfo(want.dtype).eps if want.is_floating_point() else 0.0
        limit = FAR * float(_finite(want).norm()) + 16 * rounding * largest * want.numel() ** 0.5
        distance = float((_finite(got) - _finite(want)).norm())
        if not distance <= limit or not torch.equal(got.isfinite(), want.isfinite()):
            raise WrongResults(
                f"tensor {n} of the compiled body differs from the calls' by {distance:.3g}, more than {limit:.3g}"
            )


def _finite(x: Tensor) -> Tensor:
    x = torch.where(x.isfinite(), x, 0)
    return x if x.dtype == torch.float64 else x.float()


def like(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the properties of its operands that a body depends on."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors)


def body_of(
    program: str,
    sizes: Sequence[int],
    evaluate: Evaluate,
    place: Place,
    inputs: Sequence[Tensor],
    wanted: Sequence[int] | None,
    grads: Sequence[Tensor | None],
    trial: Trial,
) -> Body | None:
    """Return the body that computes the results of a chunk. With `wanted`, it computes the gradients of these inputs
    from the results' gradients (None: zero). `sizes` are the program's."""
    learning = None if wanted is None else tuple(wanted)
    there = tuple(g is not None for g in grads)
    given = [g for g in grads if g is not None]
    key = (tuple(sizes), place.rows, place.columns, like(inputs), learning, there, like(given))
    return BODIES.get((program, key), lambda: _compiled(evaluate, place, inputs, wanted, grads), trial)


def _compiled(
    evaluate: Evaluate,
    place: Place,
    inputs: Sequence[Tensor],
    wanted: Sequence[int] | None,
    grads: Sequence[Tensor | None],
) -> Body:
    with FakeTensorMode():
        corners = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
        fakes, of_results = [_fake(x) for x in inputs], [_fake(g) for g in grads if g is not None]
        factors: list[Tensor] = []
        chances: list[float] = []

        def note(x: Tensor, p: float) -> Tensor:
            factors.append(torch.empty_like(x, memory_format=torch.contiguous_format))
            chances.append(p)
            return factors[-1]

        with torch.no_grad():
            evaluate(place, fakes, note)
    given: tuple[bool, ...] = ()

    def body(start: Tensor, corner: Tensor, *tensors: Tensor) -> list[Tensor]:
        nonlocal given
        at = place._replace(start=start, corner=corner)
        read, rest = tensors[: len(inputs)], iter(tensors[len(inputs) :])
        drawn = iter([next(rest) for _ in factors])
        factor: Factor = lambda x, p: next(drawn)  # noqa: E731
        if wanted is None:
            made: Sequence[Tensor | None] = evaluate(at, read, factor)
        else:
            grad_of = [None if g is None else next(rest) for g in grads]
            made = gradients(lambda xs: evaluate(at, xs, factor), read, wanted, grad_of)
        given = tuple(x is not None for x in made)
        return [x for x in made if x is not None]

    operands = [*corners, *fakes, *factors, *of_results]
    run = compiled(body, operands, grad=wanted is not None)
    return Body(run, tuple((x.shape, x.dtype, p) for x, p in zip(factors, chances)), given)  # type: ignore[arg-type]


def gradients(
    evaluate: Callable[[Sequence[Tensor]], list[Tensor]],
    inputs: Sequence[Tensor],
    wanted: Sequence[int],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Compute the gradients of the inputs `wanted` by autograd; None if no result with a gradient depends on one."""
    leaves = [x.detach().requires_grad_(n in wanted) for n, x in enumerate(inputs)]
    outs = evaluate(leaves)
    pairs = [(o, g) for o, g in zip(outs, grads) if g is not None and o.requires_grad]
    if not pairs:
        return [None] * len(wanted)
    sources = [leaves[n] for n in wanted]
    return list(torch.autograd.grad([o for o, _ in pairs], sources, [g for _, g in pairs], allow_unused=True))


def _fake(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
