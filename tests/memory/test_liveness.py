"""Check liveness on graphs small enough to count by hand."""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import attnfx
from attnfx.memory.allocator import Cache
from attnfx.memory.fusion import fused, unfused
from attnfx.memory.liveness import Event, Phase, events, peak
from attnfx.memory.optimizer import given, state_bytes
from attnfx.memory.records import Graph, Op, Result
from attnfx.memory.step import Part, step


def op(name, kind, *reads, size=100, outer=25, **more):
    return Op(name, kind, reads, (Result(name, size),), outer, **more)


def run(graph, kept, **how):
    return events([Phase("forward", tuple(unfused(graph)), frozenset(kept), **how)])


def test_a_view_keeps_its_base_alive_and_takes_nothing():
    graph = Graph(
        (op("x", "input"), op("a", "kernel", "x"), op("v", "view", "a", size=0), op("b", "kernel", "x", size=40),
         op("c", "kernel", "v", "b", size=10)), ("c",),
    )  # fmt: skip
    found = [(e.value, e.bytes) for e in run(graph, {"c"})]
    assert found == [("a", 100), ("b", 40), ("c", 10), ("a", -100), ("b", -40)]


def test_a_kernels_workspace_is_alive_only_beside_it():
    graph = Graph((op("x", "input"), op("a", "kernel", "x", workspace=1000), op("b", "kernel", "a")), ("b",))
    assert peak(run(graph, {"b"})) == 1100


def test_a_change_in_place_takes_nothing():
    graph = Graph((op("x", "input"), op("a", "kernel", "x"), op("y", "kernel", "a", size=0, changes=("a",))), ("a",))
    assert [e.bytes for e in run(graph, {"a"})] == [100]


def test_a_loop_is_inlined_where_it_is_read_and_written_over_what_dies():
    """x -> mm -> relu -> mul -> mm: relu and mul are one loop, which overwrites the first product."""
    graph = Graph(
        (op("x", "input"), op("m", "kernel", "x", target="mm"), op("r", "loop", "m"), op("s", "loop", "r"),
         op("n", "kernel", "s", target="mm")), ("n",),
    )  # fmt: skip
    kernels = fused(graph, cpu=False)
    assert [k.name for k in kernels] == ["m", "s", "n"]
    assert peak(events([Phase("forward", tuple(kernels), frozenset({"n"}))])) == 200


def test_a_row_sum_and_the_loop_that_reads_it_are_one_kernel():
    """The exponentials in a softmax of a stored x are not stored; its sum has one value per row."""
    graph = Graph(
        (op("x", "input"), op("e", "loop", "x", outer=20),
         op("s", "reduce", "e", size=16, outer=4, inner=5), op("d", "loop", "e", "s", outer=20)), ("d",),
    )  # fmt: skip
    assert [[w.name for w in k.writes] for k in fused(graph, cpu=False)] == [["d"]]


def names(found):
    return [(e.value, e.bytes) for e in found]


def test_a_loop_is_not_written_over_what_it_reads_in_another_order():
    graph = Graph(
        (op("x", "input"), op("m", "kernel", "x", target="mm"),
         op("t", "loop", "m", aside=frozenset(["m"])), op("n", "kernel", "t", target="mm")), ("n",),
    )  # fmt: skip
    kernels = fused(graph, cpu=True)
    assert {k.name: k.over for k in kernels}["t"] == {"t": ()}
    assert peak(events([Phase("forward", tuple(kernels), frozenset({"n"}))])) == 200


def test_what_dies_waits_for_a_later_value_of_its_size_where_the_peak_is_no_higher():
    """a is dead once b exists. c reuses its memory, because the step's peak comes later."""
    graph = Graph(
        (op("x", "input"), op("a", "kernel", "x", target="mm"), op("b", "kernel", "a", target="mm", size=40),
         op("e", "kernel", "b", target="mm", size=60), op("c", "kernel", "e", target="mm"),
         op("big", "kernel", "c", target="mm", size=300)), ("big",),
    )  # fmt: skip
    assert names(step([Part(graph)], cpu=True).events()) == [
        ("0.a", 100), ("0.b", 40), ("0.e", 60), ("0.b", -40), ("0.a", -100), ("0.c", 100), ("0.e", -60), ("0.big", 300),
        ("0.c", -100),
    ]  # fmt: skip


def test_what_a_call_made_waits_for_a_later_value_where_the_call_read_no_input():
    """On a CPU, Inductor does not assume that inputs, or a call's results from them, are aligned."""

    def until(operand):
        """Return the allocation right after the release of the call's result."""
        graph = Graph(
            (op("x", "input"), op("m", "kernel", "x", target="mm", size=30), op("a", "kernel", operand, target="call"),
             op("b", "kernel", "a", target="mm", size=40), op("e", "kernel", "b", target="mm", size=60),
             op("c", "kernel", "e", target="mm"), op("big", "kernel", "c", "m", target="mm", size=300)), ("big",),
        )  # fmt: skip
        found = names(step([Part(graph)], cpu=True).events())
        return found[found.index(("0.a", -100)) + 1]

    assert until("m") == ("0.c", 100)
    assert until("x") == ("0.e", 60)


