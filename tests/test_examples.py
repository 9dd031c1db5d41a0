"""Run the examples, and check that they report a rewrite and eager's results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script, sites", [("handwritten_gpt.py", 2), ("custom_score.py", 1), ("padding_mask.py", 1)])
def test_a_short_example_rewrites_every_site_and_agrees_with_eager(script: str, sites: int) -> None:
    printed = run(script)
    assert f"{sites} of {sites} attention sites rewritten" in printed
    assert printed.rstrip().endswith("(ok)")


def test_the_demo_offers_each_of_its_models() -> None:
    printed = run("demo.py", "--help")
    for model in ("gpt2", "bert", "mistral", "vit"):
        assert model in printed
