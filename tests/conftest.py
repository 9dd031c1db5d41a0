"""Start every test with an empty compiler, no reports, a fixed seed and no caches; verify graphs after each pass."""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Generated modules are kept for this run only.
if "ATTNFX_CACHE_DIR" not in os.environ:
    os.environ["ATTNFX_CACHE_DIR"] = tempfile.mkdtemp(prefix="attnfx-tests-")
    atexit.register(shutil.rmtree, os.environ["ATTNFX_CACHE_DIR"], ignore_errors=True)

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter; Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest would record every line of PyTorch's structured trace
logging.getLogger("torch.__trace").propagate = False


# Folders whose tests compile; each case takes half a second or more.
COMPILING = ("backend", "compiler", "memory", "passes", "tuning", "verify")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark more tests as slow: cases that Inductor compiles, and all but the first case of each test in COMPILING.
    `pytest -m "not slow"` runs the rest."""
    tests = Path(__file__).parent
    seen = set()
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        cases = getattr(item, "callspec", None)
        test = item.path, item.originalname
        inductor = cases is not None and cases.params.get("inner") == "inductor"
        folder = item.path.relative_to(tests).parts[0]
        if inductor or (test in seen and folder in COMPILING):
            item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("slow") is None:
            seen.add(test)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr("attnfx.compiler.pipeline.CHECK_EACH", True)
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def golden(request):
    """Compare a text with the file golden/<name> next to the test; ATTNFX_ACCEPT=1 writes the file instead."""

    def compare(name: str, text: str) -> None:
        file = request.path.parent / "golden" / name
        if os.environ.get("ATTNFX_ACCEPT") == "1":
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        assert file.exists(), f"{file.name} is missing: run with ATTNFX_ACCEPT=1 and read what it writes"
        assert text == file.read_text(), "the text has changed: if that is right, run with ATTNFX_ACCEPT=1"

    return compare


@pytest.fixture
def unexercised(monkeypatch):
    """Disable the exercise of calls on tiny tensors at compile time, for tests that record calls."""
    monkeypatch.setattr("attnfx.compiler.apply.exercise", lambda *_: None)


@pytest.fixture
def shapes_left(monkeypatch):
    """Collect the shapes of all tensors in the rewritten graphs."""
    from attnfx.compiler import pipeline
    from attnfx.passes.fx.nodes import number

    found, original = [], pipeline.run

    def run(gm, *rest, **named):
        result = original(gm, *rest, **named)
        made = result.gm if result.gm is not None else gm
        held = (n.meta.get("val") for n in made.graph.nodes)
        found.extend(tuple(map(number, x.shape)) for x in held if isinstance(x, torch.Tensor))
        return result

    monkeypatch.setattr(pipeline, "run", run)
    return found
