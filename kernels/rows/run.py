"""Run a row program in chunks of rows, so that a whole score matrix never exists, forward or backward.

Each chunk runs the program's own ATen calls on a range of rows. It computes the same values as eager, bit for bit if
the operators round rows alike. Alternatively, the calls are compiled into one body (`kernels/rows/compiled_body.py`).
The backward pass recomputes each chunk with the forward pass's dropout, under autograd or in one body with the
derivative. Sums over all chunks, which some results and the gradients of whole inputs are, are accumulated in float32
or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from attnfx.kernels.chunked.block_run import mix
from attnfx.kernels.rows import compiled_body as bodies
from attnfx.kernels.rows.call import RowCall, evaluate
from attnfx.kernels.rows.compiled_body import Body, Factor, Place
from attnfx.kernels.rows.heap import Heap

# Elements of a chunk's largest value, and the fewest rows of a chunk. Measured on 2 cores of an AMD EPYC
# (benchmarks/rows.py: 12 heads x 4096 x 64, float32).
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
ROWS = 16
GROWTH = 160 << 20  # bytes of freed memory that the C library may keep between chunks

Draw = Callable[[torch.Size, torch.dtype, float], Tensor]


class Chunk(NamedTuple):
    """A range of `rows` rows from `start`, and of `columns` keys from `first`. `inputs` are views of the inputs, cut to
    the chunk's rows and keys if they have those dims."""

    number: int
    rows: int
    columns: int
    start: int
    first: int
    inputs: list[Tensor]

    @property
    def place(self) -> Place:
        return Place(self.rows, self.columns, self.start, self.start - self.first)

    def of(self, x: Tensor, row: int | None, column: int | None = None) -> Tensor:
        """Cut a whole tensor, whose rows and keys are its dims `row` and `column`, to the chunk."""
        x = x if row is None else x.narrow(row, self.start, self.rows)
        return x if column is None else x.narrow(column, self.first, self.columns)


class Runner:
    """A pass over the chunks of one call."""

    def __init__(self, call: RowCall):
        self.call = call
        self.length = call.length
        self.device = next(x.device for x in call.inputs)
        self.first_seed = int(call.seed.item()) if call.program.random and call.seed is not None else 0
        self.rows = self._rows()

    def _rows(self) -> int:
        weight = max(int(self.call.number(self.call.program.weight, self.length)), 1)
        most = max(TILE_ELEMENTS.get(self.device.type, 1 << 22) // weight, ROWS)
        count = max(-(-self.length // most), 1)
        return max(-(-self.length // count), 1)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks. All have `rows` rows, except perhaps the last."""
        call, several = self.call, self.rows < self.length
        heap = Heap(GROWTH) if self.device.type == "cpu" and several else None
        keys = call.keys(self.rows)
        for n, start in enumerate(range(0, max(self.length, 1), self.rows)):
            rows = min(self.rows, self.length - start)
            first, columns = keys[n] if keys else (0, 0)
            chunk = Chunk(n, rows, columns, start, first, [])
            yield chunk._replace(
                inputs=[chunk.of(x.detach(), d, c) for x, d, c in zip(call.inputs, call.program.inputs, call.columns)]
            )
            if heap is not None:
                heap.trim()

    def compute(
        self, chunk: Chunk, wanted: list[int] | None = None, grads: Sequence[Tensor | None] = ()
    ) -> Sequence[Tensor | None]:
        """Compute the chunk's rows of each result. With `wanted`, compute the gradients of these inputs of the chunk
        from the whole results' gradients. A gradient is None if no result with a gradient depends on that input."""
        call, place, inputs = self.call, chunk.place, chunk.inputs
        of_rows = [None if g is None else chunk.of(g, r.row) for g, r in zip(grads, call.program.results)]

        def calls() -> Sequence[Tensor | None]:
            draw = self._draw(chunk)
            factor: Factor = lambda x, p: draw(x.shape, x.dtype, p)  # noqa: E731
            if wanted is None:
                return evaluate(call, place, inputs, factor)
            with _recorded():
                return bodies.gradients(lambda x: evaluate(call, place, x, factor), inputs, wanted, of_rows)

        def run(body: Body) -> Sequence[Tensor | None]:
            return body(place, inputs, [g for g in of_rows if g is not None], self._draw(chunk))

        if call.program.compiled and chunk.rows == self.rows:  # for a shorter last chunk, another body costs more
            body = bodies.body_of(
                call.text, call.sizes, partial(evaluate, call), place, inputs, wanted, of_rows,
                lambda b: (run(b), calls()),
            )  # fmt: skip
            if body is not None:
                return run(body)
        return calls()

    def _draw(self, chunk: Chunk) -> Draw:
        """Return a function that samples dropout factors, the same sequence in the forward and backward passes."""
        generator: torch.Generator | None = None

        def draw(shape: torch.Size, dtype: torch.dtype, p: float) -> Tensor:
            nonlocal generator
            if generator is None:
                generator = torch.Generator(device=self.device)
                generator.manual_seed(mix(self.first_seed, chunk.number))
            if p >= 1.0:
                return torch.zeros(shape, dtype=dtype, device=self.device)
            kept = torch.empty(shape, dtype=dtype, device=self.device).bernoulli_(1.0 - p, generator=generator)
            return kept.div_(1.0 - p)

        return draw


@contextmanager
def without_autocast() -> Iterator[None]:
    """Disable autocast: the program already contains its casts."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def _recorded() -> Iterator[None]:
    """Enable autograd, which is off by default inside an operator."""
    guard = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality),
    )
    with guard, torch.enable_grad():
        yield


def forward(call: RowCall) -> list[Tensor]:
    """Compute the whole results."""
    run, outs, results = Runner(call), call.outputs(), call.program.results
    sums = [torch.zeros_like(x, dtype=_wide(x.dtype)) if r.row is None else x for x, r in zip(outs, results)]
    with without_autocast(), torch.no_grad():
        for chunk in run.chunks():
            for out, part, r in zip(sums, run.compute(chunk), results):
                out.add_(part) if r.row is None else chunk.of(out, r.row).copy_(part)  # type: ignore[arg-type]
    return [x.to(out.dtype) for x, out in zip(sums, outs)]


def backward(call: RowCall, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Compute the gradients of the inputs that the program's `grads` marks, in each input's dtype, contiguous. `grads`
    holds the gradient of each result, or None."""
    run, program = Runner(call), call.program
    wanted = [n for n, g in enumerate(program.grads) if g]
    sums: dict[int, Tensor] = {}
    with without_autocast(), torch.no_grad():
        for chunk in run.chunks():
            for n, part in zip(wanted, run.compute(chunk, wanted, grads)):
                if part is None:
                    continue
                d, c = program.inputs[n], call.columns[n]
                if n not in sums and d is None and c is None:
                    sums[n] = part.to(_wide(part.dtype), copy=True)
                    continue
                if n not in sums:
                    like = call.inputs[n]
                    made = torch.empty if c is None else torch.zeros
                    sums[n] = made(
                        like.shape, dtype=like.dtype if d is not None else _wide(like.dtype), device=like.device
                    )
                own = chunk.of(sums[n], d, c)
                own.add_(part) if d is None else own.copy_(part)
    return [
        sums[n].to(x.dtype).contiguous() if n in sums else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for n, x in ((n, call.inputs[n]) for n in wanted)
    ]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are accumulated."""
    return torch.float32 if dtype.itemsize < 4 else dtype
