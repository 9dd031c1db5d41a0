"""Cut a site out of its graph as a graph module that runs alone: to time it, or to compare it with its rewrite.

A cut graph computes the last nodes of a site from its inputs. To be timed, it begins at the site's operands and
captures, and all sizes are constants, from the example inputs. To be compared, the site is cut out twice from a copy of
its graph, before and after it was rewritten there: the replaced nodes remain in the copy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnfx.passes.fx.analysis import Facts, cone, is_random, pure
from attnfx.passes.fx.dropout import DROPOUTS
from attnfx.passes.fx.nodes import is_tensor, number, op_name, value
from attnfx.passes.lift.tables import VIEWS
from attnfx.report.records import Site

ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


OWN = "attnfx_own"  # marks a constant or a subgraph that a rewrite added, which is cut out with the site


def cut(gm: GraphModule, ends: Sequence[Node], operands: Collection[Node], captures: Sequence[Node]) -> GraphModule:
    """Return a graph module that computes `ends`, with placeholders that carry fakes in `meta["example_value"]`.

    It begins at `operands`, `captures`, and the other inputs of the nodes in between. `meta["operand"]` of a
    placeholder tells whether it is an operand. A placeholder that may take a gradient requires one. Autocast regions
    around the first end are entered again.
    """
    facts = Facts(gm)

    def given(n: Node) -> bool:
        known = n in operands or n in captures or n.op == "placeholder" or (n.op == "get_attr" and OWN not in n.meta)
        return n not in ends and (known or isinstance(value(n), torch.SymInt))

    nodes, inside = cone(ends, given)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs: dict[Node, Any] = {}
    for n in nodes:
        held = getattr(gm, str(n.target)) if n.op == "get_attr" else value(n)
        if not isinstance(held, torch.Tensor):
            inputs[n] = number(held)
            continue
        taught = n in facts.differentiable and held.dtype.is_floating_point
        with mode, torch.no_grad():
            sizes, strides = ([number(x) for x in found] for found in (held.shape, held.stride()))
            fake = torch.empty_strided(sizes, strides, dtype=held.dtype, device=held.device)
        inputs[n] = {"example_value": fake.requires_grad_(taught), "operand": n in operands}
    return _module(inputs, inside, ends, facts.regions[ends[0]][1])


def base_of(n: Node) -> Node:
    """Return the node that a node is a view of: Inductor's patterns need to see how the keys are transposed."""
    while n.op == "call_function" and op_name(n) in VIEWS and isinstance(n.args[0], Node) and is_tensor(n.args[0]):
        n = n.args[0]
    return n


@dataclass(frozen=True)
class Pair:
    """One site twice: `original` and `rewritten` take the same inputs and return the same results.

    name      the path of its graph and the name of the site's last node
    site      the report's record of the site
    inputs    the nodes of the original graph that hold the inputs
    taught    for each input, whether it may require a gradient
    results   the attention's last node, then sums of its weights and other values read from them
    at        the node of the original graph at which all inputs are available
    """

    name: str
    site: Site
    original: GraphModule
    rewritten: GraphModule
    inputs: tuple[str, ...]
    taught: tuple[bool, ...]
    results: tuple[str, ...]
    at: str


@dataclass(frozen=True)
class Trial:
    """A graph before any rewriting, the sites to compare on its values, and the trials of the bodies of higher-order
    operators in it, by the attribute that holds each body. The graph, run on real inputs, computes the values."""

    gm: GraphModule
    pairs: list[Pair]
    bodies: dict[str, Trial] = field(default_factory=dict)

    def all_pairs(self) -> list[Pair]:
        return [*self.pairs, *(p for inner in self.bodies.values() for p in inner.all_pairs())]


def pair(
    facts: Facts, names: Mapping[Node, str], path: str, site: Site, final: Node, replaced: Sequence[tuple[Node, Node]]
) -> Pair:  # fmt: skip
    """Cut out a site that was rewritten in a copy of its graph. `replaced` are (old, new) nodes of the copy; the old
    nodes must still be in it, with the operands that they had. `facts` are the facts of the copy before any rewriting.
    `names` maps each node that was then in it to its name in the original graph."""
    ends = [old for old, _ in replaced]
    sources, new = cone([n for _, n in replaced], lambda n: n in names)

    def given(n: Node) -> bool:
        # a random or in-place operator is not run again: its result is an input, as are the new nodes' operands
        fixed = n not in ends and (_outside(n) or n in facts.written)
        return n in sources or fixed or n.op in ("placeholder", "get_attr")

    inputs, old = cone(ends, given)
    held = {n: {"val": value(n)} for n in (*sources, *inputs)}
    at = max((*held, min(ends)))
    learns = facts.regions[final][0] is not False
    return Pair(
        f"{path}{names[final]}",
        site,
        _module(held, old, ends),
        _module(held, new, [n for _, n in replaced]),
        tuple(names[n] for n in held),
        tuple(learns and n in facts.differentiable and is_tensor(n) and value(n).is_floating_point() for n in held),
        tuple(n.name for n in ends),
        names[at],
    )


def _outside(n: Node) -> bool:
    """Return whether a node is not computed again: it is random, writes in place, or holds a graph of its own."""
    return not pure(n) or (is_random(n.target) and op_name(n) not in DROPOUTS)


def _module(
    inputs: Mapping[Node, Any], nodes: Iterable[Node], ends: Sequence[Node], regions: Iterable[Any] = ()
) -> GraphModule:
    """Build a graph module from copies of nodes. `inputs` holds the meta of an input's placeholder, or the number that
    replaces the input. `regions` are autocast regions, (device, dtype or None if casting is off), around the nodes."""
    graph, copies = Graph(), {}
    for n, held in inputs.items():
        copies[n] = graph.placeholder(n.name) if isinstance(held, dict) else held
        if isinstance(held, dict):
            copies[n].meta = held
    entered = [graph.call_function(ENTER, (device, to, to is not None, None)) for device, to in regions]
    for n in nodes:
        copies[n] = graph.node_copy(n, lambda a: copies[a])
    for region in reversed(entered):
        graph.call_function(EXIT, (region,))
    graph.output(tuple(copies[n] for n in ends))
    owner = ends[0].graph.owning_module
    return GraphModule(torch.nn.Module() if owner is None else owner, graph)


def weight(gm: GraphModule) -> tuple[int, int]:
    """Return (elements of all computed values, elements of the largest), with the examples' symbolic sizes."""
    computed = [n for n in gm.graph.nodes if n.op == "call_function" and is_tensor(n)]
    sizes = [math.prod(map(number, value(n).shape)) for n in computed]
    return sum(sizes), max(sizes, default=0)
