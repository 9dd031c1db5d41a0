"""Check the command `attnfx`: its output, its exit codes, and its tracebacks for errors in the user's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from attnfx.cli import main
from attnfx.cli.loading import load
from attnfx.compiler import pipeline
from attnfx.targets import Target

FILE = """
import torch


def attend(q, k, v):
    return ((q @ k.mT) * 0.25 + torch.full((600, 600), -torch.inf).triu(1)).softmax(-1) @ v


def operands():
    return tuple(torch.randn(2, 4, 600, 16) for _ in range(3))


def positional():
    return attend, operands()


def named():
    return attend, dict(zip("qkv", operands()))


def one():
    return torch.nn.Softmax(-1), torch.randn(2, 3)


def broken_in_two():
    def model(q, k, v):
        out = attend(q, k, v)
        print("hello")
        return attend(out, k, v)

    return model, operands()


def refused():
    def model(q, k, v):
        return (q @ k.mT).cumsum(-2).softmax(-1) @ v

    return model, operands()


def raises():
    return {}["missing"]


def exits():
    raise SystemExit("no data here")


def nothing():
    pass


def strange_inputs():
    return attend, 3


class Model(torch.nn.Module):
    def forward(self, x):
        return self.multiply(x)

    def multiply(self, x):
        if x.shape[0] == 7:
            raise ValueError("seven is not allowed")
        return x @ x


def wrong_shapes():
    return Model(), torch.randn(2, 3)


def own_error():
    return Model(), torch.randn(7, 3)


def wrong_number_of_inputs():
    return Model(), (torch.randn(3, 3), 1, 2)
"""


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """Remove the user's modules, and their entry in sys.path, after a test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("models", None)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(FILE)
    return path


def line(text: str, function: str) -> str:
    """Return how a traceback names the line of FILE that contains a text."""
    return f"line {next(n for n, held in enumerate(FILE.splitlines(), 1) if text in held)}, in {function}"


