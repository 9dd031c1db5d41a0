"""Measure how many tiles the mask of a site leaves at the values of the first call: a hint for the cost model.

Only a mask in tensors needs this. Its values may differ in later calls, which changes the speed alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import GraphModule, Node

from attnfx.kernels.flex import tier as flex
from attnfx.passes.fx.analysis import cone, is_random, pure
from attnfx.passes.match.results import Match

MOST_NODES = 64  # that compute the tensors of a mask from the inputs
MOST_ELEMENTS = 1 << 26  # of each tensor among them


def share_of_tiles(gm: GraphModule, inputs: Sequence[Any], match: Match, sizes: Mapping[str, int]) -> float:
    """Return the share of the tiles of `flex_attention` that the mask's values leave; 1.0 if unknown. `inputs` are the
    values of the graph's placeholders, `sizes` the sizes of the site."""
    call = flex.call_of(match.spec, match.every_row_live, torch.device("cpu"))
    slots = [] if call is None else call.slots(call.form.tiles)
    if call is None or not slots or any(s >= len(match.captures) for s in slots):
        return 1.0
    with torch.no_grad(), unset_fake_temporarily():
        found = _values(gm, [match.captures[s] for s in slots], inputs)
        if found is None:
            return 1.0
        number, order, full, _ = call.tiles(dict(zip(slots, found)), sizes, torch.device("cpu"), False)
        listed = int(number.sum()) + (0 if full is None else int(full.sum()))  # type: ignore[union-attr]
        return listed / max(order.numel(), 1)  # type: ignore[union-attr]


def _values(gm: GraphModule, nodes: Sequence[Node], inputs: Sequence[Any]) -> list[Tensor] | None:
    """Compute nodes from the inputs, if that takes few small operators of the CPU; else return None."""
    places = gm.graph.find_nodes(op="placeholder")
    known: dict[Node, Any] = dict(zip(places, inputs))
    given, computed = cone(nodes, lambda n: n.op in ("placeholder", "get_attr"))
    for n in given:
        if n.op == "get_attr":
            known[n] = getattr(gm, str(n.target), None)
    if len(inputs) != len(places) or len(computed) > MOST_NODES or not _are_real(known.get(n) for n in given):
        return None
    for n in computed:
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return None
        if not pure(n) or is_random(n.target) or not _is_small(n):
            return None
        args: Any = torch.fx.map_arg((n.args, n.kwargs), known.__getitem__)
        known[n] = n.target(*args[0], **args[1])
    return [known[n] for n in nodes]


def _are_real(values: Iterable[Any]) -> bool:
    """Return whether all values are numbers, or tensors of the CPU that hold elements."""
    return all(
        type(x) in (int, float, bool) or (isinstance(x, Tensor) and not isinstance(x, FakeTensor) and x.is_cpu)
        for x in values
    )


def _is_small(n: Node) -> bool:
    held = n.meta.get("val")
    return not isinstance(held, Tensor) or (isinstance(held.numel(), int) and held.numel() <= MOST_ELEMENTS)