def test_a_loop_is_not_written_over_what_was_scattered_into():
    graph = Graph(
        (op("x", "input"), op("g", "scatter", "x"), op("d", "loop", "g"), op("n", "kernel", "d", target="mm")), ("n",),
    )  # fmt: skip
    assert [k.over["d"] for k in fused(graph, cpu=True) if "d" in k.over] == [()]


def test_a_copy_in_its_operands_own_layout_is_no_value():
    """Exception: an output never shares memory with another output or an input."""

    def copied(*outputs):
        graph = Graph(
            (op("x", "input"), op("a", "kernel", "x", target="mm"), op("c", "loop", "a", same=True),
             op("n", "kernel", "c", target="mm", size=60)), outputs,
        )  # fmt: skip
        return [v for v, size in names(step([Part(graph)], cpu=True).events()) if size > 0]

    assert copied("n") == ["0.a", "0.n"]
    assert copied("n", "c") == ["0.a", "0.n"]
    assert copied("n", "c", "a") == ["0.a", "0.c", "0.n"]


def test_kernels_run_in_the_order_with_the_lowest_peak():
    """Two large values are each reduced one after the other, not both at once."""
    graph = Graph(
        (op("x", "input"), op("a", "kernel", "x", target="mm", size=1000),
         op("b", "kernel", "x", target="mm", size=990), op("p", "kernel", "a", target="mm", size=10),
         op("q", "kernel", "b", target="mm", size=12)), ("p", "q"),
    )  # fmt: skip
    kernels = tuple(fused(graph, cpu=False))
    assert peak(events([Phase("forward", kernels, frozenset({"p", "q"}))])) == 2000
    assert peak(step([Part(graph)], cpu=False).events()) == 1022  # b, q, a, p


def test_a_loop_of_c_reads_a_sum_from_memory():
    graph = Graph(
        (op("x", "input"), op("s", "reduce", "x", size=16, outer=4, inner=5), op("d", "loop", "x", "s", outer=20)),
        ("d",),
    )
    written = {cpu: [[w.name for w in k.writes] for k in fused(graph, cpu)] for cpu in (True, False)}
    assert written == {True: [["s", "d"]], False: [["d"]]}


def test_saved_values_live_until_the_backward_pass_has_read_them():
    forward = Graph((op("x", "input"), op("a", "kernel", "x"), op("b", "kernel", "a", size=4)), ("b", "a"))
    backward = Graph((op("a", "input"), op("t", "input", size=4), op("g", "kernel", "a", "t", size=60)), ("g",))
    made = step([Part(forward, backward, 1)], cpu=True, inlining=False)
    assert made.saved == {"0.a": 100}
    assert [(e.value, e.bytes) for e in made.events()] == [
        ("0.a", 100), ("0.b", 4), ("0.backward.t", 4), ("0.backward.g", 60), ("0.a", -100), ("0.backward.t", -4),
    ]  # fmt: skip


def test_a_gpus_allocator_rounds_and_keeps_what_was_freed():
    cache = Cache().replay([Event("a", 1, ""), Event("b", 3 << 20, ""), Event("b", -3 << 20, "")])
    assert (cache.allocated, cache.peak, cache.reserved) == (512, 512 + (3 << 20), (2 << 20) + (20 << 20))
    again = Cache()
    first = again.take(15 << 20)
    again.give(first)
    again.take(15 << 20)
    assert again.reserved == 16 << 20  # 15 MiB, rounded to 2 MiB; the second one reuses the first one's memory


def test_eight_bit_states_are_a_byte_and_a_scale_for_each_block():
    assert state_bytes(given("adam8bit"), [(1 << 20, 4 << 20)]) == 2 * ((1 << 20) + 4 * (1 << 12))
    assert state_bytes(given("adam"), [(10, 40), (5, 20)]) == 120


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * 2).square().mean()


def measured(run):
    """Return the peak of the bytes allocated while `run` runs, minus those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    found = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for e in sorted(found, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    del kept
    return most


def test_without_fusion_the_predicted_peak_is_the_allocators_to_the_byte():
    net, x = Net(), torch.randn(512, 64)
    plan = attnfx.plan(net, train=True, target="a100-80gb", inner="aot_eager")(x)
    compiled = torch.compile(net, backend="attnfx", options={"inner": "aot_eager"})

    def run():
        out = compiled(x)
        out.backward()
        return out

    run()
    net.zero_grad(set_to_none=True)
    assert abs(plan.strategy.peak - measured(run)) <= 64  # scalars that autograd makes itself
