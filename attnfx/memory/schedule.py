"""Model the order in which Inductor runs kernels, and its estimate of the bytes alive at each.

Inductor compares four orders by an estimate of their peak and takes the best (torch/_inductor/memory.py,
reorder_for_peak_memory): the graph's own order; always the ready kernel that leaves the least memory; always the kernel
whose operands were ready first; and depth first, light operands first. The estimate includes values that only their own
kernel reads, and ignores that values may overwrite others.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from attnfx.ir.reach import postorder
from attnfx.memory.fusion import Kernel


@dataclass(eq=False)
class Node:
    """A step of the compiler's schedule: a kernel, or one part of a kernel's results.

    index      its place in the graph's own order
    takes      bytes allocated for it
    gives      value -> bytes freed after its last reader
    after      its predecessors; `before` has its successors
    """

    kernel: Kernel
    index: int
    takes: int
    gives: Mapping[str, int]
    reads: tuple[str, ...]
    after: set[Node] = field(default_factory=set)
    before: set[Node] = field(default_factory=set)


@dataclass
class Schedule:
    """Nodes in an order.

    given   earlier values that the graph owns and frees, in bytes by name
    kept    the values that outlive the graph
    """

    nodes: list[Node]
    given: Mapping[str, int]
    kept: frozenset[str]

    def kernels(self) -> dict[int, Kernel]:
        """Return the kernels by place; the parts of a call's result are separate nodes after it."""
        first: dict[str, int] = {}
        for n, node in enumerate(self.nodes):
            first.setdefault(node.kernel.name, n)
        return {n: self.nodes[n].kernel for n in first.values()}

    def alive(self) -> list[int]:
        """Return the bytes alive at each node, without values that died at the node before."""
        change = [0] * (len(self.nodes) + 1)
        last = {value: n for n, node in enumerate(self.nodes) for value in (*node.gives, *node.reads)}
        for value, size in self.given.items():
            change[0] += size
            if value not in self.kept and value in last:
                change[last[value] + 1] -= size
        for n, node in enumerate(self.nodes):
            change[n] += node.takes
            for value, size in node.gives.items():
                if value not in self.kept:
                    change[last[value] + 1] -= size
        out, now = [], 0
        for c in change:
            now += c
            out.append(now)
        return out

    def size(self) -> dict[str, int]:
        """Return the bytes of each value that the graph may free."""
        return dict(self.given) | {value: size for node in self.nodes for value, size in node.gives.items()}


def best(kernels: Sequence[Kernel], given: Mapping[str, int], kept: Iterable[str]) -> Schedule:
    """Return the order that the compiler takes. `given` has the bytes of earlier values that it may free; `kept` has
    the values that it must not free."""
    nodes = _nodes(kernels)
    read = {value for node in nodes for value in node.reads}
    first = Schedule(nodes, {v: size for v, size in given.items() if v in read}, frozenset(kept))
    orders = [nodes, _least(first), _first_ready(nodes), _depth_first(first)]
    return min((Schedule(order, first.given, first.kept) for order in orders), key=lambda s: max(s.alive()))


def _nodes(kernels: Sequence[Kernel]) -> list[Node]:
    out: list[Node] = []
    made: dict[str, Node] = {}  # value -> its last writer
    users: dict[str, list[Node]] = defaultdict(list)  # value -> its readers since then
    read = {r for k in kernels for r in (*k.reads, *k.changes)}

    def add(kernel: Kernel, takes: int, gives: Mapping[str, int], reads: Sequence[str], changes: Sequence[str]) -> Node:
        node = Node(kernel, len(out), takes, gives, tuple(dict.fromkeys((*reads, *changes))))
        out.append(node)
        node.after = {made[r] for r in node.reads if r in made} | {u for c in changes for u in users[c]}
        for value in node.reads:
            users[value].append(node)
        for value in (*gives, *changes):
            made[value] = node
            users[value] = []
        return node

    for k in kernels:
        sizes = {w.name: w.bytes for w in k.writes}
        if k.joins:  # the estimate counts the parts in addition to the whole that contains them
            parts, size = f"{k.name}()", sum(sizes.values())
            add(k, size, {parts: size}, k.reads, k.changes)
            add(k, size, sizes, [parts], ())
            continue
        if not k.parts:
            sizes |= {w.name: w.bytes for w in k.inner}
            add(k, sum(sizes.values()), sizes, k.reads, k.changes)
            continue
        # a call that creates its own results, and each result that is used
        parts = {name: size for name, size in sizes.items() if name in read or not name.endswith("]")}
        whole = f"{k.name}()"
        add(k, sum(parts.values()), {whole: 0}, k.reads, k.changes)
        for name, size in parts.items():
            add(k, 0, {name: size}, [whole], ())
    for node in out:
        node.after.discard(node)
        for source in node.after:
            source.before.add(node)
    return out


def _least(schedule: Schedule) -> list[Node]:
    """Order by memory: the next ready node keeps the peak so far and leaves the least (topological_sort_lpmf)."""
    nodes, kept, size = schedule.nodes, schedule.kept, schedule.size()
    users: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        for value in node.reads:
            users[value].append(node)
    left = {value: len(users.get(value, ())) + (value in kept) for value in (*users, *kept)}
    waits = {node: len(node.after) for node in nodes}
    frees = {
        node: sum(size.get(v, 0) for v in node.reads if left[v] == 1)
        + sum(b for v, b in node.gives.items() if not left.get(v, 0))
        for node in nodes
    }
    live = sum(schedule.given.values())
    most = max(live, sum(size.get(v, 0) for v in kept))
    ready = [node for node in nodes if not waits[node]]
    out: list[Node] = []
    while ready:
        gap = most - live
        node = min(ready, key=lambda n: (n.takes if n.takes > gap else 0, n.takes - frees[n], n.index))
        ready.remove(node)
        out.append(node)
        live += node.takes
        most = max(most, live)
        live -= frees[node]
        for reader in node.before:
            waits[reader] -= 1
            if not waits[reader]:
                ready.append(reader)
        for value in node.reads:
            left[value] -= 1
            if left[value] == 1:
                for user in users[value]:
                    frees[user] += size.get(value, 0)
    return out


def _first_ready(nodes: Sequence[Node]) -> list[Node]:
    """Order breadth first: next is the node whose operands were computed first (topological_sort_bfs)."""
    waits = {node: len(node.after) for node in nodes}
    place: dict[Node, int] = {}
    ready: list[tuple[list[int], int, Node]] = [([], node.index, node) for node in nodes if not waits[node]]
    heapq.heapify(ready)
    out: list[Node] = []
    while ready:
        node = heapq.heappop(ready)[2]
        place[node] = len(out)
        out.append(node)
        for reader in node.before:
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, (sorted(place[a] for a in reader.after), reader.index, reader))
    return out


def _depth_first(schedule: Schedule) -> list[Node]:
    """Order depth first, nodes that allocate and read few bytes first (topological_sort_dfs)."""
    size = schedule.size()
    weight = {node: node.takes + sum(size.get(v, 0) for v in node.reads) for node in schedule.nodes}

    def light(nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=lambda n: (weight[n], n.index))

    return postorder(light(schedule.nodes), lambda node: light(node.after))
