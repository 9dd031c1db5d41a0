"""One call of the operator: what every tier is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnfx.spec import AttentionSpec


@dataclass(frozen=True)
class Call:
    """The tensors and numbers that a spec runs on.

    query (B, H, T, D), key (B, G, S, D) and value (B, G, S, Dv) of one floating dtype, G a divisor of H; `captures` one
    tensor per slot of the spec, `given` one number per name in `spec.sizes`; `seed` one int64, where there is dropout.
    Weights without values are asked for with the keys as values. `summary` is that of the mask, as
    `attnfx.mask.runtime_summary` describes it: kernels that know it skip what it says is empty.
    """

    spec: AttentionSpec
    query: Tensor
    key: Tensor
    value: Tensor
    captures: Sequence[Tensor] = ()
    given: Sequence[int] = ()
    seed: Tensor | None = None
    summary: Tensor | None = None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """B, H, T, S and the spec's own sizes."""
        named = dict(B=self.query.shape[0], H=self.query.shape[1], T=self.query.shape[2], S=self.key.shape[2])
        return named | dict(zip(self.spec.sizes, self.given))

    def outputs(self) -> tuple[Tensor, Tensor]:
        """out (B, H, T, Dv) in the spec's dtype and logsumexp (B, H, T) in its compute type, both empty."""
        out = output_like(self.query, self.value.shape[3], self.out_dtype)
        return out, self.query.new_empty(self.query.shape[:3], dtype=self.compute)

    @property
    def compute(self) -> torch.dtype:
        return getattr(torch, self.spec.compute)

    @property
    def out_dtype(self) -> torch.dtype:
        return getattr(torch, self.spec.out_dtype)


def output_like(query: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """An empty output (B, H, T, width) whose memory is (B, T, H, width): models merge the heads next, and then need no
    copy."""
    batch, heads, rows, _ = query.shape
    return query.new_empty((batch, rows, heads, width), dtype=dtype).transpose(1, 2)
