"""Compare docs/performance.md, the README's table and the pictures with the results that they are made from."""

import copy
import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def benchmark():
    """Import a script of benchmarks/ by name, for this module's tests alone."""
    folder, before = str(Path(__file__).resolve().parents[2] / "benchmarks"), set(sys.modules)
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
    for name in ("grid_fit", "page", "picture"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.fixture
def page(benchmark):
    return benchmark("page")


def test_the_page_is_up_to_date(page):
    assert page.PAGE.read_text() == page.page(), "run make performance"


def test_the_table_of_the_readme_is_up_to_date(page):
    readme = page.README.read_text()
    assert readme == page.with_headline(readme), "run make performance"


def test_a_readme_without_markers_is_an_error(page):
    with pytest.raises(ValueError):
        page.with_headline("# attnfx\n")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_shows_the_results(benchmark, theme):
    picture = benchmark("picture")
    assert picture.drawn(picture.FOLDER / f"performance-{theme}.svg") == picture.data(), "run make performance"


def test_the_page_names_every_result_file(page):
    text = page.page()
    missing = [file.name for file in page.RESULTS.glob("*.json") if f"`{file.name}`" not in text]
    assert not missing


def test_a_number_follows_its_file(page, monkeypatch):
    changed = copy.deepcopy(page.stored("attention"))
    changed["rows"][0]["times"]["attnfx"]["min_ms"] = 123456.0
    read = page.stored
    monkeypatch.setattr(page, "stored", lambda name: changed if name == "attention" else read(name))
    assert "123456 ms" in page.attention() and "123456 ms" in page.headline()


def test_a_file_of_another_machine_is_named(page, monkeypatch):
    changed = copy.deepcopy(page.stored("models"))
    changed["machine"] |= {"cores": 64, "date": "2030-01-01"}
    read = page.stored
    monkeypatch.setattr(page, "stored", lambda name: changed if name == "models" else read(name))
    said = page.machines("attention", "grid", "models")
    assert "for `models.json`, 64 cores" in said and "2030-01-01" in said and said.count("PyTorch") == 1
