"""Compute the bytes of an optimizer's state, and of its step while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnfx.errors import OptionError
from attnfx.memory import byte_size as budget

# bitsandbytes: 8-bit states in blocks of 256 with a float32 scale each; tensors under 4096 elements stay float32
BLOCK, SMALL = 256, 4096


@dataclass(frozen=True)
class Optimizer:
    """The memory needs of an optimizer.

    copies   tensors of the parameter's shape that it keeps for each parameter
    bits     8 if it keeps them in blocks of 8-bit numbers; 0 if in the parameter's dtype
    scratch  tensors of all parameters' size that its step allocates at once (in PyTorch's foreach implementations,
             the default on a GPU)
    """

    copies: int
    bits: int = 0
    scratch: int = 0


# torch/optim/adam.py (_multi_tensor_adam computes the square root of all second moments at once), sgd.py
OPTIMIZERS = {
    "none": Optimizer(0),
    "sgd": Optimizer(0),
    "momentum": Optimizer(1),
    "adam": Optimizer(2, scratch=1),
    "adamw": Optimizer(2, scratch=1),
    "adam8bit": Optimizer(2, bits=8),
    "adamw8bit": Optimizer(2, bits=8),
}


def given(value: object) -> Optimizer | int:
    """Return an optimizer by name, or the bytes of its state. Raises OptionError, with the valid names, otherwise."""
    if isinstance(value, str):
        known = OPTIMIZERS.get(value.lower().replace("-", "").replace("_", ""))
        if known is not None:
            return known
        if (found := budget.size(value)) is not None:
            return found
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise OptionError(
        f"optimizer: {value!r} is not valid; give one of {', '.join(OPTIMIZERS)}, or the bytes of its state, such as "
        "'3GiB'"
    )


def state_bytes(optimizer: Optimizer, parameters: Sequence[tuple[int, int]]) -> int:
    """Return the bytes of the state for parameters given as (elements, bytes)."""
    total = 0
    for elements, size in parameters:
        if optimizer.bits == 8:
            one = elements + 4 * -(-elements // BLOCK) if elements >= SMALL else 4 * elements
        else:
            one = size
        total += optimizer.copies * one
    return total


def step_bytes(optimizer: Optimizer, parameters: Sequence[tuple[int, int]], cpu: bool) -> int:
    """Return the bytes of a step beyond the state: for all parameters at once, on a CPU for one at a time."""
    sizes = [size for _, size in parameters]
    return optimizer.scratch * (max(sizes, default=0) if cpu else sum(sizes))
