"""Report each site's heads, sizes, mask and dropout as text, as JSON and as graphs."""

import json
import os
import pathlib
import re
import subprocess
import sys

import networkx
import pytest
import torch

import attnfx
from attnfx.report.stages import GraphNode, Stage
from tests.support import rand

SCALE = 0.25


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def said(fn, *args, **options):
    (site,) = attnfx.explain(fn, **options)(*args).sites
    return site.summary()


@pytest.mark.parametrize("batch, words", [(1, "batch 1"), (3, "batch 3")])
def test_heads_are_heads_whatever_the_batch(batch, words):
    shapes = [rand(batch, 6, 20, 8) for _ in range(3)]
    assert said(attend, *shapes) == f"6 heads, 20 x 20 x 8, {words}"


def test_heads_are_heads_where_the_output_is_transposed():
    def fn(q, k, v):
        return torch.einsum("bhij,bhjd->bihd", torch.einsum("bihd,bhjd->bhij", q, k).softmax(-1), v)

    assert said(fn, rand(1, 20, 6, 8), rand(1, 6, 30, 8), rand(1, 6, 30, 8)) == "6 heads, 20 x 30 x 8, batch 1"


def test_grouped_heads_and_widths_are_named():
    def fn(q, k, v):
        return attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))

    assert said(fn, rand(1, 6, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 20, 4)) == (
        "6 heads (2 for keys), 20 x 20 x 8/4, batch 1"
    )


def test_dropout_is_named():
    def fn(q, k, v):
        return torch.dropout(((q @ k.mT) * SCALE).softmax(-1), 0.125, True) @ v

    assert said(fn, *[rand(2, 6, 20, 8) for _ in range(3)]) == "6 heads, 20 x 20 x 8, batch 2, dropout 0.125"


def test_a_kept_site_says_why_and_a_rewritten_one_what_is_assumed():
    keep = torch.ones(20, 20, dtype=torch.bool).tril()

    def fn(q, k, v):
        return ((q @ k.mT) * SCALE).masked_fill(~keep, -1e9).softmax(-1) @ v

    operands = [rand(2, 6, 20, 8) for _ in range(3)]
    kept, always = (attnfx.explain(fn, rewrite=how)(*operands) for how in ("cost", "always"))
    assert "kept: a rewrite is predicted to take" in str(kept).replace("\n", " ") or "kept" in str(kept)
    assert "assumes that" in " ".join(always.sites[0].notes)


def test_predicted_values_before_and_after_are_joined_by_an_arrow():
    def fn(q, k, v):
        return ((q @ k.mT) * SCALE).softmax(-1) @ v

    text = str(attnfx.explain(fn, rewrite="always")(*(rand(1, 2, 256, 16) for _ in range(3))))
    assert re.search(r"[\d.]+ -> [\d.]+ ms", text) and re.search(r"[\d.]+ -> [\d.]+ MiB", text)


def test_inputs_that_are_given_with_the_model_are_an_error_that_shows_the_call():
    with pytest.raises(TypeError, match=r"call attnfx.explain\(model, \*\*options\)\(\*inputs\)"):
        attnfx.explain(lambda x: x, rand(2))  # pyright: ignore[reportArgumentType]


