"""What a whole graph says about its nodes: memory, mutation, regions, gradients, order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnfx.ir.reach import reach
from attnfx.passes.fx.nodes import is_tensor, op_name, value


def written_operands(n: Node) -> list[Node]:
    """The operands that an operator writes in place, by its schema."""
    schema = getattr(n.target, "_schema", None)
    if n.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    out = []
    for position, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            given = n.args[position] if position < len(n.args) else n.kwargs.get(arg.name)
            for x in given if isinstance(given, list | tuple) else [given]:
                if isinstance(x, Node):
                    out.append(x)
    return out


def storage(n: Node) -> int | None:
    """Which memory a node's value lives in: nodes that alias share it."""
    held = value(n)
    return held.untyped_storage()._cdata if isinstance(held, torch.Tensor) and held.layout == torch.strided else None


class Facts:
    """Facts of one graph, valid while it does not change.

    position        where a node stands
    mutations       positions at which each memory is written in place
    given           the memory of inputs
    regions         for each node the grad mode set in the graph (None: none), and what autocast regions change there
    differentiable  nodes whose value may take a gradient (example values are snapshots that do not know)
    """

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self.position = {n: p for p, n in enumerate(gm.graph.nodes)}
        self.mutations: dict[int, list[int]] = {}
        for n in gm.graph.nodes:
            for at in written_operands(n):
                key = storage(at)
                if key is not None:
                    self.mutations.setdefault(key, []).append(self.position[n])
        self.written = frozenset(n for n in gm.graph.nodes if self.mutations and storage(n) in self.mutations)
        self.given = {storage(n) for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")}
        self.regions = _regions(gm)
        self.frozen = frozenset(n for n, (grad, _) in self.regions.items() if grad is False)
        self.differentiable = self._differentiable()

    def _differentiable(self) -> set[Node]:
        """Nodes whose value may take a gradient: example values are snapshots that do not know."""
        out: set[Node] = set()
        for n in self.gm.graph.nodes:
            held = n.meta.get("example_value") if n.op == "placeholder" else value(n)
            if n.op == "get_attr":
                held = getattr(self.gm, str(n.target), None)
            if n.op in ("placeholder", "get_attr"):
                if isinstance(held, torch.Tensor) and held.requires_grad:
                    out.add(n)
            elif (
                any(a in out for a in n.all_input_nodes)
                and self.regions[n][0] is not False
                and "detach" not in op_name(n)
            ):
                if not isinstance(held, torch.Tensor) or held.dtype.is_floating_point:
                    out.add(n)
        return out

    def descends(self, node: Node, origin: Node) -> bool:
        """Whether `node` is computed from `origin`. Only what stands between the two is visited."""
        first = self.position[origin]
        return origin in reach([node], lambda n: [a for a in n.all_input_nodes if self.position.get(a, -1) >= first])

    def input_writer(self, base: Node) -> Node | None:
        """What writes in place to the memory of `base`, where that is an input's."""
        key = storage(base)
        if key is None or key not in self.mutations or key not in self.given:
            return None
        at = self.mutations[key][0]
        return next(n for n, position in self.position.items() if position == at)

    def changed_before(self, base: Node, final: Node) -> Node | None:
        """What writes, before `final`, to memory that the attention there read through some view of `base`."""
        key = storage(base)
        if key is None or key not in self.mutations:
            return None
        cone = set(reach([final], lambda n: n.all_input_nodes))
        reads = [
            self.position[u]
            for n in cone
            if storage(n) == key
            for u in n.users
            if u in cone and storage(u) != key and not written_operands(u)
        ]
        first = min(reads, default=self.position[base])
        writes = [at for at in self.mutations[key] if first < at < self.position[final]]
        return next(n for n, at in self.position.items() if at == writes[0]) if writes else None

    def changed_after(self, node: Node) -> bool:
        """Whether the memory of a node is written in place after the node."""
        return any(at > self.position[node] for at in self.mutations.get(storage(node), ()))  # type: ignore[arg-type]

    def casts(self, n: Node) -> bool:
        """Whether autocast rounds what a product would read in the place of the node."""
        device, changed = value(n).device.type, dict(self.regions[n][1])
        return (changed[device] if device in changed else _around(device)) is not None


def cone(ends: Sequence[Node], is_input: Callable[[Node], bool]) -> tuple[list[Node], list[Node]]:
    """What the ends are computed from: (inputs, nodes between), each in the order of the graph."""
    seen = set(reach(ends, lambda n: [] if is_input(n) else n.all_input_nodes))
    nodes = [n for n in ends[0].graph.nodes if n in seen]
    return [n for n in nodes if is_input(n)], [n for n in nodes if not is_input(n)]


def between(origins: Collection[Node], end: Node) -> set[Node]:
    """The origins, and the nodes that lead from them to `end`."""
    first, found = min(origins, default=end), set(origins)
    above = reach([end], lambda n: [] if n in origins else [a for a in n.all_input_nodes if not a < first])
    for n in sorted(above):
        if any(a in found for a in n.all_input_nodes):
            found.add(n)
    return found


def detached(ends: Iterable[Node], inputs: Collection[Node]) -> set[Node]:
    """Those of `inputs` that the ends are computed from, and that no gradient of the ends comes to."""
    ends = list(ends)
    far = set(inputs) - _behind(ends, inputs, lambda n: "detach" not in op_name(n))
    return far & _behind(ends, inputs, lambda n: True) if far else far


def _behind(ends: Iterable[Node], inputs: Collection[Node], through: Callable[[Node], bool]) -> set[Node]:
    """The nodes up to `inputs` that floating values come from, through such nodes alone."""

    def before(n: Node) -> list[Node]:
        return [a for a in n.all_input_nodes if _may_learn(a)] if n not in inputs and through(n) else []

    return set(reach(ends, before))


def _may_learn(n: Node) -> bool:
    return not is_tensor(n) or value(n).is_floating_point()


Autocast = frozenset[tuple[str, torch.dtype | None]]


def _regions(gm: GraphModule) -> dict[Node, tuple[bool | None, Autocast]]:
    """For each node: the grad mode set in the graph, and what autocast regions change there: by device, the type that
    is cast to, None where casting is switched off. A region that changes nothing is none."""
    grad: bool | None = None
    open_regions: dict[Node, tuple[str, torch.dtype | None]] = {}
    out: dict[Node, tuple[bool | None, Autocast]] = {}
    changed: Autocast = frozenset()
    for n in gm.graph.nodes:
        if n.target is torch._C._set_grad_enabled:
            grad = bool(n.args[0])
        elif n.target in (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast):
            if n.target is torch.amp.autocast_mode._enter_autocast:
                open_regions[n] = _cast_to(n)
            else:
                open_regions.pop(n.args[0], None)  # type: ignore[arg-type]
            inner = dict(open_regions.values())  # the innermost of a device counts
            changed = frozenset((d, to) for d, to in inner.items() if to != _around(d))
        out[n] = (grad, changed)
    return out


def _cast_to(enter: Node) -> tuple[str, torch.dtype | None]:
    named = ("device_type", "dtype", "enabled")
    given: dict[str, Any] = dict(zip(named, enter.args, strict=False)) | dict(enter.kwargs)
    device = given["device_type"]
    dtype = given.get("dtype") or torch.get_autocast_dtype(device)
    return device, dtype if given.get("enabled", True) else None


def _around(device: str) -> torch.dtype | None:
    """What the caller's own autocast casts to: Dynamo compiles anew where that changes."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def written(facts: Facts, nodes: Sequence[Node]) -> bool:
    """Whether something writes in place to what nodes are or read."""
    return any(x in facts.written for n in nodes for x in (n, *n.all_input_nodes))
