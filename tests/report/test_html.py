"""Write the page of a report: self-contained, safe for any content, and working in a real browser."""

from __future__ import annotations

import json
import re
import shutil

import networkx as nx
import pytest
import torch

import attnfx
from attnfx.report.html import page
from attnfx.report.html.collapse import collapse
from attnfx.report.html.layout import HEIGHT, WIDTH, draw

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def two_layers(x, y):
    for n in range(2):
        scores = x @ x.transpose(-1, -2) * 0.125
        keep = torch.ones(64, 64).tril() > 0
        x = (scores.masked_fill(~keep, float("-inf")) if n == 0 else scores + y).softmax(-1) @ x
    return x


@pytest.fixture(scope="module")
def report():
    return attnfx.explain(two_layers, rewrite="always")(torch.randn(1, 4, 64, 16), torch.randn(64, 64))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 390)])
def test_the_page_opens_and_a_site_expands_without_an_error(report, browser, tmp_path, scheme, width):
    file = tmp_path / "report.html"
    report.to_html(file)
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    assert tab.locator("details").count() == 2
    tab.locator("summary").first.click()
    assert tab.locator(".tiles").first.is_visible()
    nodes = tab.locator("#graph .node").count()
    tab.locator("[data-show]").first.click()
    assert tab.locator("#graph [aria-expanded=true]").count() == 1
    assert tab.locator("#graph .node").count() > nodes
    tab.locator("[data-graph]").nth(1).click()
    assert tab.locator("#graph .node").count() < nodes + 5
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page is too wide"
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    tab.close()


def test_a_site_in_the_drawing_opens_by_click_and_by_key(report, browser, tmp_path):
    file = tmp_path / "report.html"
    report.to_html(file)
    tab = browser.new_page()
    tab.goto(file.as_uri())
    site = tab.locator("#graph [role=button]").first
    site.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#graph [aria-expanded=true]").count() == 1
    tab.locator("#graph [role=button] > rect").first.dispatch_event("click")
    assert tab.locator("#graph [aria-expanded=true]").count() == 0
    tab.close()


def test_a_page_that_exists_is_overwritten_only_by_force(report, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"report\.html' exists; pass force=True to overwrite it$"):
        report.to_html(file)
    assert file.read_text() == "mine"
    report.to_html(file, force=True)
    assert file.read_text().startswith("<!doctype html>")


def test_text_of_the_users_cannot_become_markup(report):
    held = json.loads(json.dumps(report.to_data()))
    held["sites"][0]["where"] = "</details><script>alert(1)</script>"
    held["stages"]["traced"]["nodes"][0]["label"] = "</script><script>alert(2)</script>"
    text = page(held)
    assert "alert(1)</script>" not in text and "alert(2)</script>" not in text
    embedded = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert "alert(2)" in json.dumps(json.loads(embedded[1]))


def test_a_timeline_is_drawn_where_there_is_one(report):
    assert 'id="timeline"' in page(report.to_data(), timeline=[0, 5, 3], caption="bytes")
    assert 'id="timeline"' not in page(report.to_data())


def test_no_two_boxes_of_a_drawing_overlap_and_edges_go_down():
    graph = nx.gn_graph(60, seed=3).reverse()
    graph = nx.DiGraph((a, b) if a < b else (b, a) for a, b in graph.edges)
    places = draw(graph).places
    boxes = sorted(places.values())
    assert all(abs(a[0] - b[0]) >= WIDTH or abs(a[1] - b[1]) >= HEIGHT for n, a in enumerate(boxes) for b in boxes[:n])
    assert all(places[a][1] < places[b][1] for a, b in graph.edges)


def test_a_graph_of_sites_has_no_cycle():
    """c lies between two nodes of site one, so it joins it. x stays outside site three: site two is between x and f."""
    graph = nx.DiGraph(["ab", "bc", "cd", "de", "xe", "ef", "xf"])
    nx.set_node_attributes(graph, {"b": "one", "d": "one", "e": "two", "x": "three", "f": "three"}, "site")
    outer, parts = collapse(graph, ["one", "two", "three"])
    assert nx.is_directed_acyclic_graph(outer)
    assert set(parts["one"]) == {"b", "c", "d"}
    assert set(parts["two"]) == {"e"} and set(parts["three"]) == {"f"}
