"""What the cost models are asked about a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnfx.spec import AttentionSpec


@dataclass(frozen=True)
class Question:
    """One site on one device.

    dims          B, H, G, T, S, D, Dv and the spec's own sizes, as numbers
    dtype         of query, key and value, the name without "torch."
    device        a torch.device's type: "cpu", "cuda"
    training      whether a backward pass follows
    native        the graph calls PyTorch's fused operator itself
    sums          how many sums of the weights are computed again
    weights_read  where the weights themselves are read, so that they exist whatever is decided
    cudnn         whether PyTorch's fused operator takes cuDNN's kernel first, on GPUs where it may
    refused       for each tier that cannot run the site, why
    """

    spec: AttentionSpec
    dims: Mapping[str, int]
    dtype: str
    device: str = "cpu"
    training: bool = False
    native: bool = False
    sums: int = 0
    weights_read: str = ""
    cudnn: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)

    def can(self, tier: str) -> bool:
        return tier not in self.refused

    @property
    def scores(self) -> int:
        return self.dims["B"] * self.dims["H"] * self.dims["T"] * self.dims["S"]

    @property
    def element(self) -> int:
        """Bytes of an element of query, key and value."""
        return {"float16": 2, "bfloat16": 2, "float64": 8}.get(self.dtype, 4)
