"""Analyze a whole graph: memory, in-place writes, regions, gradients and node order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from attnfx.ir.reach import reach
from attnfx.passes.fx.nodes import arguments, dims, is_tensor, op_name, value


def written_operands(n: Node) -> list[Node]:
    """Return the operands that an operator writes in place, according to its schema."""
    schema = getattr(n.target, "_schema", None)
    if n.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    given = arguments(n)
    written = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in tree_leaves(written) if isinstance(x, Node)]


def is_random(op: object) -> bool:
    """Return whether an operator draws random numbers, so that a second call returns another result."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def pure(n: Node) -> bool:
    """Return whether a node only computes a value from its operands: it does not write in place, set a mode or hold a
    graph of its own. It may still be random."""
    if n.op != "call_function":
        return n.op in ("get_attr", "call_method")
    known = isinstance(n.target, torch._ops.OpOverload) or getattr(n.target, "__module__", "") == "_operator"
    return known and not written_operands(n)


def storage(n: Node) -> int | None:
    """Return an id of the memory that holds a node's value, None without strided memory. Aliases share it."""
    held = value(n)
    return held.untyped_storage()._cdata if isinstance(held, torch.Tensor) and held.layout == torch.strided else None


# Operators that may return their operand itself, which then keeps its gradient, also under no_grad.
IDENTITIES = ("contiguous", "to", "type_as", "flatten", "positive", "real", "resolve_conj", "resolve_neg")


def returns_operand(n: Node) -> bool:
    """Return whether an operator returns its first operand itself, not a view or a copy of it."""
    if op_name(n) in ("dropout", "feature_dropout"):
        given = arguments(n)
        return given["train"] is False or given["p"] == 0
    if written := written_operands(n):
        return is_tensor(n) and n.args[:1] == (written[0],)
    x = n.args[0] if op_name(n) in IDENTITIES else None
    return isinstance(x, Node) and is_tensor(x) and storage(n) == storage(x) and dims(n) == dims(x)


GIVEN = ("placeholder", "get_attr")  # kinds of nodes whose values the graph does not compute


class Facts:
    """Facts about one graph, valid while it does not change, or changes only as `grow` describes.

    families        memory -> the nodes whose values it holds
    mutations       memory -> the nodes that write it in place
    written         nodes whose memory is written in place
    given           memory of the placeholders and attributes
    regions         node -> (grad mode set in the graph, None before the first; changes by autocast regions)
    frozen          nodes in a region without gradients
    draws           whether an operator draws random numbers
    differentiable  nodes whose value may require a gradient (example values are snapshots that do not tell)
    """

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self.families: dict[int | None, list[Node]] = {}
        self.mutations: dict[int | None, list[Node]] = {}
        for n in gm.graph.nodes:
            self._remember(n)
        self.written = {n for key in self.mutations for n in self.families[key]}
        self.given = {storage(n) for n in gm.graph.nodes if n.op in GIVEN}
        self.draws = any(n.op == "call_function" and is_random(n.target) for n in gm.graph.nodes)
        self.regions = _regions(gm)
        self.frozen = {n for n in self.regions if self._is_frozen(n)}
        self.differentiable = self._differentiable()

    def _remember(self, n: Node) -> set[int | None]:
        """Take up a node's memory, and the memory that it writes; return the latter."""
        if (key := storage(n)) is not None:
            self.families.setdefault(key, []).append(n)
        written = {storage(x) for x in written_operands(n)} - {None}
        for key in written:
            self.mutations.setdefault(key, []).append(n)
        return written

    def _is_frozen(self, n: Node) -> bool:
        return self.regions[n][0] is False and not returns_operand(n)

    def grow(self, made: Iterable[Node]) -> None:
        """Take up new nodes that compute values of old ones again, and that write to new memory alone. Their readers
        may have been readers of the old nodes; none was erased. The time depends on the new nodes alone."""
        for n in sorted(n for n in made if n not in self.regions and n.prev.next is n):
            self.regions[n] = self.regions.get(n.prev, (None, frozenset()))
            written = self._remember(n)
            self.written.update(x for key in written for x in self.families[key])
            if storage(n) in self.mutations:
                self.written.add(n)
            if self._is_frozen(n):
                self.frozen.add(n)
            if not self.differentiable.isdisjoint(n.all_input_nodes):
                shared = (x for key in written for x in self.families[key])
                self.differentiable.update(filter(self._learns, (n, *shared)))

    def _learns(self, n: Node) -> bool:
        """Return whether a node's value requires a gradient if an operand of it does."""
        return n.op not in GIVEN and n not in self.frozen and "detach" not in op_name(n) and _may_learn(n)

    def _differentiable(self) -> set[Node]:
        """Return the nodes whose value may require a gradient. A write of such a value into a tensor makes all nodes
        that share its memory differentiable."""

        def after(n: Node) -> Iterator[Node]:
            shared = (x for at in written_operands(n) for x in self.families.get(storage(at), ()))
            return filter(self._learns, (*n.users, *shared))

        starts = []
        for n in self.gm.graph.nodes:
            held = getattr(self.gm, str(n.target), None) if n.op == "get_attr" else n.meta.get("example_value")
            if n.op in GIVEN and isinstance(held, torch.Tensor) and held.requires_grad:
                starts.append(n)
        return set(reach(starts, after))

    def descends(self, node: Node, origin: Node) -> bool:
        """Return whether `node` is computed from `origin`. Visits only the nodes between the two."""
        return origin in reach([node], lambda n: [a for a in n.all_input_nodes if not a < origin])

    def input_writer(self, base: Node) -> Node | None:
        """Return the first node that writes to the memory of `base` in place, if an input owns it; else None."""
        key = storage(base)
        return self.mutations[key][0] if key in self.mutations and key in self.given else None

    def changed_before(self, base: Node, final: Node, sources: Collection[Node]) -> Node | None:
        """Return the first write to the memory of `base` between its first read and `final`, or None. Reads count if
        they are between `sources` or `base` and `final`, through any view of the memory."""
        key = storage(base)
        if key not in self.mutations:
            return None
        cone = set(reach([final], lambda n: [] if n is base or n in sources else n.all_input_nodes))
        reads = [
            u
            for n in cone
            if storage(n) == key
            for u in n.users
            if u in cone and storage(u) != key and not written_operands(u)
        ]
        first = min(reads, default=base)
        return next((n for n in self.mutations[key] if first < n < final), None)

    def changed_after(self, node: Node, before: Node | None = None, after: Node | None = None) -> bool:
        """Return whether the memory of a node is written in place after the node, or after the node `after`, and before
        the node `before`."""
        writes = self.mutations.get(storage(node), ())
        return any((after or node) < n and (before is None or n < before) for n in writes)

    def casts(self, n: Node) -> bool:
        """Return whether autocast would round the operands of a product in the node's place."""
        device, changed = value(n).device.type, dict(self.regions[n][1])
        return (changed[device] if device in changed else _around(device)) is not None


