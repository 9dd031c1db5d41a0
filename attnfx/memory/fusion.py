"""Model Inductor's fusion: the values that a compiled graph stores, and the operations that become one kernel.

Inductor makes two decisions. First, it chooses the values to compute once and store ("realize"): the results of kernels
and reductions, the operands of kernels, the graph's outputs, and values that are read too often, or take too many
operations, to be recomputed by each reader. All other values are inlined. Second, it chooses the loops to run as one
kernel: loops over the same elements, if one reads the other's result or both read the same value, and if no third
kernel must run between them. A stored value that only its own kernel reads is not stored after all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from attnfx.ir.reach import postorder, reach
from attnfx.memory.records import Graph, Op, Result

# torch/_inductor/config.py: realize_reads_threshold, realize_opcount_threshold, realize_acc_reads_threshold (and its
# CPU twin), max_fusion_size
READS, OPERATIONS, ALL_READS, ALL_READS_CPU, FUSED = 4, 30, 8, 12, 64

# Loops whose results are always stored (torch/_inductor/lowering.py: inductor_random, bucketize).
STORED = frozenset(["prims::inductor_random", "bucketize"])

OUT = frozenset(["mm", "bmm", "addmm", "baddbmm"])  # kernels that write their results to memory passed to them
WHOLE = OUT | {"convolution"}  # kernels whose result is not a separate step of the schedule


@dataclass(frozen=True)
class Kernel:
    """Operations that run as one kernel, which reads and writes stored values.

    loop      whether the compiler generates its code: it may then overwrite an operand that dies
    over      result -> the operands that it may overwrite, once all other readers have run
    inner     results that only this kernel reads, so that they are not stored
    own       whether the compiler, not the kernel, allocates its results
    parts     whether it is a call that creates its own results: each is a separate step of the compiler's schedule
    joins     whether its result is written part by part, through views: other values do not reuse this memory
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[Result, ...]
    changes: tuple[str, ...] = ()
    workspace: int = 0
    loop: bool = False
    over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inner: tuple[Result, ...] = ()
    own: bool = False
    parts: bool = False
    joins: bool = False
    flops: int = 0
    dtype: str = "float32"
    where: str = ""


def unfused(graph: Graph) -> list[Kernel]:
    """Return a kernel for each operation, as an interpreter of the graph runs them."""
    base = graph.bases()
    return [
        Kernel(op.name, tuple(dict.fromkeys(base[r] for r in op.reads)), op.results,
               tuple(base[c] for c in op.changes), op.workspace, flops=op.flops, dtype=op.dtype, where=op.where)
        for op in graph.ops if op.kind not in ("input", "view")
    ]  # fmt: skip


@dataclass
class _Body:
    """A value that is not stored: the operations that its readers would run, and the stored values they would read.

    reads   in order; for each, whether some read is of another element than the computed one
    """

    operations: frozenset[str]
    reads: dict[str, bool]
    heavy: bool


@dataclass
class _Loop:
    """A stored value and the loop that computes it, or a kernel. `reads` as in `_Body`."""

    op: Op
    reads: dict[str, bool]
    alone: bool  # whether it never fuses, like a kernel


def _stored(graph: Graph, cpu: bool) -> list[_Loop]:
    """Return the loops and kernels whose results Inductor stores."""
    base = graph.bases()
    readers: dict[str, list[Op]] = defaultdict(list)  # name -> direct readers
    for op in graph.ops:
        for r in dict.fromkeys(op.reads):
            readers[r].append(op)
    outputs = {base[o] for o in graph.outputs}
    changed = {base[c] for op in graph.ops for c in op.changes}
    bodies: dict[str, _Body] = {}
    loops: dict[str, _Loop] = {}  # name of the first value that it stores -> loop
    ops = {r.name: op for op in graph.ops for r in op.results}
    written: dict[str, str] = {}  # value -> the loop that stores it

    def large(body: _Body) -> bool:
        return len(body.operations) > OPERATIONS

    def store(name: str) -> None:
        body = bodies.pop(name, None)
        if body is not None:
            loops[name] = _Loop(ops[name], body.reads, False)
            written[name] = name

    def shared(name: str, users: list[Op]) -> None:
        """Store a value, or the base of a view, if Inductor would do so for its several readers."""
        body = bodies.get(name)
        if body is None or len(users) < 2:
            return
        wanted = any(u.kind == "kernel" for u in users) and len(body.reads) > 1
        if wanted or large(body) or len(body.reads) > READS or (cpu and body.heavy):
            store(name)

    for op in graph.ops:
        if op.kind == "view":
            for r in op.results:
                shared(base[r.name], readers[r.name])
        if op.kind in ("input", "view"):
            continue
        sources = list(dict.fromkeys(base[r] for r in op.reads))
        if op.kind == "kernel":
            for s in sources:
                store(s)
            loops[op.name] = _Loop(op, dict.fromkeys(sources, True), True)
            continue
        inlined = [bodies[s] for s in sources if s in bodies]
        aside = {base[r] for r in op.aside}
        reads: dict[str, bool] = {}
        for s in sources:
            for r, crooked in (bodies[s].reads if s in bodies else {s: False}).items():
                reads[r] = reads.get(r, False) or crooked or s in aside
        if op.kind in ("reduce", "scatter") or (op.target == "cat" and (cpu or not inlined)):
            # on a CPU, each part of a `cat` is a loop over its own elements, which never match a reader's
            apart = cpu and op.target == "cat"
            loops[op.name] = _Loop(op, dict.fromkeys(reads, True) if op.kind == "scatter" else reads, apart)
            continue
        body = _Body(
            frozenset([op.name]).union(*(b.operations for b in inlined)), reads,
            op.heavy or any(b.heavy for b in inlined),
        )  # fmt: skip
        bodies[op.name] = body
        if op.name in outputs or op.name in changed or op.target in STORED:
            store(op.name)
        shared(op.name, readers[op.name])
        if len(reads) > 1 and (large(body) or len(reads) > (ALL_READS_CPU if cpu else ALL_READS)):
            store(op.name)
    return list(loops.values())


