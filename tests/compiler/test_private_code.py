"""Explain and plan a model often without using up the recompile limit of the user's own compilation."""

import functools

import pytest
import torch
from torch import nn

import attnfx
from attnfx.compiler.private_code import private_code
from tests.support import compiled, new_reports, rand


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT).softmax(-1) @ v


def function(x):
    return (x @ x.mT).softmax(-1) @ x


MODELS = {"module": Attention(), "function": function, "container": nn.Sequential(Attention(), nn.GELU())}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_explaining_often_leaves_compilation_as_it_was(model):
    for n in range(torch._dynamo.config.recompile_limit + 2):
        (site,) = attnfx.explain(model)(rand(2, 16 + n, 16)).sites
        assert site.dims["T"] == 16 + n, "an earlier size made this one symbolic"
    with new_reports() as filed:
        compiled(model)(rand(2, 40, 16))
    assert [[s.dims["T"] for s in r.sites] for r in filed] == [[40]]


def test_a_module_is_restored():
    model = Attention()
    with private_code(model) as traced:
        assert traced is model
        assert model.forward.__code__ is not Attention.forward.__code__
    assert "forward" not in model.__dict__
    model.forward = own = functools.partial(Attention.forward, model)
    with pytest.raises(ValueError), private_code(model):
        raise ValueError
    assert model.forward is own


def test_defaults_and_closures_are_kept():
    scale = 3.0

    def fn(x, *, times=2.0):
        return x * times * scale

    with private_code(fn) as traced:
        assert traced(1.0) == 6.0
        assert traced(1.0, times=1.0) == 3.0
