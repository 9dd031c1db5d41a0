"""Describe one call of the attention operator, the input of every tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnfx.spec import AttentionSpec


@dataclass(frozen=True)
class Call:
    """The operands of one attention call.

    query (B, H, T, D), key (B, G, S, D) and value (B, G, S, Dv) share one floating dtype; G divides H. `captures` holds
    one tensor per slot of the spec, `given` one integer per name in `spec.sizes`. `seed` is one int64, needed for
    dropout. A call that computes weights alone passes the keys as values. `summary` is the mask's summary (see
    `attnfx.mask.runtime_summary`); kernels that support it skip the grains it marks as empty.
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
        """Return B, H, T, S and the spec's own sizes by name."""
        named = dict(B=self.query.shape[0], H=self.query.shape[1], T=self.query.shape[2], S=self.key.shape[2])
        return named | dict(zip(self.spec.sizes, self.given))

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Allocate out (B, H, T, Dv) in the spec's dtype and logsumexp (B, H, T) in its compute type."""
        batch, heads, rows, _ = self.query.shape
        # stored as (B, T, H, Dv), so that merging the heads needs no copy
        out = self.query.new_empty((batch, rows, heads, self.value.shape[3]), dtype=self.out_dtype).transpose(1, 2)
        return out, self.query.new_empty(self.query.shape[:3], dtype=self.compute)

    @property
    def compute(self) -> torch.dtype:
        return getattr(torch, self.spec.compute)

    @property
    def out_dtype(self) -> torch.dtype:
        return getattr(torch, self.spec.out_dtype)
