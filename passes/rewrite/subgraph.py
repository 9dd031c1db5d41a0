"""Cut one site out of its graph, so that it can be compiled and run alone.

The cut graph computes the last nodes of the site from its operands, its captures and the other inputs of the nodes in
between. All sizes are constants, from the example inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnfx.passes.fx.analysis import Facts, cone
from attnfx.passes.fx.nodes import is_tensor, number, op_name, value
from attnfx.passes.lift.tables import VIEWS

ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def cut(gm: GraphModule, ends: Sequence[Node], operands: Collection[Node], captures: Sequence[Node]) -> GraphModule:
    """Return a graph module that computes `ends`, with placeholders that carry fakes in `meta["example_value"]`.

    It begins at `operands`, `captures`, and the other inputs of the nodes in between. `meta["operand"]` of a
    placeholder tells whether it is an operand. A placeholder that may take a gradient requires one. Autocast regions
    around the first end are entered again.
    """
    facts = Facts(gm)

    def given(n: Node) -> bool:
        known = n in operands or n in captures or n.op in ("placeholder", "get_attr")
        return n not in ends and (known or isinstance(value(n), torch.SymInt))

    inputs, inside = cone(ends, given)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph = Graph()
    copies: dict[Node, Any] = {}
    for n in inputs:
        held = _held(gm, n)
        if not isinstance(held, torch.Tensor):
            copies[n] = number(held)
            continue
        taught = n in facts.differentiable and held.dtype.is_floating_point
        with mode, torch.no_grad():
            sizes, strides = ([number(x) for x in found] for found in (held.shape, held.stride()))
            fake = torch.empty_strided(sizes, strides, dtype=held.dtype, device=held.device)
        copies[n] = graph.placeholder(n.name)
        copies[n].meta = {"example_value": fake.requires_grad_(taught), "operand": n in operands}
    regions = [graph.node_copy(n) for n in _autocast_around(gm, ends[0])]
    for n in inside:
        copies[n] = graph.node_copy(n, lambda a: copies[a])
    for region in reversed(regions):
        graph.call_function(EXIT, (region,))
    graph.output(tuple(copies[n] for n in ends))
    return GraphModule(torch.nn.Module(), graph)


def base_of(n: Node) -> Node:
    """Return the node that a node is a view of: Inductor's patterns need to see how the keys are transposed."""
    while n.op == "call_function" and op_name(n) in VIEWS and isinstance(n.args[0], Node) and is_tensor(n.args[0]):
        n = n.args[0]
    return n


def _held(gm: GraphModule, n: Node) -> Any:
    return getattr(gm, str(n.target)) if n.op == "get_attr" else value(n)


def _autocast_around(gm: GraphModule, final: Node) -> list[Node]:
    """Return the nodes that enter the autocast regions around `final`."""
    open_: list[Node] = []
    for n in gm.graph.nodes:
        if n is final:
            break
        if n.target is ENTER:
            open_.append(n)
        elif n.target is EXIT:
            open_.remove(n.args[0])
    return open_
