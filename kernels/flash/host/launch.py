"""Bundle a kernel with its arguments, to run it or to compile it ahead of time for a GPU that need not be present."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from attnfx.kernels.flash.host.tiles import Tile

_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments.

    kernel     the Triton function
    grid       the number of programs in each dim
    arguments  tensors, integers, None and tuples of them, by parameter name
    constants  the constexpr arguments by name
    tile       its warps and stages are launch options
    before     launches that must run first
    """

    kernel: triton.JITFunction
    grid: tuple[int, int, int]
    arguments: Mapping[str, object]
    constants: Mapping[str, object]
    tile: Tile
    before: tuple[Launch, ...] = ()

    def run(self, device: torch.device) -> None:
        for made in self.before:
            made.run(device)
        if 0 in self.grid:
            return
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](
                **self.arguments, **self.constants, num_warps=self.tile.warps, num_stages=self.tile.stages
            )

    def compile(self, target: int | GPUTarget):
        """Compile the kernel for an NVIDIA GPU of this compute capability, 90 for 9.0, or for another Triton target.
        This works without a GPU; the tensors may be on the meta device."""
        if isinstance(target, int):
            target = GPUTarget("cuda", target, 32)
        types: dict[str, object] = {}
        constants, hints = {}, {}
        for n, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                types[name], constants[n,] = "constexpr", self.constants[name]
                continue
            types[name] = _type(self.arguments[name])
            for at, value in _leaves(self.arguments[name], (n,)):
                if _type(value) == "constexpr":
                    constants[at] = value
                elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                    hints[at] = [["tt.divisibility", 16]]
        options = dict(num_warps=self.tile.warps, num_stages=self.tile.stages)
        source = ASTSource(self.kernel, types, constants, hints)  # type: ignore[arg-type]
        return triton.compile(source, target=target, options=options)


def descriptor(x: Tensor, rows: int, width: int, capability: int) -> TensorDescriptor | None:
    """Describe x (B, H, rows, width) in blocks (1, 1, rows, width) for the tensor memory accelerator.

    The accelerator copies blocks without address arithmetic in the kernel. It requires 16-bit elements, a contiguous
    last dim, and strides and an address divisible by 16 bytes. Return None if the GPU or the layout does not allow it.
    """
    strides = [s * x.dtype.itemsize for s in x.stride()[:-1]]
    if capability < 90 or x.dtype.itemsize != 2 or x.stride(-1) != 1 or any(s % 16 != 0 or s == 0 for s in strides):
        return None
    if x.device.type != "meta" and x.data_ptr() % 16 != 0:
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width])


def _type(value: object) -> object:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(x) for x in value)
    return "i32" if isinstance(value, int) and value != 1 else "constexpr"


def _leaves(value: object, at: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], object]]:
    if isinstance(value, tuple):
        for n, x in enumerate(value):
            yield from _leaves(x, (*at, n))
    else:
        yield at, value
