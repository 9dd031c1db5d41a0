"""Expand vmap: replace its body by ATen operators on tensors that have the mapped dimensions.

Dynamo leaves `torch.vmap` in the graph as calls that enter a level, mark a dimension of each operand, and leave the
level again. `run` executes each outermost level like functorch, by its batching rules, and replaces it by the operators
that these call. Then the attention of a vmapped function, or a mask made by one, reads like any other.

A level stays as it was if its body draws random numbers, writes to its inputs, or switches autocast or gradients: its
operators would mean something else outside.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch._functorch.predispatch as functorch
import torch.fx.traceback as fx_traceback
from torch._C._functorch import maybe_current_level
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnfx.passes.fx.analysis import is_random
from attnfx.passes.fx.copies import copied, inlined
from attnfx.passes.fx.examples import example
from attnfx.passes.lift.graph import Graph

ENTER, LEAVE = functorch._vmap_increment_nesting, functorch._vmap_decrement_nesting
PREPARE = functorch.lazy_load_decompositions
LEVELS = (ENTER, LEAVE, PREPARE, functorch._add_batch_dim, functorch._remove_batch_dim)
# Operators of functorch that change the meaning of others; grad and jvp have other names in graphs.
TRANSFORMS = ("_functorch", "functorch", "_vmap_increment_nesting", "_grad_increment_nesting")


def uses_functorch(gm: GraphModule) -> bool:
    """Return whether the graph has vmap or func.grad operators: it must then pass through untouched."""
    return any(_transforms(n) for n in gm.graph.nodes)


def _transforms(n: Node) -> bool:
    name = f"{getattr(n.target, '__module__', '')}.{getattr(n.target, '__name__', '')}"
    return n.op == "call_function" and any(mark in name for mark in TRANSFORMS)


def run(graph: Graph) -> int:
    """Expand every vmap of a Dynamo graph that can be expanded, in a new module; return how many were."""
    gm = graph.gm
    levels = [x for x in _outermost(gm.graph) if all(map(_understood, x))]
    if not levels or maybe_current_level() is not None:
        return 0
    found = [(level, *body) for level in levels if (body := _written_out(graph, level)) is not None]
    if not found:
        return 0
    graph.gm, copies = copied(gm)
    for level, body, given, results in found:
        made, _ = inlined(graph.gm, copies[level[0]], body, (copies[x] for x in given))
        for x, new in zip(results, made, strict=True):
            copies[x].replace_all_uses_with(new, propagate_meta=False)
            new.meta["example_value"] = x.meta["example_value"]
        for x in reversed(level):
            graph.gm.graph.erase_node(copies[x])
    for n in graph.gm.graph.find_nodes(op="call_function", target=PREPARE):
        graph.gm.graph.erase_node(n)
    graph.gm.recompile()
    return len(found)


def _outermost(graph: FxGraph) -> Iterator[list[Node]]:
    """Yield the nodes of each outermost level, from the node that enters it to the node that leaves it."""
    depth, level = 0, []
    for n in graph.nodes:
        depth += n.target is ENTER
        if depth:
            level.append(n)
        if n.target is LEAVE:
            depth -= 1
            if not depth:
                yield level
                level = []


def _understood(n: Node) -> bool:
    if n.op == "call_function":
        name = getattr(n.target, "__name__", "")
        modes = "autocast" in name or "grad_enabled" in name or "inference_mode" in name
        return n.target in LEVELS or not (modes or _transforms(n) or isinstance(n.target, HigherOrderOperator))
    return n.op == "call_method"


def _written_out(graph: Graph, level: list[Node]) -> tuple[GraphModule, list[Node], list[Node]] | None:
    """Return (a level's body over plain tensors, its inputs, its results), or None if the level must stay."""
    inside = set(level)
    given = list(dict.fromkeys(a for n in level for a in n.all_input_nodes if a not in inside))
    results = [n for n in level if any(u not in inside for u in n.users)]
    held = [n.meta.get("example_value", n.meta.get("val")) for n in (*given, *results)]
    if any(x is None for x in held) or not all(isinstance(x, torch.Tensor) for x in held[len(given) :]):
        return None
    part, values = FxGraph(), {}
    for n in given:
        values[n] = part.placeholder(n.name)
    for n in level:
        values[n] = part.node_copy(n, values.__getitem__)
    part.output([values[n] for n in results])
    run = Interpreter(GraphModule(graph.gm, part))
    examples = [example(x, graph.mode) for x in held[: len(given)]]
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in examples]
    try:
        with fx_traceback.preserve_node_meta():
            body = make_fx(run.run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    except Exception:
        while maybe_current_level() is not None:  # leave the levels that it entered
            LEAVE()
        return None
    body.graph.eliminate_dead_code()
    return None if any(_changes_or_draws(n) for n in body.graph.nodes) else (body, given, results)


def _changes_or_draws(n: Node) -> bool:
    op = n.target
    return isinstance(op, OpOverload) and (op._schema.is_mutable or is_random(op))
