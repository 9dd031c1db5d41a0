"""Run the tests of whole rows in small chunks."""

import pytest

from attnfx.kernels.rows import run as rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Configure several chunks, the last one shorter."""
    monkeypatch.setattr(rows, "TILE_ELEMENTS", {"cpu": 1})
