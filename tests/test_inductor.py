"""Keep operators that synchronize with the device out of the CUDA graphs that Inductor captures."""

import pytest
import torch

from attnfx import backend, inductor
from tests.support import rand

SYNCHRONOUS = ("attention_rows", "attention_weights", "attention_weights_max")


@pytest.mark.parametrize("name", ["attention", "mask_summary", *SYNCHRONOUS])
def test_operators_that_read_the_device_are_left_out_of_cuda_graphs(name):
    for op in (name, f"{name}_backward"):
        if hasattr(torch.ops.attnfx, op):
            tags = getattr(torch.ops.attnfx, op).default.tags
            assert (torch.Tag.cudagraph_unsafe in tags) == (name in SYNCHRONOUS)


def dropped(q, k, v):
    return torch.nn.functional.dropout((q @ k.mT).softmax(-1), 0.5) @ v


def plain(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(("attention", "captured"), [(dropped, False), (plain, True)])
def test_a_graph_whose_dropout_is_seeded_on_the_host_is_not_captured(attention, captured, monkeypatch):
    monkeypatch.setenv("ATTNFX_TIERS", "chunked")
    monkeypatch.setenv("ATTNFX_REWRITE", "always")
    asked = []

    def rest(gm, example_inputs, inner, patches, *_):
        asked.append(patches.get("triton.cudagraphs"))
        return gm.forward

    monkeypatch.setattr(inductor, "compile_rest", rest)
    run = torch.compile(attention, backend=backend.attnfx, mode="reduce-overhead")
    run(*(rand(1, 2, 20, 8) for _ in range(3)))
    assert asked == [captured]


def test_a_tool_that_stands_in_for_inductor_keeps_its_own_inner_compiler(monkeypatch):
    """Tools that count operators replace compile_fx, and give an inner compiler if none is given to them."""
    import torch._inductor.compile_fx as module

    original, seen = module.compile_fx, []

    def inner(gm, example_inputs, **kwargs):
        def call(inputs):
            seen.append(any("attnfx" in str(n.target) for n in gm.graph.nodes))
            args = list(inputs)
            inputs.clear()
            return gm.forward(*args)

        call._boxed_call = True
        return call

    def compile_fx(gm, example_inputs, inner_compile=None, **kwargs):
        return original(gm, example_inputs, inner_compile=inner_compile or inner, **kwargs)

    monkeypatch.setattr(module, "compile_fx", compile_fx)
    run = torch.compile(plain, backend="attnfx", options={"rewrite": "always", "tiers": ["chunked"]})
    run(*(rand(1, 2, 20, 8) for _ in range(3)))
    assert seen == [True]
