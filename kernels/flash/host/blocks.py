"""Run a call of these tiers without kernels: the chunked algorithm with the kernels' dropout.

One pass may run in blocks and the other in a kernel, so both must drop the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnfx.kernels.chunked import block_run as chunked_run
from attnfx.kernels.chunked.blocks import Block

_ROUNDS = 7
_M0, _M1, _K0, _K1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85  # Philox4x32, Salmon et al. 2011
_WORD = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `tl.philox`: four 32-bit words, as int64, for each counter (c0, c1, c2, 0). seed is one int64 tensor. It
    is never read by the host, so that a CUDA graph can capture this."""
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1  # 64-bit products: only the sign bit overflows int64
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _K0) & _WORD, (k1 + _K1) & _WORD
    return c0, c1, c2, c3


class Run(chunked_run.Run):
    """A run of the chunked tier with the kernels' dropout."""

    def drop(self, at: Block, like: Tensor) -> Tensor | None:
        p = self.spec.dropout
        if p <= 0.0 or self.call.seed is None:
            return None
        h0, h1 = self.heads(at)

        def index(low: int, high: int, dim: int) -> Tensor:
            return torch.arange(low, high, device=self.device).view(-1, *[1] * (3 - dim))

        # one Philox call decides rows i and i + 8 at keys j and j + 8: 8 x 8 calls cover 16 rows and 16 keys
        (i0, i1), (j0, j1) = ((low // 16, -(-high // 16)) for low, high in ((at.i0, at.i1), (at.j0, at.j1)))
        head = index(at.b0, at.b1, 0) * self.sizes["H"] + index(h0, h1, 1)
        words = philox(self.call.seed.view(()), index(8 * j0, 8 * j1, 3), index(8 * i0, 8 * i1, 2), head)
        bits = torch.stack(words, -1).unflatten(-1, (2, 2)).unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
        bits = bits.permute(0, 1, 2, 6, 3, 4, 7, 5).flatten(5).flatten(2, 4)
        bits = bits[..., at.i0 - 16 * i0 : at.i1 - 16 * i0, at.j0 - 16 * j0 : at.j1 - 16 * j0]
        return (bits >= round(p * 2**32)).to(like.dtype) / (1.0 - p if p < 1.0 else 1.0)
