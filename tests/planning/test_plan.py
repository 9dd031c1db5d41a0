"""Check the promises of plans and budgets to a user, on small models."""

import json
import pickle
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import attnfx
from attnfx.errors import BudgetError, OptionError
from attnfx.memory.byte_size import check, in_bytes
from attnfx.options import Options
from attnfx.planning.fit import _free, ran_out
from attnfx.planning.peak import fitting, reserve, total
from attnfx.planning.scaling import Sizes, Unknown, fit
from attnfx.planning.table import by_module

WIDTH, HEADS = 64, 2
SMALL = replace(attnfx.Target.by_name("a100-80gb"), memory=1 << 27)


class Block(nn.Module):
    """Hand-written attention and an MLP, with dropout."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = self.dropout(torch.softmax(q @ k.mT / 4, -1))
        x = x + self.dropout(self.out((weights @ v).transpose(1, 2).reshape(b, t, WIDTH)))
        return x + self.dropout(self.down(nn.functional.gelu(self.up(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(x).square().mean()


def net():
    torch.manual_seed(0)
    return Net(), torch.randn(2, 128, WIDTH)


@cache
def plan(**how):
    with torch.device("meta"):
        model, x = net()
    return attnfx.plan(model, **{"target": "a100-80gb", "train": True, **how})(x)


def gradients(budget):
    """Return the gradients of all parameters, and the predicted peak from the report."""
    torch._dynamo.reset()
    model, x = net()
    options = {"inner": "aot_eager", "rewrite": "always", "target": "a100-80gb", "tiers": "chunked"}
    run = torch.compile(model, backend="attnfx", options=options | ({"memory_budget": budget} if budget else {}))
    torch.manual_seed(1)
    run(x).backward()
    return [p.grad for p in model.parameters()], attnfx.reports()[-1].notes


@pytest.mark.slow
def test_a_plan_says_what_is_alive_without_allocating_it():
    found = plan(optimizer="adamw", target=SMALL)
    held = sum(p.numel() for p in net()[0].parameters()) * 4
    assert found.resident.parameters == held and found.resident.state == 2 * held
    assert found.peak_bytes > 3 * held + sum(found.saved.values())  # all saved before the first gradient exists
    assert found.timeline[-1].bytes >= 4 * held  # parameters, two moments, gradients
    assert sum(found.parts().values()) == pytest.approx(found.peak_bytes, rel=0.05)
    assert [d.tier for d in found.decisions] and len(found.sites) == 2
    assert found.predicted_ms > 0 and "largest batch" in str(found)


def at_sizes(batch, length, **how):
    with torch.device("meta"):
        model, x = net()[0], torch.empty(batch, length, WIDTH)
    return attnfx.plan(model, **{"target": SMALL, "train": True, **how})(x)


@pytest.mark.slow
def test_the_largest_batch_is_the_last_that_fits():
    """Verified by plans with their own traces at these sizes, not by the search's sizes from two other traces."""
    found = at_sizes(2, 128)
    most = found.max_batch
    assert not found.notes
    last, more = at_sizes(most, 128), at_sizes(most + 1, 128)
    assert last.peak_bytes <= SMALL.memory < more.peak_bytes
    assert found.bytes_at(most) == pytest.approx(last.peak_bytes, rel=1e-3)


@pytest.mark.slow
def test_the_largest_length_is_the_last_that_fits():
    found = at_sizes(1, 64)
    longest = found.max_length
    assert not found.notes
    assert at_sizes(1, longest).peak_bytes <= SMALL.memory < at_sizes(1, longest + 1).peak_bytes


