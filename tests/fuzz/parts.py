"""The parts that programs are put together of: tables of small functions, and the context that each is given.

A neighbor takes the context and the activations `x` (B, T, E) and gives activations of the same shape. What it makes
beside them goes to `context.out`, which the program returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

B, H, D = 2, 2, 4
E = H * D
LONGEST = 16  # tokens for which there are parameters and buffers


class Context:
    """Gives a part the inputs and parameters of the program, and takes the results beside the activations.

    model    holds parameters, buffers and modules
    y        (B, T, E), a second input; `memory` (B, LONGEST, E) is one without a gradient
    keep     (B, T) truth values, True in the first column; `ids` (B, T) integers below 8
    number   a float, `count` an int from 1 to 3
    out      takes further results
    at       the place of the part in the program
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any], out: list[Any], at: int):
        self.model, self.inputs, self.out, self.at = model, inputs, out, at
        self.y, self.memory, self.keep, self.ids = (inputs[n] for n in ("y", "memory", "keep", "ids"))
        self.number, self.count = inputs["number"], inputs["count"]

    def aside(self) -> Context:
        """A context whose results are taken apart, for a body that may not write outside of itself."""
        return Context(self.model, self.inputs, [], self.at)

    def weight(self, n: int = 0) -> Tensor:
        """An (E, E) parameter: parts at other places mostly read others."""
        return self.model.weights[(self.at + n) % len(self.model.weights)]


Part = Callable[[Context, Tensor], Tensor]


@dataclass(frozen=True)
class Neighbor:
    """A part and what has to be known of it.

    sharp    a rounding error may change its result by far (argmax, a comparison)
    coarse   computes in less than float32
    draws    draws numbers of its operand's dtype
    breaks   breaks the graph, which takes long to compile
    pure     changes no tensor in place and gives nothing beside its result: it may be the body of an operator
    """

    name: str
    call: Part
    sharp: bool = False
    coarse: bool = False
    draws: bool = False
    pure: bool = False
    breaks: bool = False


NEIGHBORS: dict[str, Neighbor] = {}
WRAPS: dict[str, Callable[[Part, Context, Tensor], Tensor]] = {}
EDITS: dict[str, Neighbor] = {}  # of a tensor inside an attention, of any shape from (.., T, n) on
ATTENTIONS: dict[str, Part] = {}  # those that are written as one
ENTRIES: dict[str, Part] = {}  # from the input to the first activations


def neighbor(table: dict[str, Neighbor] = NEIGHBORS, **facts: bool) -> Callable[[Part], Part]:
    def register(call: Part) -> Part:
        assert call.__name__ not in table
        table[call.__name__] = Neighbor(call.__name__, call, **facts)
        return call

    return register


def named(table: dict[str, Any]) -> Callable[[Any], Any]:
    def register(call: Any) -> Any:
        assert call.__name__ not in table
        table[call.__name__] = call
        return call

    return register
