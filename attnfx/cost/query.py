"""The input of the cost models: one site on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnfx.spec import AttentionSpec
from attnfx.targets.sdpa_dispatch import USUAL, Backends


@dataclass(frozen=True)
class Question:
    """One site on one device.

    dims          B, H, G, T, S, D, Dv and the spec's own sizes, as integers
    dtype         of query, key and value; its name without "torch."
    device        type of a torch.device: "cpu", "cuda"
    training      whether a backward pass follows
    native        whether the graph itself calls PyTorch's fused operator
    sums          number of sums of the weights to recompute
    weights_read  source line or node that uses the weights: they then exist with any decision
    backends      the kernels of PyTorch's fused operator on a GPU
    flex_flash    whether FlashAttention-4 can run flex_attention for it
    compiled      whether Inductor compiles the rewritten graph
    single        whether the original multiplies a single query with the keys at a time, as a decode step does. The
                  queries of a group of heads may still be the rows of the site
    tiles         share of the tiles of flex_attention that the values of a mask in tensors leave, at the first call
    refused       the reason for each tier that cannot run the site
    """

    spec: AttentionSpec
    dims: Mapping[str, int]
    dtype: str
    device: str = "cpu"
    training: bool = False
    native: bool = False
    sums: int = 0
    weights_read: str = ""
    backends: Backends = USUAL
    flex_flash: bool = False
    compiled: bool = True
    single: bool = False
    tiles: float = 1.0
    refused: Mapping[str, str] = field(default_factory=dict)

    def can(self, tier: str) -> bool:
        return tier not in self.refused

    @property
    def scores(self) -> int:
        return self.dims["B"] * self.dims["H"] * self.dims["T"] * self.dims["S"]

    @property
    def element(self) -> int:
        """Return the bytes of an element of query, key and value."""
        return {"float16": 2, "bfloat16": 2, "float64": 8}.get(self.dtype, 4)
