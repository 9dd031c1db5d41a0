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
    for name in ("grid", "page", "picture"):
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


def test_another_machine_is_named_with_its_files(page, monkeypatch, tmp_path):
    for name in ("attention", "models"):
        text = (page.RESULTS / f"{name}.json").read_text()
        (tmp_path / f"{name}.json").write_text(text if name == "models" else text.replace('"cores": 2', '"cores": 64'))
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    said = page.machines()
    assert "64 cores" in said and "`attention.json`" in said and "`models.json`" in said