def attnfx(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Run the command, require the exit code `code`, and return its stdout and stderr."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, f"{done.exit_code}\n{done.output}\n{done.exception!r}"
    return done.stdout, done.stderr


# -- loading a model -------------------------------------------------------------------------------------------
def test_a_factory_is_found_by_file_and_by_module(file, monkeypatch):
    model, args, kwargs = load(f"{file}:positional")
    assert model.__name__ == "attend" and len(args) == 3 and kwargs == {}
    assert list(load(f"{file}:named")[2]) == ["q", "k", "v"]
    assert [x.shape for x in load(f"{file}:one")[1]] == [(2, 3)]
    monkeypatch.chdir(file.parent)
    file.rename(file.with_name("models_of_mine.py"))
    assert len(load("models_of_mine:positional")[1]) == 3


def test_a_file_imports_what_stands_beside_it_and_hides_no_module(tmp_path):
    (tmp_path / "beside_it.py").write_text("import torch\nx = torch.ones(2)\n")
    (tmp_path / "json.py").write_text("from beside_it import x\ndef make():\n    return sum, [[x]]\n")
    assert load(f"{tmp_path / 'json.py'}:make")[0] is sum
    assert sys.modules["json"] is json


# -- explain ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("factory", ["positional", "named"])
def test_explain_prints_the_report(file, factory):
    out, err = attnfx("explain", f"{file}:{factory}", "--rewrite", "always")
    assert "1 of 1 attention sites rewritten" in out and "models.py:6" in out and "library" in out
    assert err == ""


def test_rewrite_and_train_reach_the_decision(file):
    out, _ = attnfx("explain", f"{file}:positional", "--rewrite", "never")
    assert "the graph was not searched" in out
    assert "1 of 1" in attnfx("explain", f"{file}:positional", "--train", "--rewrite", "always")[0]


def test_a_model_that_breaks_the_graph_is_explained_over_both_graphs(file):
    assert "2 of 2 attention sites" in attnfx("explain", f"{file}:broken_in_two", "--rewrite", "always")[0]


def test_json_is_the_report_s(file):
    said = json.loads(attnfx("explain", f"{file}:positional", "--json")[0])
    assert len(said["sites"]) == 1


def test_a_page_is_overwritten_only_by_force(file, tmp_path):
    page = tmp_path / "report.html"
    attnfx("explain", f"{file}:positional", "--html", page)
    first = page.read_text()
    assert "<html" in first
    page.write_text("mine")
    assert "exists; add --force to overwrite it" in attnfx("explain", f"{file}:positional", "--html", page, code=2)[1]
    assert page.read_text() == "mine"
    attnfx("explain", f"{file}:positional", "--html", page, "--force")
    assert "<html" in page.read_text()
    absent = tmp_path / "absent" / "report.html"
    assert "cannot be written" in attnfx("explain", f"{file}:positional", "--html", absent, code=2)[1]


def test_strict_exits_with_3_and_names_the_refused_site(file):
    assert "kept" in attnfx("explain", f"{file}:refused")[0]
    assert "models.py:" in attnfx("explain", f"{file}:refused", "--strict", code=3)[1]


def test_the_help_names_the_factory_and_only_the_exit_codes_of_the_command():
    explained, planned = (" ".join(attnfx(name, "--help")[0].split()) for name in ("explain", "plan"))
    assert all(
        "FACTORY is FILE.py:FACTORY or module:factory" in text and "MODEL is" not in text
        for text in (explained, planned)
    )
    assert "3 a site was refused under --strict;" in explained and "--strict" not in planned
    assert "3 no plan fits the memory budget;" in planned


def test_a_transformers_model_is_made_small_and_its_sizes_can_be_given():
    out, _ = attnfx("explain", "--hf", "llama", "--layers", 1, "--length", 64, "--heads", 2, "--hidden", 32)
    assert "of 1 attention sites" in out and "2 heads, 64 x 64 x 16, batch 1" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give either FACTORY or --hf"),
        (("{file}:positional", "--hf", "llama"), "give either FACTORY or --hf"),
        (("{file}",), "is not of the form FILE.py:FACTORY"),
        (("{folder}/absent.py:f",), "does not exist"),
        (("absent_module:f",), "the module 'absent_module' does not exist"),
        (("json.absent:f",), "the module 'json.absent' does not exist"),
        (("{file}:absent",), "has no function 'absent'; its functions: attend, operands, positional"),
        (("{file}:positional", "--target", "hundred"), "target"),
        (("--hf", "lama"), "has no model type 'lama'; did you mean 'llama'?"),
        (("--hf", "llama", "--hidden", "10", "--heads", "3"), "is not a multiple of --heads 3"),
        (("--hf", "wav2vec2"), "write a factory instead"),
    ],
)  # fmt: skip
def test_a_wrong_use_exits_with_2_and_says_what_is_wrong(file, arguments, says):
    given = [a.format(file=file, folder=file.parent) for a in arguments]
    out, err = attnfx("explain", *given, code=2)
    assert says in err and out == "" and "Traceback" not in err


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("raises", ("raises() of", line('{}["missing"]', "raises"), "KeyError: 'missing'")),
        ("exits", ("exits() of", "SystemExit: no data here")),
        ("nothing", ("returned None, expected a tuple (model, inputs)",)),
        ("strange_inputs", ("strange_inputs()", "returned an int as inputs, expected a tensor, a tuple or a dict")),
        ("wrong_shapes", (line("self.multiply(x)", "forward"), line("x @ x", "multiply"), "RuntimeError: ")),
        ("own_error", (line("raise ValueError", "multiply"), "ValueError: seven is not allowed")),
        ("wrong_number_of_inputs", ("TypeError", "takes 2 positional arguments but 4 were given")),
    ],
)
def test_an_error_of_the_user_s_code_exits_with_1_and_shows_that_error_alone(file, factory, says):
    out, err = attnfx("explain", f"{file}:{factory}", code=1)
    assert out == ""
    for words in says:
        assert words in err, err
    for ours in ("/attnfx/", "/torch/_dynamo/", "importlib", "TORCHDYNAMO_VERBOSE"):
        assert ours not in err, err


def test_a_file_that_does_not_import_shows_its_own_error(tmp_path):
    (tmp_path / "wrong.py").write_text("import math\n\nx = math.sqrt(-1)\n")
    _, err = attnfx("explain", f"{tmp_path / 'wrong.py'}:f", code=1)
    assert err.count('File "') == 1 and 'wrong.py", line 3' in err and "ValueError" in err
    (tmp_path / "unfinished.py").write_text("def f(:\n")
    assert "SyntaxError" in attnfx("explain", f"{tmp_path / 'unfinished.py'}:f", code=1)[1]


