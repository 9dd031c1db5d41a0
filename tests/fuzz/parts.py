"""The parts of random programs: tables of small functions, and the context that each receives.

A neighbor takes the context and the activations `x` (B, T, E) and returns activations of the same shape. It appends
further results to `context.out`, which the program returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

B, H, D = 2, 2, 4
E = H * D
LONGEST = 16  # the most tokens that the parameters and buffers allow


class Context:
    """The program's inputs and parameters for one part, and a list for its further results.

    model    the parameters, buffers and modules
    y        (B, T, E), a second input; `memory` (B, LONGEST, E) is one without a gradient
    keep     (B, T) bool, True in the first column; `ids` (B, T) has integers below 8
    number   a float; `count` is an int from 1 to 3
    out      the list of further results
    at       the position of the part in the program
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any], out: list[Any], at: int):
        self.model, self.inputs, self.out, self.at = model, inputs, out, at
        self.y, self.memory, self.keep, self.ids = (inputs[n] for n in ("y", "memory", "keep", "ids"))
        self.number, self.count = inputs["number"], inputs["count"]

    def aside(self) -> Context:
        """Return a context with its own list of results, for a body that must not write outside itself."""
        return Context(self.model, self.inputs, [], self.at)

    def weight(self, n: int = 0) -> Tensor:
        """Return an (E, E) parameter. Parts at other positions mostly read others."""
        return self.model.weights[(self.at + n) % len(self.model.weights)]


Part = Callable[[Context, Tensor], Tensor]


@dataclass(frozen=True)
class Neighbor:
    """A part and its properties.

    sharp    a rounding error may change its result by a lot (argmax, a comparison)
    coarse   it computes in less than float32
    draws    it samples random values in its operand's dtype
    breaks   it breaks the graph, which takes long to compile
    pure     it never writes in place, and it returns only its result, so it may be the body of an operator
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
EDITS: dict[str, Neighbor] = {}  # for a tensor (.., T, n) inside an attention
ATTENTIONS: dict[str, Part] = {}  # attentions written as one function
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
