"""Kernels on CPU tensors need Triton's interpreter, kernels on a GPU its compiler: a process has one of the two."""

import os
from pathlib import Path

import pytest
import torch

COMPILED = ("test_gpu.py",)
EITHER = ("test_ahead.py",)


def pytest_collection_modifyitems(items):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if Path(__file__).parent not in item.path.parents or item.path.name in EITHER:
            continue
        if item.path.name in COMPILED:
            if interpreted or not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and Triton's compiler"))
        elif not interpreted:
            item.add_marker(pytest.mark.skip(reason="needs Triton's interpreter: set TRITON_INTERPRET=1"))
