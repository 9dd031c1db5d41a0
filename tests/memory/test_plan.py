"""Plans and budgets on small models: what is promised to a user."""

import json
import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import attnfx
from attnfx.budgeting import _limits, ran_out
from attnfx.errors import BudgetError, OptionError
from attnfx.memory.budget import check, in_bytes
from attnfx.options import Options
from attnfx.plans import _events_at, fitting, total
from attnfx.sizes import Sizes, Unknown, fit

WIDTH, HEADS = 64, 2


class Block(nn.Module):
    """Attention and a multilayer perceptron by hand, with dropout."""

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
    """(of every parameter, the predicted peak that the report states)."""
    torch._dynamo.reset()
    model, x = net()
    options = {"inner": "aot_eager", "rewrite": "always", "target": "a100-80gb", "tiers": "chunked"}
    run = torch.compile(model, backend="attnfx", options=options | ({"memory_budget": budget} if budget else {}))
    torch.manual_seed(1)
    run(x).backward()
    return [p.grad for p in model.parameters()], attnfx.reports()[-1].notes


def test_a_plan_says_what_is_alive_without_allocating_it():
    found = plan(optimizer="adamw")
    held = sum(p.numel() for p in net()[0].parameters()) * 4
    assert found.resident.parameters == held and found.resident.state == 2 * held
    assert found.peak_bytes > 3 * held + sum(found.saved.values())  # all saved, before the first gradient is there
    assert found.timeline[-1].bytes >= 4 * held  # parameters, two moments, gradients
    assert sum(found.parts().values()) == pytest.approx(found.peak_bytes, rel=0.05)
    assert [d.tier for d in found.decisions] and len(found.sites) == 2
    assert found.predicted_ms > 0 and "largest batch" in str(found)


def test_the_largest_batch_is_the_last_that_fits():
    """By a plan made at that batch: its own trace, not the sizes that the search read off two others."""
    found = plan(rewrite="never")
    found.budget = 64 << 20
    largest = found.max_batch
    assert largest is not None and found.bytes_at(largest) <= 64 << 20 < found.bytes_at(largest + 1)
    with torch.device("meta"):
        model, x = net()[0], torch.empty(largest, 128, WIDTH)
    own = attnfx.plan(model, target="a100-80gb", train=True, rewrite="never")(x)
    assert own.peak_bytes == pytest.approx(_without_recompute(found, largest), rel=0.02)


def _without_recompute(found, batch):
    resident = replace(found.resident, inputs=found.resident.inputs * batch // found.given.batch)
    return total(_events_at(found.choice, found._table, Sizes(batch, 0)), resident, found.target)


def test_a_smaller_budget_never_gives_a_larger_peak_and_every_peak_is_within_it():
    found = plan()
    ways, whole = list(found.ways()), found.peak_bytes
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


def test_what_is_computed_again_has_the_same_dropout():
    expected, _ = gradients(None)
    for budget in (int(3.2 * 2**20), int(2.9 * 2**20)):
        found, notes = gradients(budget)
        assert any("computed again" in n for n in notes), notes
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_budget_that_cannot_be_met_names_the_least_that_can():
    with pytest.raises(Exception, match=r"BudgetError.*smallest peak that can be had is .* \(.*gradients"):
        gradients(1 << 19)


@pytest.mark.parametrize("bad", ["16 gigs", "0GiB", 0, -5, 0.0, -0.5, 1.5, True, [1], "lots"])
def test_a_budget_that_makes_no_sense_is_an_error(bad):
    with pytest.raises(OptionError, match=r"memory_budget.*16GiB"):
        Options.make({"memory_budget": bad})


def test_a_budget_in_units_and_one_beyond_the_device():
    assert check("it", "1.5GiB") == 3 << 29 and check("it", "10 MB") == 10**7 and check("it", 0.5) == 0.5
    assert in_bytes(0.5, 100, 0, "x") == 50 and in_bytes("auto", 100, 7, "x") == 7
    with pytest.raises(OptionError, match=r"more than a100-80gb has"):
        plan(memory_budget="200GiB")


def test_running_out_of_memory_limits_the_next_plan():
    with pytest.warns(UserWarning, match=r"cuda:7 ran out.*_dynamo.reset"):
        ran_out(7, 100, 50, 20)
    assert _limits.pop(7) == 20


def test_a_size_is_read_off_two_traces():
    at, then = Sizes(2, 128), Sizes(5, 113)
    assert fit(2 * 128, 5 * 113, at, then).at(Sizes(3, 10)) == 30
    assert fit(129, 114, at, then).at(Sizes(3, 10)) == 11
    assert fit(64, 64, at, then).at(Sizes(3, 10)) == 64
    with pytest.raises(Unknown):
        fit(3, 1000, at, then)


def test_a_plan_is_drawn_and_opens_in_the_memory_viewer(tmp_path):
    found = plan()
    found.plot(tmp_path / "plan.png")
    found.snapshot(tmp_path / "plan.pickle")
    trace = pickle.loads((tmp_path / "plan.pickle").read_bytes())["device_traces"][0]
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert {t["action"] for t in trace} == {"alloc", "free_requested", "free_completed"}
    assert max(_running(trace)) == pytest.approx(found.peak_bytes, rel=0.02)


def test_the_page_of_a_plan_holds_its_report_and_its_timeline(tmp_path):
    found = plan()
    found.to_html(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert 'id="timeline"' in text and "a100-80gb" in text
    assert [s.name for s in found.report.sites] == ["attention_0", "attention_1"] and text.count("<details id=") == 2
    with pytest.raises(FileExistsError):
        found.to_html(tmp_path / "plan.html")


def _running(trace):
    now = 0
    for t in trace:
        now += {"alloc": t["size"], "free_completed": -t["size"]}.get(t["action"], 0)
        yield now


def test_values_that_depend_on_data_are_planned_around():
    def split(x):
        y = torch.softmax(x @ x.mT, -1) @ x
        return y[y.sum(-1) > 0].sum() + y.sum()

    found = attnfx.plan(split, target="a100-80gb", train=False)(torch.empty(1, 32, 16, device="meta"))
    assert found.notes and found.peak_bytes > 0


def test_the_command_prints_numbers():
    from attnfx.cli.plan import as_data, number

    assert json.loads(json.dumps(as_data(plan())))["peak_bytes"] == plan().peak_bytes
    assert (number("16GiB"), number("5"), number("0.5"), number(None)) == ("16GiB", 5, 0.5, None)