def _fits(a: list[_Loop], b: list[_Loop]) -> bool:
    """Return whether two groups run over the same elements: the same rows, or the same elements one by one."""
    rows = {(x.op.outer, x.op.inner, x.op.rows) for g in (a, b) for x in g if x.op.kind == "reduce"}
    if len(rows) > 1:
        return False
    counts = {x.op.outer for g in (a, b) for x in g if x.op.kind != "reduce"}
    if not rows:
        return len(counts) == 1
    outer, inner, last = next(iter(rows))
    return counts <= {outer, outer * inner} if last else counts <= {outer}


def fused(graph: Graph, cpu: bool) -> list[Kernel]:
    """Return the kernels of a graph, in an order in which they can run."""
    loops, base = _stored(graph, cpu), graph.bases()
    size = {r.name: r.bytes for op in graph.ops for r in op.results}
    owner = {r.name: n for n, x in enumerate(loops) for r in x.op.results}
    readers: dict[str, list[int]] = defaultdict(list)
    for n, x in enumerate(loops):
        for r in x.reads:
            readers[r].append(n)
    groups = {n: [x] for n, x in enumerate(loops)}
    into: dict[int, set[int]] = {n: set() for n in groups}  # group -> the groups that read its results
    of = list(range(len(loops)))  # loop -> its group
    for n, x in enumerate(loops):
        for r in x.reads:
            if r in owner and owner[r] != n:
                into[owner[r]].add(n)

    def reaches(start: int, goal: int) -> bool:
        """Return whether a path from one group to another leads through a third."""
        return goal in reach(into[start] - {goal}, into.__getitem__)

    def merge(a: int, b: int) -> None:
        groups[a] += groups.pop(b)
        for n, group in enumerate(of):
            if group == b:
                of[n] = a
        joined = into[a] | into.pop(b)
        for following in into.values():
            if b in following:
                following.remove(b)
                following.add(a)
        into[a] = joined - {a, b}

    pairs: dict[tuple[int, int], int] = defaultdict(int)  # -> bytes of memory traffic that fusion saves
    for value, who in readers.items():
        near = [n for n in ([owner[value]] if value in owner else []) + who if not loops[n].alone]
        for i, a in enumerate(near[:FUSED]):
            for b in near[i + 1 : FUSED]:
                pairs[min(a, b), max(a, b)] += size[value]
    for (a, b), _ in sorted(pairs.items(), key=lambda p: (-p[1], p[0][1] - p[0][0], p[0])):
        a, b = sorted((of[a], of[b]))
        if a == b or not _fits(groups[a], groups[b]):
            continue
        if len(groups[a]) + len(groups[b]) > FUSED or reaches(a, b) or reaches(b, a):
            continue
        merge(a, b)

    outputs = {base[o] for o in graph.outputs}
    # values written again later, or in parts: the compiler does not reuse their memory
    mended = {base[c] for op in graph.ops for c in op.changes}
    mended |= {
        r.name for x in loops if x.op.kind == "scatter" or (x.alone and x.op.target == "cat") for r in x.op.results
    }
    made = {}
    for g, group in groups.items():
        results = [r for x in group for r in x.op.results]
        own = {r.name for r in results}
        reads = dict.fromkeys(r for x in group for r in x.reads if r not in own)
        # a C++ loop reads the result of an earlier reduction from memory
        local = (r for x in group if not (x.alone or (cpu and x.op.kind == "reduce")) for r in x.op.results)
        inner = tuple(r for r in local if r.name not in outputs and all(of[n] == g for n in readers[r.name]))
        writes = tuple(r for r in results if r not in inner)
        first, alone = group[0].op, group[0].alone
        changes = tuple(base[c] for x in group for c in x.op.changes)
        workspace = sum(x.op.workspace for x in group)
        made[first.name] = Kernel(
            first.name, tuple(reads), writes, changes, workspace, first.kind != "kernel",
            {} if alone else _over(group, mended), inner,
            first.kind != "kernel" or first.target in OUT, first.kind == "kernel" and first.target not in WHOLE,
            alone and first.target == "cat", first.flops, first.dtype, first.where,
        )  # fmt: skip
    by_value = {r.name: k.name for k in made.values() for r in k.writes}
    order = postorder(made, lambda name: [by_value[r] for r in made[name].reads if r in by_value])
    return [made[name] for name in order]


def _over(loops: list[_Loop], never: set[str]) -> dict[str, tuple[str, ...]]:
    """Return the values that each loop of a kernel may overwrite. The loop reads such a value only at the element that
    it writes, and the kernel's other loops read it only there and earlier (torch/_inductor/scheduler.py,
    decide_inplace_update)."""
    maker = {r.name: x for x in loops for r in x.op.results}
    by_name = {x.op.name: x for x in loops}

    def sources(name: str) -> list[str]:
        return [maker[r].op.name for r in by_name[name].reads if r in maker]

    out: dict[str, tuple[str, ...]] = {}
    for loop in loops:
        earlier = set(reach(sources(loop.op.name), sources))
        free = tuple(
            r for r in loop.reads
            if r not in never
            and all(r not in x.reads or (not x.reads[r] and (x is loop or x.op.name in earlier)) for x in loops)
        )  # fmt: skip
        out |= {w.name: free for w in loop.op.results}
    return out