def test_tensors_on_meta_without_a_target_are_kept_with_a_hint_to_name_one():
    operands = [torch.empty(1, 2, 256, 16, device="meta") for _ in range(3)]
    (site,) = attnfx.explain(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(*operands).sites
    assert site.code == "no_rates" and "name a device with `target=`" in str(attnfx.Report(sites=[site])).replace(
        "\n", " "
    )


def test_a_kept_site_states_that_inductors_own_rewriting_is_off_for_it():
    def fn(q, k, v):
        return (q @ k.mT).flatten(2).softmax(-1).view(1, 2, 32, 32) @ v

    report = attnfx.explain(fn)(*(rand(1, 2, 32, 16) for _ in range(3)))
    assert "Inductor's own attention rewriting is switched off here" in str(report).replace("\n", " ")


class Layers(torch.nn.Module):
    """Four layers of causal attention with a learned bias, and a classifier."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(4))
        self.bias = torch.nn.Parameter(rand(4, 20, 20))
        self.classify = torch.nn.Linear(32, 10)

    def forward(self, x):
        keep = torch.ones(20, 20, dtype=torch.bool).tril()
        for project in self.project:
            q, k, v = project(x).view(2, 20, 3, 4, 8).permute(2, 0, 3, 1, 4)
            scores = ((q @ k.mT) * SCALE + self.bias).masked_fill(~keep, -torch.inf)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.classify(x.mean(1)).softmax(-1)


@pytest.fixture(scope="module")
def layers():
    return attnfx.explain(Layers(), rewrite="always")(rand(2, 20, 32))


def test_layers_that_differ_in_nothing_share_a_row_and_the_classifier_a_line(layers):
    text = str(layers)
    assert text.startswith("attnfx: 4 of 4 attention sites rewritten\n")
    assert text.count("attention_0-3 (4)") == 1 and "causal" in text
    assert "other softmaxes: 1 [not_attention] at test_report.py:" in text
    assert max(map(len, text.splitlines())) <= 120


def test_flops_are_those_that_pytorch_counts(layers):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        Layers()(rand(2, 20, 32))
    assert layers.flops == counter.get_total_flops()
    assert [s.flops for s in layers.sites] == [2 * 2 * 4 * 20 * 20 * 16] * 4
    assert layers.share(layers.sites[0]) == layers.sites[0].flops / layers.flops


def test_flops_of_other_products_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    def fn(q, k, v, image, kernel, vector):
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        mixed = torch.baddbmm(rand(4, 20, 8), weights[0], v[0])
        return torch.addmm(rand(20, 8), weights[0, 0], v[0, 0]), mixed, torch.conv2d(image, kernel), v[0, 0] @ vector

    args = [*(rand(2, 4, 20, 8) for _ in range(3)), rand(1, 3, 9, 9), rand(5, 3, 3, 3), rand(8)]
    with FlopCounterMode(display=False) as counter:
        fn(*args)
    by_vector = 2 * 20 * 8  # PyTorch's counter does not count these
    assert attnfx.explain(fn)(*args).flops == counter.get_total_flops() + by_vector


def test_json_holds_the_report_and_is_read_back(layers):
    text = layers.to_json()
    assert attnfx.Report.from_json(text).to_json() == text
    again = attnfx.Report.from_json(text)
    assert (again.sites, again.others) == (layers.sites, layers.others)
    assert str(again) == str(layers)
    with pytest.raises(ValueError, match="version 2"):
        attnfx.Report.from_json(text.replace('"version": 1', '"version": 2', 1))
    for other in ("[1]", "{}", '{"version": 1}'):
        with pytest.raises(ValueError, match=r"JSON of (a|the) report"):
            attnfx.Report.from_json(other)


def test_every_field_of_the_json_is_documented(layers):
    docs = (pathlib.Path(__file__).parents[2] / "docs" / "report.md").read_text()
    found = set()

    def walk(value, skip=()):
        if isinstance(value, dict):
            found.update(k for k in value if k not in skip)
            for k, v in value.items():
                if k not in ("spec", "dims", "sizes", "codes"):
                    walk(v)
        elif isinstance(value, list):
            for v in value:
                walk(v)

    data = json.loads(layers.to_json())
    walk(data)
    assert found and [k for k in found if f"`{k}`" not in docs and f'"{k}"' not in docs] == []


def test_tiles_are_drawn_as_the_mask_says():
    def fn(q, k, v):
        i = torch.arange(96)
        seen = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 32)
        return ((q @ k.mT) * SCALE).masked_fill(~seen, -torch.inf).softmax(-1) @ v

    report = attnfx.explain(fn)(*[rand(1, 2, 96, 8) for _ in range(3)])
    (site,) = json.loads(report.to_json())["sites"]
    assert site["tiles"]["tile"] == [16, 16]
    assert site["tiles"]["picture"] == ["+.....", "#+....", "+#+...", ".+#+..", "..+#+.", "...+#+"]


def test_in_the_lifted_stage_a_site_is_one_node_that_reads_its_operands(layers):
    traced, lifted, rewritten = (layers.stages[name] for name in ("traced", "lifted", "rewritten"))
    names = [s.name for s in layers.sites]
    assert [n.site for n in lifted.nodes if n.kind == "site"] == names
    assert {n.site for n in traced.nodes} == {n.site for n in rewritten.nodes} == {"", *names}
    assert sum(n.label == "attnfx::attention" for n in rewritten.nodes) == 4
    assert not any(n.label in ("softmax", "masked_fill", "tril") and n.shape[-1] == 20 for n in lifted.nodes)
    graph = lifted.to_networkx()
    site = next(n.id for n in lifted.nodes if n.kind == "site")
    assert len(graph.pred[site]) == 4  # query, key, value and the bias
    assert networkx.is_directed_acyclic_graph(graph)
    classifier = next(n.id for n in lifted.nodes if n.label == "softmax")
    assert networkx.has_path(graph, site, classifier)


@pytest.mark.parametrize("name", ["traced", "lifted", "rewritten"])
def test_a_stage_is_written_in_formats_that_others_read(layers, name, tmp_path):
    stage = layers.stages[name]
    stage.to_graphml(tmp_path / "stage.graphml")
    read = networkx.read_graphml(tmp_path / "stage.graphml")
    linked = networkx.node_link_graph(json.loads(stage.to_json()), edges="edges")
    for graph in (read, linked):
        assert set(graph.nodes) == {n.id for n in stage.nodes} and set(graph.edges) == set(stage.edges)
    assert stage.to_dot(tmp_path / "stage.dot") == (tmp_path / "stage.dot").read_text()


def test_dot_escapes_what_would_end_a_string():
    dot = Stage(
        'a "stage"', [GraphNode("x", 'say "hi" \\ there', where="a.py:1"), GraphNode("y", "z")], [("x", "y")]
    ).to_dot()
    assert 'digraph "a \\"stage\\"" {' in dot
    assert 'label="say \\"hi\\" \\\\ there\\na.py:1"' in dot and '"x" -> "y";' in dot


def test_graphs_of_one_call_are_told_apart_and_their_sites_numbered_on():
    def fn(q, k, v):
        out = attend(q, k, v)
        torch._dynamo.graph_break()
        return attend(out, k, v)

    report = attnfx.explain(fn, rewrite="always")(*[rand(2, 4, 20, 8) for _ in range(3)])
    assert report.graphs == 2 and [s.name for s in report.sites] == ["attention_0", "attention_1"]
    placed = {(n.id.split("/")[0], n.site) for n in report.stages["rewritten"].nodes if n.label == "attnfx::attention"}
    assert placed == {("0", "attention_0"), ("1", "attention_1")}


@pytest.mark.slow
def test_torch_logs_and_the_structured_trace_show_the_stages(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nq = torch.randn(2, 4, 20, 8)\n"
        "fn = lambda q, k, v: (q @ k.mT).softmax(-1) @ v\n"
        "options = {'rewrite': 'always', 'inner': 'eager'}\n"
        "torch.compile(fn, backend='attnfx', options=options)(q, q, q)\n"
    )
    root = str(pathlib.Path(__file__).parents[2])
    env = {**os.environ, "TORCH_LOGS": "+attnfx", "TORCH_TRACE": str(tmp_path), "PYTHONPATH": root}
    # not in the root, where the folder `kernels` would hide a package of that name
    done = subprocess.run(
        [sys.executable, str(script)], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "traced a graph" in done.stderr and "attention_0 at script.py:3: chunked" in done.stderr
    log = "".join(f.read_text() for f in tmp_path.glob("*.log"))
    artifacts = [f'"name": "attnfx_{stage}"' for stage in ("traced", "lifted", "rewritten", "report")]
    assert [a for a in artifacts if a not in log] == []
    assert "torch.ops.attnfx.attention.default" in log
