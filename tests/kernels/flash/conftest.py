"""Skip tests that this process cannot run, and mark all as slow except the tests of generated functions.

Kernels on CPU tensors need Triton's interpreter, kernels on a GPU its compiler."""

import os
from pathlib import Path

import pytest
import torch

COMPILED = ("test_gpu.py",)
EITHER = ("test_ahead.py",)


def pytest_collection_modifyitems(items):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        if here / "codegen" not in item.path.parents:
            item.add_marker(pytest.mark.slow)
        if item.path.name in EITHER:
            continue
        if item.path.name in COMPILED:
            if interpreted or not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and Triton's compiler"))
        elif not interpreted:
            item.add_marker(pytest.mark.skip(reason="needs Triton's interpreter: set TRITON_INTERPRET=1"))
