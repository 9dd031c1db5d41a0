"""What a tier is given. A stand-in for `attnfx.kernels.call.Call`, field by field, until that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attnfx.spec import AttentionSpec


@dataclass(frozen=True)
class Call:
    """One call of the operator: query (B, H, T, D), key (B, G, S, D), value (B, G, S, Dv) of one floating dtype,
    one tensor per capture of the spec, one number per name in `spec.sizes`, and the int64 seed of its dropout."""

    spec: AttentionSpec
    query: Tensor
    key: Tensor
    value: Tensor
    captures: Sequence[Tensor]
    sizes: Sequence[int]
    seed: Tensor | None
