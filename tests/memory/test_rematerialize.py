"""Choose the values to save and to recompute: the best trade-offs, and PyTorch's graphs for them."""

import random
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

import attnfx
from attnfx.memory.partition import Joint
from attnfx.memory.records import Graph, Op, Result
from attnfx.memory.rematerialize import Trades, together
from attnfx.options import Options
from attnfx.passes.joint.mark_recompute import copied, mark, partition
from attnfx.passes.joint.read_graph import read
from attnfx.passes.joint.read_joint import joint_records
from attnfx.planning.capture import capture


def chain(seed, length=7):
    """Create a random forward pass of `length` operations, and a backward pass that reads some of its values."""
    draw = random.Random(seed)
    ops, names = [Op("x", "input", (), (Result("x", 8),)), Op("g", "input", (), (Result("g", 8),))], ["x"]
    for n in range(length):
        reads = tuple(draw.sample(names, min(len(names), draw.randint(1, 2))))
        ops.append(Op(f"f{n}", "loop", reads, (Result(f"f{n}", draw.randint(1, 40)),)))
        names.append(f"f{n}")
    last, read = ops[-1].name, draw.sample(names[1:-1], 3)
    ops.append(Op("out", "loop", (*names[1:],), (Result("out", 1),)))
    ops.append(Op("grad", "loop", ("g", *read, last), (Result("grad", 8),)))
    return Joint(Graph(tuple(ops), ("out", "grad")), 1, frozenset(["g"])), {
        f"f{n}": draw.randint(1, 9) for n in range(length)
    }


def every(joint, price):
    """Yield (milliseconds, saved bytes) for each set of recomputed operations."""
    size = {op.name: op.results[0].bytes for op in joint.graph.ops}
    reads = {op.name: [r for r in op.reads if r != "x"] for op in joint.graph.ops}
    for count in range(len(price) + 1):
        for again in combinations(price, count):
            wanted = {*joint.needed, *(r for a in again for r in reads[a])}
            yield sum(price[a] for a in again), sum(size[w] for w in wanted - {*again, "x"})


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_takes_less_time_for_as_few_bytes_on_the_hull(seed):
    joint, price = chain(seed)
    trades = Trades(joint, lambda op: None if op.name == "out" else float(price[op.name]))
    found = trades.solutions()
    possible = list(every(joint, price))
    for s in found:
        assert (s.milliseconds, s.bytes) in possible
        # longer-lived values are weighted slightly higher; another choice may be better by at most this weight
        assert not any(t < s.milliseconds and b <= s.bytes / (1 + 1 / 16) for t, b in possible)
    assert found[0].milliseconds == 0 and found[-1].bytes == min(b for _, b in possible)
    for one, other in pairwise(found):
        assert one.again <= other.again and one.milliseconds <= other.milliseconds


def test_what_gives_something_else_when_run_again_is_not():
    joint, _ = chain(3)
    for s in Trades(joint, lambda op: None if op.name in ("f2", "out") else 1.0).solutions():
        assert "f2" not in s.again


def test_the_solutions_of_several_graphs_are_taken_in_the_order_of_their_rates():
    lists = [Trades(j, lambda op, p=p: float(p.get(op.name, 1))).solutions() for j, p in map(chain, (1, 2))]
    taken = list(together(lists))
    assert [n for n, _ in taken[:2]] == [0, 1] and len(taken) == sum(map(len, lists))
    for n in (0, 1):
        assert [s for m, s in taken if m == n] == lists[n]


class Net(nn.Module):
    """A network with views, a result of several parts, dropout, a reduction, and a buffer that the step writes to."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(64, 192), nn.Linear(64, 64), nn.LayerNorm(64)
        self.register_buffer("count", torch.ones(()))
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        self.count += 1
        q, k, v = self.a(self.norm(x)).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        weights = self.drop((q @ k.mT).softmax(-1))
        x = x + self.drop(self.b((weights @ v).transpose(1, 2).flatten(2))) * self.count
        return torch.nn.functional.gelu(x).var(-1).mean()


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"rewrite": "always"}, {"rewrite": "never"}, {"inner": "aot_eager"}], ids=str)
def test_the_records_are_split_as_pytorch_splits_the_graph(how):
    (captured,) = capture(Net(), [torch.randn(2, 128, 64)], {}, Options.make({"target": "a100-80gb", **how}), True)
    joint, fixed = joint_records(captured.graph, captured.arguments, True)
    found = Trades(joint, lambda op: None if op.name in fixed else 1.0 + op.flops).solutions()
    assert len(found) >= 3
    constants = {op.name for op in joint.graph.ops if not op.reads}  # an overwritten value is not read
    for s in found:
        part = joint.split(s.saved)
        again = {x for op in part.backward.ops if op.name not in joint.later for x in (op.name, *op.parts)}
        marked = copied(captured.graph)[0]
        if again - s.saved:
            mark(marked, s.saved, again - s.saved)
        graphs = partition(marked, captured.arguments)
        for own, theirs in zip((part.forward, part.backward), (read(g, True) for g in graphs)):
            for inputs in (False, True):
                mine, other = (
                    [op.name for op in g.ops if (op.kind == "input") == inputs and op.name not in constants]
                    for g in (own, theirs)
                )
                assert sorted(mine) == sorted(other) if inputs else mine == other
        assert s.again.isdisjoint(fixed)


@pytest.mark.slow
def test_a_step_that_writes_to_an_input_reads_it_no_more():
    """Under a budget, a recomputed operation must not read a counter that has changed since."""

    def gradients(budget):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net, x = Net(), torch.randn(2, 128, 64)
        options = {"inner": "aot_eager", "rewrite": "always"} | ({"memory_budget": budget} if budget else {})
        for _ in range(2):
            net.zero_grad()
            torch.manual_seed(1)
            torch.compile(net, backend="attnfx", options=options)(x).backward()
        return [p.grad for p in net.parameters()], attnfx.reports()[-1].notes

    expected, _ = gradients(None)
    with pytest.raises(Exception, match="smallest possible peak is") as told:
        gradients(1000)
    number, unit = str(told.value).split("possible peak is ")[1].split()[:2]
    found, notes = gradients(int(float(number) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit]) + (1 << 14))
    assert any("are recomputed in the backward pass" in n for n in notes)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
