"""vmap written out: its body becomes ATen on tensors that have the mapped dimensions.

Dynamo leaves `torch.vmap` in the graph as calls that enter a level, mark a dimension of each operand, and leave the
level again. `flatten` runs each outermost level as functorch would, by its batching rules, and puts the operators that
these call in its place, so that the attention of a vmapped function, or a mask made by one, is read as any other.

A level whose body draws random numbers, changes what it is given, or switches autocast or gradients stays as it was:
its operators would mean something else outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
import torch._functorch.predispatch as functorch
import torch.fx.traceback as fx_traceback
from torch._C._functorch import maybe_current_level
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

ENTER, LEAVE = functorch._vmap_increment_nesting, functorch._vmap_decrement_nesting
PREPARE = functorch.lazy_load_decompositions
LEVELS = (ENTER, LEAVE, PREPARE, functorch._add_batch_dim, functorch._remove_batch_dim)
# Operators of functorch that change what the others mean; grad and jvp stand in graphs under other names.
TRANSFORMS = ("_functorch", "functorch", "_vmap_increment_nesting", "_grad_increment_nesting")


def uses_functorch(gm: GraphModule) -> bool:
    """Whether vmap or func.grad operators stand in the graph: it must pass through untouched."""
    return any(_transforms(n) for n in gm.graph.nodes)


def _transforms(n: Node) -> bool:
    name = f"{getattr(n.target, '__module__', '')}.{getattr(n.target, '__name__', '')}"
    return n.op == "call_function" and any(mark in name for mark in TRANSFORMS)


def flatten(gm: GraphModule, example: Callable[[Any], Any]) -> GraphModule:
    """A Dynamo graph with every vmap written out that can be: `gm` itself where there is none, which is not changed.

    `example` makes a fake of its own out of a node's value.
    """
    levels = [x for x in _outermost(gm.graph) if all(map(_understood, x))]
    if not levels or maybe_current_level() is not None:
        return gm
    written = {}
    for level in levels:
        found = _written_out(gm, level, example)
        if found is not None:
            written[level[0]] = level, *found
    graph, values, skipped, held = Graph(), {}, set(), {}
    for n in gm.graph.nodes:
        if n in written:
            level, body, given, results = written[n]
            skipped.update(level)
            for x in body.graph.nodes:
                if x.op == "get_attr":
                    held[f"{n.name}{x.target}"] = attrgetter(str(x.target))(body)
                    x.target = f"{n.name}{x.target}"
            holders = (x for x in body.graph.nodes if x.op == "placeholder")
            inner = dict(zip(holders, (values[x] for x in given), strict=True))
            made = graph.graph_copy(body.graph, inner)
            for x, new in zip(results, made, strict=True):  # type: ignore[arg-type]
                values[x] = new
                new.meta["example_value"] = x.meta["example_value"]
        elif n not in skipped and n.target is not PREPARE:
            values[n] = graph.node_copy(n, values.__getitem__)
            if n.op in ("get_attr", "call_module"):
                held[str(n.target)] = attrgetter(str(n.target))(gm)
    flat = GraphModule(held, graph)
    flat.meta.update(gm.meta)
    return flat


def _outermost(graph: Graph) -> Iterator[list[Node]]:
    """The nodes of each outermost level, from that which enters it to that which leaves it."""
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


def _written_out(
    gm: GraphModule, level: list[Node], example: Callable[[Any], Any]
) -> tuple[GraphModule, list[Node], list[Node]] | None:
    """A level's body over plain tensors, what it is given and what it gives; None where it must stay as it was."""
    inside = set(level)
    given = list(dict.fromkeys(a for n in level for a in n.all_input_nodes if a not in inside))
    results = [n for n in level if any(u not in inside for u in n.users)]
    held = [n.meta.get("example_value", n.meta.get("val")) for n in (*given, *results)]
    if any(x is None for x in held) or not all(isinstance(x, torch.Tensor) for x in held[len(given) :]):
        return None
    graph, values = Graph(), {}
    for n in given:
        values[n] = graph.placeholder(n.name)
    for n in level:
        values[n] = graph.node_copy(n, values.__getitem__)
    graph.output([values[n] for n in results])
    run = Interpreter(GraphModule(gm, graph))
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in map(example, held[: len(given)])]
    try:
        with fx_traceback.preserve_node_meta():
            body = make_fx(run.run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    except Exception:
        while maybe_current_level() is not None:  # the levels that it had entered
            LEAVE()
        return None
    body.graph.eliminate_dead_code()
    return None if any(_changes_or_draws(n) for n in body.graph.nodes) else (body, given, results)


def _changes_or_draws(n: Node) -> bool:
    op = n.target
    return isinstance(op, OpOverload) and (op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags)


__all__ = ["flatten", "uses_functorch"]
