"""Define the operator `attnfx::mask_summary`: classify the grains of a mask given by tensors as empty, full or partial.

The operator is a separate node of the rewritten graph, not a cache inside `attnfx::attention`, because only the graph
knows when a tensor changes. Compilers write to buffers without updating version counters and reuse them for other
values. A captured CUDA graph is replayed over new values at the same address. All layers that share a mask read one
node, in both passes; it is recomputed on every run of the graph.
"""

from __future__ import annotations

import torch

from attnfx.kernels.flash import tier as flash
from attnfx.kernels.operators.attention import register, require, twice
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AXES, AttentionSpec, from_json

_SCHEMA = "mask_summary(Tensor[] captures, SymInt[] sizes, str spec) -> Tensor"


def _shape(captures, sizes, spec) -> tuple[int, ...]:
    made: AttentionSpec = from_json(spec)
    names = (*AXES.values(), *made.sizes)
    require(len(captures) == len(made.captures), f"captures has {len(captures)} tensors, expected {len(made.captures)}")
    require(len(sizes) == len(names), f"sizes has {len(sizes)} numbers, expected {len(names)}")
    return summary.shape(made, dict(zip(names, sizes)))


def _summary(captures, sizes, spec):
    shape = _shape(captures, sizes, spec)
    if flash.missing(captures[0].device) or flash.beyond(*shape[:2]):
        return captures[0].new_full(shape, summary.LIVE | summary.DEAD, dtype=torch.uint8)
    return flash.summarise(captures, sizes, from_json(spec))


def _fake_summary(captures, sizes, spec):
    return captures[0].new_empty(_shape(captures, sizes, spec), dtype=torch.uint8)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


register(_SCHEMA, _summary, _fake_summary, twice, _setup)
