"""Test dropout's random bits for bias, and for correlation between elements, heads and seeds."""

import math

import pytest
import torch

from attnfx.kernels.flash.host.blocks import philox

SIDE, LEVELS = 256, 256


def words(seed, head=0, first=0):
    """Return (4, SIDE, SIDE) random 32-bit words, for 2 SIDE rows and keys."""
    at = first + torch.arange(SIDE)
    drawn = philox(torch.tensor(seed), at[None, :], at[:, None], torch.tensor(head))
    return torch.stack([x.expand(SIDE, SIDE) for x in drawn])


SAMPLES = {
    "first": lambda: words(0),
    "large seed": lambda: words(2**62 + 12345),
    "far": lambda: words(7, head=1000, first=1 << 19),
}


def correlation(x, y):
    """Return the correlation in standard deviations of independent samples."""
    x, y = (z.double().flatten() - z.double().mean() for z in (x, y))
    return (x @ y / (x.norm() * y.norm())).item() * math.sqrt(x.numel())


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_takes_each_value_equally_often(name, shift):
    counts = torch.bincount((SAMPLES[name]() >> shift & 255).flatten(), minlength=LEVELS).double()
    expected = counts.sum() / LEVELS
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (LEVELS - 1)) < 5 * math.sqrt(2 * (LEVELS - 1))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5])
def test_the_share_of_the_dropped_is_right_in_every_row_and_column(p):
    dropped = torch.stack([words(seed) for seed in range(8)]) < round(p * 2**32)
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):
        share = dropped.double().mean(dims)
        of = dropped.numel() / share.numel()
        assert ((share - p).abs() * math.sqrt(of / (p * (1 - p)))).max() < 5.5


@pytest.mark.parametrize("name", SAMPLES)
def test_neighbours_are_not_correlated(name):
    x = SAMPLES[name]()
    pairs = [(x[a], x[b]) for a in range(4) for b in range(a)]
    for apart in (1, 2, 4, 16, 64):
        pairs += [(x[:, apart:], x[:, :-apart]), (x[..., apart:], x[..., :-apart])]
        pairs.append((x[:, apart:, apart:], x[:, :-apart, :-apart]))
    assert max(abs(correlation(a, b)) for a, b in pairs) < 5


def test_heads_and_seeds_are_not_correlated():
    first = words(0)
    others = [words(0, head) for head in (1, 2, 16, 1 << 20)]
    others += [words(seed) for seed in (1, 2, 3, 1 << 31, 1 << 32, 1 << 33, (1 << 32) + 1)]
    assert max(abs(correlation(first, x)) for x in others) < 5
    low = [(x & 0xFFFF) for x in (first, *others)]
    assert max(abs(correlation(low[0], x)) for x in low[1:]) < 5