def cone(ends: Sequence[Node], is_input: Callable[[Node], bool]) -> tuple[list[Node], list[Node]]:
    """Return (inputs, other nodes) that the ends are computed from, in graph order. The search stops at inputs."""
    seen = set(reach(ends, lambda n: [] if is_input(n) else n.all_input_nodes))
    nodes = [n for n in ends[0].graph.nodes if n in seen]
    return [n for n in nodes if is_input(n)], [n for n in nodes if not is_input(n)]


def between(origins: Collection[Node], end: Node) -> set[Node]:
    """Return the origins and all nodes on the paths from them to `end`."""
    first, found = min(origins, default=end), set(origins)
    above = reach([end], lambda n: [] if n in origins else [a for a in n.all_input_nodes if not a < first])
    for n in sorted(above):
        if any(a in found for a in n.all_input_nodes):
            found.add(n)
    return found


Descendants = dict[Node, dict[Node, int]]  # node -> the nearest seeds, at most 8, with their distances


def descendants(
    seeds: Iterable[Node], through: Iterable[Node], kept: Callable[..., bool] | None = None, near: int = 1
) -> Descendants:
    """Map each node that descends from a seed to the nearest seeds. Paths contain only the nodes `through`, in graph
    order. The distance counts the nodes since `kept(node, operand, seed)` held, and is less than `near`."""
    out: Descendants = {n: {n: 0} for n in seeds}
    for n in through:
        found: dict[Node, int] = {}
        for a in n.all_input_nodes if n not in out else ():
            for s, before in out.get(a, {}).items():
                far = 0 if kept is None or kept(n, a, s) else before + 1
                if far < near:
                    found[s] = min(found.get(s, far), far)
        if found:
            out[n] = dict(islice(found.items(), 8))
    return out


def seeds_of(found: Descendants, *nodes: Node) -> list[Node]:
    """Return the nearest seeds that the operands of the nodes descend from."""
    return list(dict.fromkeys(s for n in nodes for a in n.all_input_nodes for s in found.get(a, ())))


def learning(ends: Iterable[Node], inputs: Collection[Node]) -> set[Node]:
    """Return the `inputs` that receive a gradient from the ends; another one gets None in eager, not zeros."""
    ends = list(ends)
    found = set(reach(ends, lambda n: [] if n in inputs else taught_operands(n)))
    if behind := [n for n in inputs if n not in found and _may_learn(n)]:
        # an input may also be a step on the way to another one, as values that are the scores too
        first = min(behind)
        found.update(reach(ends, lambda n: [a for a in taught_operands(n) if not a < first]))
    return found.intersection(inputs)


def taught_operands(n: Node) -> list[Node]:
    """Return the operands that a gradient of a node may flow to: not one of which only the shape is read."""
    name = op_name(n)
    if "detach" in name or name.endswith("_like") or name.startswith("new_"):
        return []
    operands = n.all_input_nodes[:1] if name.endswith("_as") else n.all_input_nodes
    return list(filter(_may_learn, operands))


def _may_learn(n: Node) -> bool:
    held = value(n)
    if isinstance(held, torch.Tensor):
        return held.is_floating_point() or held.is_complex()
    return not isinstance(held, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


Autocast = frozenset[tuple[str, torch.dtype | None]]


def _regions(gm: GraphModule) -> dict[Node, tuple[bool | None, Autocast]]:
    """Map each node to (grad mode set in the graph, changes by autocast regions). A change is (device, dtype that
    operands are cast to), or None as the dtype if casting is switched off. Regions that change nothing are left out."""
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
            inner = dict(open_regions.values())  # the innermost region of a device counts
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
    """Return the dtype that the caller's own autocast casts to. Dynamo recompiles when it changes."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def written(facts: Facts, nodes: Sequence[Node]) -> bool:
    """Return whether any of the nodes or their operands is written in place."""
    return any(x in facts.written for n in nodes for x in (n, *n.all_input_nodes))
