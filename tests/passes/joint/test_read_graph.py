"""Count the workspace of a model's own fused attention, and read operators with several results."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attnfx.memory.liveness import peak
from attnfx.memory.step import Part, step
from attnfx.passes.joint.read_graph import attention_workspace, read
from attnfx.targets import sdpa_dispatch as fused


@pytest.mark.parametrize("groups", [16, 4])
def test_the_models_own_call_counts_it_too(groups):
    """The workspace has the query's gradient in float32 and each head's gradient of shared keys, on CPU and GPU."""
    query, key = torch.empty(2, 16, 200, 64, device="meta"), torch.empty(2, groups, 300, 64, device="meta")
    expected = fused.workspace(query.shape, key.shape, 64, 4)
    assert expected >= 4 * 2 * 16 * 256 * 65
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        for suffix in ("", "_backward"):
            graph = torch.fx.Graph()
            operands = [graph.placeholder(n) for n in "gqkv"]
            for x, held in zip(operands, (query, query, key, key), strict=True):
                x.meta["val"] = held
            target = getattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}").default
            node = graph.call_function(target, tuple(operands[not suffix :]))
            assert attention_workspace(node, cpu=False) == (expected if suffix else 0)
            shorter = attention_workspace(node, cpu=False, shape=lambda x: [*x.meta["val"].shape[:2], 128, 64])
            assert shorter == (fused.workspace((2, 16, 128), (2, groups, 128, 64), 64, 4) if suffix else 0)


@pytest.mark.parametrize("several", [lambda x: x.topk(64), lambda x: torch.nn.functional.max_pool1d_with_indices(x, 2)])
def test_an_operator_with_several_results_stores_them(several):
    """A value that one of them owns is allocated before it is released."""
    graph = make_fx(lambda x: several(x * 2.0)[0].exp().sum(), tracing_mode="fake")(torch.randn(4, 16, 128))
    events = step([Part(read(graph, cpu=True))], cpu=True).events()
    assert peak(events) >= 4 * 16 * (128 * 4 + 64 * (4 + 8)) and sum(e.bytes for e in events) == 4
