"""A call of these tiers without its kernels: the chunked algorithm, with the kernels' own draw of dropout.

One pass may run in blocks and the other on a kernel, so both must drop the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnfx.kernels import chunked
from attnfx.kernels.call import Call

_ROUNDS = 10
_M0, _M1, _K0, _K1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85  # Philox4x32, Salmon et al. 2011
_WORD = 0xFFFFFFFF


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits, as int64, for each counter (c0, c1, c2, 0): what `tl.philox` gives."""
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1  # 64 bits: what overflows int64 is the sign alone
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _K0) & _WORD, (k1 + _K1) & _WORD
    return c0, c1, c2, c3


class Run(chunked.Run):
    """A chunked run whose dropout is that of the kernels."""

    def drop(self, at: chunked.Block, like: Tensor) -> Tensor | None:
        p = self.spec.dropout
        if p <= 0.0 or self.call.seed is None:
            return None
        h0, h1 = self.heads(at)

        def index(low: int, high: int, dim: int) -> Tensor:
            return torch.arange(low, high, device=self.device).view(-1, *[1] * (3 - dim))

        head = index(at.b0, at.b1, 0) * self.sizes["H"] + index(h0, h1, 1)
        words = philox(int(self.call.seed.item()), index(at.j0 // 4, -(-at.j1 // 4), 3), index(at.i0, at.i1, 2), head)
        first = at.j0 // 4 * 4
        bits = torch.stack(words, -1).flatten(-2)[..., at.j0 - first : at.j1 - first]
        return (bits >= round(p * 2**32)).to(like.dtype) / (1.0 - p if p < 1.0 else 1.0)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """As the tier's forward pass."""
    return chunked.forward(call, Run(call))


def backward(
    call: Call, grad_out: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """As the tier's backward pass."""
    return chunked.backward(call, grad_out, out, logsumexp, Run(call))
