"""Copy a graph, and carry values that refer to its nodes over to the copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import Any, TypeVar

from torch.fx import Graph, GraphModule, Node

T = TypeVar("T")


def copied(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """Return a copy of a graph module that shares its attributes, and a map from each node to its copy."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    made = GraphModule(gm, graph)
    made.meta.update(gm.meta)
    old, new = (next(iter(g.find_nodes(op="output"))) for g in (gm.graph, graph))
    new.meta, copies[old] = dict(old.meta), new
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    return made, copies


def inlined(gm: GraphModule, before: Node, body: GraphModule, given: Iterable[Any]) -> tuple[Any, list[Node]]:
    """Insert a copy of a body's nodes before a node, with `given` in place of the body's inputs. The module takes over
    the attributes that they read. Return the body's results and the new nodes."""
    values: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
    inputs = set(values)
    with gm.graph.inserting_before(before):
        results = gm.graph.graph_copy(body.graph, values)
    made = [values[n] for n in body.graph.nodes if n in values and n not in inputs]
    for n in made:
        if n.op in ("get_attr", "call_module"):
            held, name = attrgetter(str(n.target))(body), str(n.target).replace(".", "_")
            while getattr(gm, name, held) is not held:
                name += "_"
            setattr(gm, name, held)
            n.target = name
    return results, made


def carried(x: T, copies: Mapping[Node, Node]) -> T:
    """Return a value with each node replaced by its copy, in tuples, lists, sets, dicts and data classes at any depth.
    Expressions name variables and are the same in both graphs."""
    return _carried(x, copies)


def _carried(x: Any, copies: Mapping[Node, Node]) -> Any:
    if isinstance(x, Node):
        return copies[x]
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_carried(a, copies) for a in x))
    if isinstance(x, tuple | list | set | frozenset):
        return type(x)(_carried(a, copies) for a in x)
    if isinstance(x, dict):
        return {_carried(k, copies): _carried(v, copies) for k, v in x.items()}
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: _carried(getattr(x, f.name), copies) for f in fields(x) if f.init})
    return x