def test_a_failure_of_attnfx_exits_with_4_and_shows_its_traceback(file, monkeypatch):
    def fails(*_, **__):
        raise AssertionError("an invariant is broken")

    monkeypatch.setattr(pipeline, "run", fails)
    _, err = attnfx("explain", f"{file}:positional", code=4)
    assert "attnfx itself failed" in err and "an invariant is broken" in err


# -- targets, env ----------------------------------------------------------------------------------------------
def test_targets_are_listed_and_shown_with_their_sources():
    assert "h100-sxm" in attnfx("targets", "list")[0]
    names = [t["name"] for t in json.loads(attnfx("targets", "list", "--json")[0])]
    assert names == Target.names()
    shown = json.loads(attnfx("targets", "show", "H100 SXM", "--json")[0])
    assert shown["name"] == "h100-sxm" and shown["sources"]["bandwidth"]
    assert "GB/s" in attnfx("targets", "show", "h100-sxm")[0]
    assert "did you mean 'h100-" in attnfx("targets", "show", "h1000", code=2)[1]


def test_a_target_of_one_s_own_is_shown_or_refused_with_the_field_s_name(tmp_path):
    mine = tmp_path / "mine.json"
    record = dict(asdict(Target.by_name("a10")), name="mine")
    mine.write_text(json.dumps(record))
    assert json.loads(attnfx("targets", "show", str(mine), "--json")[0])["name"] == "mine"
    mine.write_text(json.dumps(record | {"clock": 1695}))
    assert "field 'clock' is 1695" in attnfx("targets", "show", str(mine), code=2)[1]


def test_env_tells_versions_and_variables_and_no_path_but_the_cache_s(monkeypatch):
    monkeypatch.setenv("ATTNFX_DUMP_DIR", "/home/somebody/secret")
    monkeypatch.setenv("ATTNFX_REWRITE", "always")
    said = json.loads(attnfx("env", "--json")[0])
    assert said["packages"]["torch"] and said["variables"] == {"ATTNFX_DUMP_DIR": "(set)", "ATTNFX_REWRITE": "always"}
    assert said["cache"] == os.environ["ATTNFX_CACHE_DIR"]
    text = attnfx("env")[0]
    assert "secret" not in text and "ATTNFX_REWRITE always" in text


# -- plan ------------------------------------------------------------------------------------------------------
def test_a_plan_is_printed_and_drawn(file, tmp_path):
    out, _ = attnfx("plan", f"{file}:positional", "--target", "rtx4090", "--html", tmp_path / "plan.html")
    assert "plan of" in out and "rtx4090" in out and 'id="timeline"' in (tmp_path / "plan.html").read_text()
    said = json.loads(attnfx("plan", f"{file}:positional", "--target", "rtx4090", "--json")[0])
    assert said["target"] == "rtx4090" and said["peak_bytes"] > 3 * 2 * 4 * 600 * 16 * 4


def test_what_cannot_be_planned_is_said(file):
    assert "rtx4090" in attnfx("plan", f"{file}:positional", "--target", "rtx4091", code=2)[1]
    assert "smallest" in attnfx("plan", f"{file}:positional", "--memory-budget", "1000", code=3)[1]
    assert line("x @ x", "multiply") in attnfx("plan", f"{file}:wrong_shapes", "--target", "rtx4090", code=1)[1]


# -- as a user runs it -----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_command_runs_and_writes_nothing_but_the_report(file):
    code = "import sys; from attnfx.cli import main; sys.argv[0] = 'attnfx'; main()"
    command = [sys.executable, "-c", code, "explain", f"{file}:positional", "--rewrite", "always"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("attnfx: 1 of 1") and done.stderr == ""


@pytest.mark.parametrize("command", ["explain", "targets", "env"])
def test_every_command_has_help_that_tells_the_exit_codes(command):
    assert command in attnfx("--help")[0]
    assert "Exit codes: 0 done" in attnfx(command, "--help")[0]
