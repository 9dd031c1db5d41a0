"""Keep one version, and let the workflows and .ci/run call only make targets that exist."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import attnfx

ROOT = Path(__file__).resolve().parents[2]
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = [f for f in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if f.name != "config.yml"]


def jobs(workflow):
    return yaml.safe_load(workflow.read_text())["jobs"]


def test_the_version_is_in_one_place():
    assert importlib.metadata.version("attnfx") == attnfx.__version__
    for file in ("pyproject.toml", "CITATION.cff", "MANIFEST.in", "Makefile"):
        assert f'"{attnfx.__version__}"' not in (ROOT / file).read_text(), file


def test_a_source_checkout_can_be_imported():
    code = "import attnfx; print(attnfx.__version__, attnfx.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.split() == [attnfx.__version__, str(ROOT / "attnfx/__init__.py")]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_calls_make_targets_that_exist(workflow):
    for name, job in jobs(workflow).items():
        chosen = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in job.get("steps", []):
            if "run" not in step:
                continue
            program, target, *_ = step["run"].split()
            assert program == "make", f"{name}: {step['run']}"
            targets = chosen if target == "${{" else [target]
            assert targets and set(targets) <= TARGETS, f"{name}: {step['run']}"
        if str(job.get("uses", "")).startswith("./"):
            assert (ROOT / job["uses"]).exists()


def test_the_local_check_calls_make_targets_that_exist():
    called = re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert called and set(called) <= TARGETS


def test_the_package_is_built_before_it_is_published():
    assert jobs(ROOT / ".github/workflows/release.yml")["publish"]["needs"] == "package"


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.name)
def test_an_issue_form_asks_for_the_environment(form):
    fields = yaml.safe_load(form.read_text())["body"]
    required = [f["id"] for f in fields if f.get("validations", {}).get("required")]
    assert "env" in required