@pytest.mark.slow
def test_the_largest_batch_under_a_budget_counts_what_can_be_computed_again():
    found = at_sizes(2, 128, memory_budget="110MiB")
    most = found.max_batch
    assert most > at_sizes(2, 128).max_batch * 1.2
    assert at_sizes(most, 128, memory_budget="110MiB").recomputed
    with pytest.raises(BudgetError):
        at_sizes(most * 21 // 20, 128, memory_budget="110MiB")


class Table(nn.Module):
    """A lookup in the caller's table, then attention with a bias for each of at most 64 positions."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(64, 64))

    def forward(self, ids, table):
        x = table[ids % 4]
        return torch.softmax(x @ x.mT + self.bias[: ids.shape[1], : ids.shape[1]], -1) @ x


@pytest.mark.slow
def test_an_input_that_is_as_long_as_the_batch_but_refuses_another_is_left_as_it_is():
    """Cases: a table with four rows, a model that requires four of them, and a limited number of positions."""

    class Fixed(Table):
        def forward(self, ids, table):
            return super().forward(ids, table.view(4, 32))

    with torch.device("meta"):
        model, ids, table = Fixed(), torch.zeros(4, 64, dtype=torch.int64), torch.empty(4, 32)
    found = attnfx.plan(model, target=SMALL, train=False)(ids, table)
    assert found.max_batch > 100 and found.bytes_at(8) - found.bytes_at(4) > 4 * 64 * 32


@pytest.mark.slow
def test_a_smaller_budget_never_gives_a_larger_peak_and_every_peak_is_within_it():
    found = plan()
    ways, whole = list(found.limited().ways()), found.peak_bytes
    peaks = []
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5):
        try:
            way = fitting(ways, int(whole * share), found.resident, found.target, True)
        except BudgetError:
            break
        peaks.append(total(way.events, found.resident, found.target))
        assert peaks[-1] <= whole * share
    assert len(peaks) >= 4 and peaks == sorted(peaks, reverse=True)
    assert way.recomputed


@pytest.mark.slow
def test_what_is_computed_again_has_the_same_dropout():
    expected, _ = gradients(None)
    for budget in (int(3.2 * 2**20), int(2.9 * 2**20)):
        found, notes = gradients(budget)
        assert any("are recomputed in the backward pass" in n for n in notes), notes
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_gradient_of_a_bias_that_layers_share_is_planned():
    """The attention's backward operator returns it inside a list of results."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.project = nn.Parameter(torch.zeros(128, 128)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.project(torch.softmax(x @ x.mT + self.bias, -1) @ x))
            return x.square().mean()

    options = {"inner": "aot_eager", "rewrite": "always", "tiers": "chunked"}
    model, x = Biased(), torch.randn(2, 128, WIDTH)
    *_, last = attnfx.plan(model, train=True, memory_budget="1GiB", **options)(x).limited().ways()
    found = []
    for more in ({}, {"memory_budget": round(1.04 * last.peak) + attnfx.plan(model, **options)(x).resident.total}):
        torch._dynamo.reset()
        torch.compile(model, backend="attnfx", options=options | more)(x).backward()
        found.append(model.bias.grad)
        model.zero_grad()
    torch.testing.assert_close(*found)
    assert any("are recomputed in the backward pass" in n for n in attnfx.reports()[-1].notes)


def test_a_budget_that_cannot_be_met_names_the_least_that_can():
    with pytest.raises(Exception, match=r"BudgetError.*smallest possible peak is .* \(.*gradients"):
        gradients(1 << 19)


@pytest.mark.parametrize("bad", ["16 gigs", "0GiB", 0, -5, 0.0, -0.5, 1.5, True, [1], "lots"])
def test_a_budget_that_makes_no_sense_is_an_error(bad):
    with pytest.raises(OptionError, match=r"memory_budget.*16GiB"):
        Options.make({"memory_budget": bad})


def test_an_unknown_argument_names_a_similar_argument_of_plan():
    with pytest.raises(
        OptionError, match=r"unknown option 'optimiser'; did you mean 'optimizer'\?.*, train, optimizer$"
    ):
        plan(optimiser="adamw")


def test_a_size_that_is_nearly_one_is_taken_for_it():
    with pytest.raises(OptionError, match=r"'16 gigs' is not valid; did you mean '16GiB'\?"):
        Options.make({"memory_budget": "16 gigs"})


def test_a_budget_in_units_and_one_beyond_the_device():
    assert check("it", "1.5GiB") == 3 << 29 and check("it", "10 MB") == 10**7 and check("it", 0.5) == 0.5
    assert in_bytes(0.5, 100, 0, "x") == 50 and in_bytes("auto", 100, 7, "x") == 7
    with pytest.raises(OptionError, match=r"more than the memory of a100-80gb"):
        plan(memory_budget="200GiB")


@pytest.mark.parametrize(
    "wanted, most, free, really",
    [(100, 1000, 50, 599), (100, 560, 50, 560), (1 << 40, 1000, 50, 750)],
    ids=["there was more, in pieces", "a share is allowed", "asked for more than there is"],
)
def test_running_out_of_memory_limits_the_next_plan(monkeypatch, wanted, most, free, really):
    held = {"now": 500}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: held["now"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 700)
    monkeypatch.setattr("attnfx.planning.fit.free_bytes", lambda *_: 900)
    monkeypatch.setattr("attnfx.planning.fit._limits", {})
    monkeypatch.setattr("attnfx.planning.fit._watched", [True])  # a CUDA build of PyTorch would query the driver
    gpu = torch.device("cuda", 7)
    assert _free(SMALL, gpu) == 900
    with pytest.warns(UserWarning, match=r"cuda:7 ran out.*_dynamo.reset"):
        ran_out(7, wanted, most, free)
    assert _free(SMALL, gpu) == really - 500
    held["now"] = 0  # the step's tensors are freed
    assert _free(SMALL, gpu) == min(900, really)
    held["now"] = 2000
    assert _free(SMALL, gpu) == 0


def test_a_size_is_read_off_two_traces():
    at, then = Sizes(2, 128), Sizes(5, 113)
    assert fit(2 * 128, 5 * 113, at, then).at(Sizes(3, 10)) == 30
    assert fit(129, 114, at, then).at(Sizes(3, 10)) == 11
    assert fit(64, 64, at, then).at(Sizes(3, 10)) == 64
    with pytest.raises(Unknown):
        fit(3, 1000, at, then)


@pytest.mark.slow
def test_a_plan_reads_by_module_and_by_site():
    free = plan(target=SMALL)
    *_, last = free.limited().ways()
    size = total(last.events, free.resident, free.target)
    shown = plan(target=SMALL, memory_budget=size + reserve(last, size, free.resident))
    assert re.search(r"attention_0 to attention_1 \(2\) +│ test_plan.py:\d+ +│", str(shown))
    assert re.search(r"peak +│ \d.\d\d MiB of \d.\d\d MiB, in the backward pass at blocks.\d", str(shown))
    assert "blocks.*.up" in str(shown)
    rows = by_module(shown).values()
    assert sum(b for _, b in rows) == sum(shown.recomputed.values()) > 0
    assert sum(a for a, _ in rows) == sum(shown.saved.values())


@pytest.mark.slow
def test_a_plan_is_drawn(tmp_path):
    plan().plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_the_snapshot_is_one_that_pytorchs_own_tools_read(tmp_path):
    """Freed blocks were allocated before, blocks do not overlap, and the segments contain the remaining blocks."""
    found = plan(optimizer="adamw")
    found.snapshot(tmp_path / "plan.pickle")
    raw = (tmp_path / "plan.pickle").read_bytes()
    assert raw[:2] == b"\x80\x04"  # the viewer's pickle reader supports no later protocol
    data = pickle.loads(raw)
    trace, there, segments = data["device_traces"][0], {}, []
    most = now = 0
    for t in trace:
        end = t["addr"] + t["size"]
        if t["action"] == "segment_alloc":
            segments.append((t["addr"], end))
        elif t["action"] == "alloc":
            assert any(low <= t["addr"] and end <= high for low, high in segments)
            assert all(end <= a or a + s <= t["addr"] for a, s in there.items())
            there[t["addr"]] = t["size"]
        elif t["action"] == "free_completed":
            assert there.pop(t["addr"]) == t["size"]
        now = sum(there.values())
        most = max(most, now)
    assert most == pytest.approx(found.peak_bytes, rel=0.02)
    assert sum(high - low for low, high in segments) == found.reserved_bytes
    blocks = [b for s in data["segments"] for b in s["blocks"] if b["state"] == "active_allocated"]
    assert {b["address"]: b["requested_size"] for b in blocks} == there
    assert all(sum(b["size"] for b in s["blocks"]) == s["total_size"] for s in data["segments"])

    from torch.cuda import _memory_viz as viz

    said = viz.trace(data)
    assert said.count(" = cudaMalloc(") == len(segments) and "TOTAL MEM" in said and "MEM[" not in said
    assert viz.segsum(data).count("allocated") >= 1

    def flames(lines, *_):
        return str(lines)

    assert "optimizer state" in viz.memory(data, format_flamegraph=flames)
    assert "stream_0" in viz.segments(data, format_flamegraph=flames)
    assert viz.compare(data["segments"], data["segments"], format_flamegraph=flames) == ""
    assert "Active Memory Timeline" in viz.trace_plot(data)
    kept = viz.filter_alloc_free_pairs(data)["device_traces"][0]
    assert sum(t["size"] for t in kept if t["action"] == "alloc") == now


def test_the_page_of_a_plan_holds_its_report_and_its_timeline(tmp_path):
    found = plan()
    found.to_html(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert 'id="timeline"' in text and "a100-80gb" in text
    assert [s.name for s in found.report.sites] == ["attention_0", "attention_1"] and text.count("<details id=") == 2
    with pytest.raises(FileExistsError):
        found.to_html(tmp_path / "plan.html")


def test_values_that_depend_on_data_are_planned_around():
    def split(x):
        y = torch.softmax(x @ x.mT, -1) @ x
        return y[y.sum(-1) > 0].sum() + y.sum()

    found = attnfx.plan(split, target="a100-80gb", train=False)(torch.empty(1, 32, 16, device="meta"))
    assert found.notes and found.peak_bytes > 0


@pytest.mark.slow
def test_the_command_prints_numbers():
    from attnfx.cli.plan import as_data
    from attnfx.options import number

    found = plan(optimizer="adamw", target=SMALL)  # an earlier plan may already have searched the largest sizes
    assert json.loads(json.dumps(as_data(found)))["peak_bytes"] == found.peak_bytes
    assert (number("16GiB"), number("5"), number("0.5")) == ("16GiB", 5, 0.5)


def test_a_plan_for_a_detected_gpu_decides_for_that_gpu_and_times_nothing(monkeypatch):
    """The graphs of a plan are on the CPU, so that "auto" alone would decide for the CPU."""
    from attnfx.planning import plan as module

    h100 = attnfx.Target.by_name("h100-sxm")
    monkeypatch.setattr(module, "detected", lambda device: h100)
    x = torch.randn(2, 512, WIDTH)
    found, named = attnfx.plan(Net(), tune=True)(x), attnfx.plan(Net(), target="h100-sxm")(x)
    assert [d.tier for d in found.decisions] == [d.tier for d in named.decisions]
    assert [c.kernel for d in found.decisions for c in d.alternatives] == [
        c.kernel for d in named.decisions for c in d.alternatives
    ]
