"""Rewrite every attention of a model that generates tokens from a cache, with eager's tokens.

The caches run the same operators as those of transformers. They are joined, joined and cut to a window, written in
place, or shifted in place.
"""

import pytest
import torch
from torch import nn

from tests.support import compiled, new_reports

HEADS, GROUPS, WIDTH, WINDOW, SPACE, VOCABULARY = 4, 2, 8, 6, 40, 31


class Joined:
    """A cache that grows by concatenation."""

    window = None

    def __init__(self, batch: int):
        self.length = 0
        self.keys = self.values = torch.zeros(batch, GROUPS, 0, WIDTH)

    def positions(self, new: int):
        """Return (first position of the new tokens, first cached position, cached positions after an update)."""
        return self.length, 0, self.length + new

    def update(self, key, value):
        self.length += key.shape[2]
        self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        return self.keys, self.values


class JoinedWindow(Joined):
    """A cache of the last tokens of a window."""

    window = WINDOW

    def positions(self, new: int):
        before = WINDOW - 1 if self.length >= WINDOW else self.length
        return self.length, max(self.length - WINDOW + 1, 0), before + new

    def update(self, key, value):
        self.length += key.shape[2]
        keys, values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        self.keys, self.values = keys[:, :, -WINDOW + 1 :], values[:, :, -WINDOW + 1 :]
        return keys, values


class Static:
    """A cache of a fixed size, which counts its tokens in place."""

    window = None

    def __init__(self, batch: int):
        self.length = torch.tensor(0)
        self.keys, self.values = (torch.zeros(batch, GROUPS, SPACE, WIDTH) for _ in range(2))

    def positions(self, new: int):
        return self.length, 0, SPACE

    def update(self, key, value):
        at = torch.arange(key.shape[2]) + self.length
        self.length.add_(key.shape[2])
        self.keys.index_copy_(2, at, key)
        self.values.index_copy_(2, at, value)
        return self.keys, self.values


class StaticWindow:
    """A cache of a fixed size that holds a window, and shifts it in place."""

    window = WINDOW

    def __init__(self, batch: int):
        self.length, self.count = torch.tensor(0), 0
        self.keys, self.values = (torch.zeros(batch, GROUPS, WINDOW, WIDTH) for _ in range(2))

    def positions(self, new: int):
        first = max(self.count - WINDOW + 1, 0)
        if self.count >= WINDOW:
            return self.count, first, WINDOW - 1 + new
        return self.count, first, max(self.count + new, WINDOW)

    def update(self, key, value):
        before, new = self.count, key.shape[2]
        self.count += new
        if before + new <= WINDOW:
            at = torch.arange(new) + self.length
            self.length.add_(new)
            self.keys.index_copy_(2, at, key)
            self.values.index_copy_(2, at, value)
            return self.keys, self.values
        if before >= WINDOW and new == 1:
            last = torch.tensor([-1])
            keys, values = self.keys.roll(-1, 2), self.values.roll(-1, 2)
            keys[:, :, last], values[:, :, last] = key, value
            self.keys.copy_(keys)
            self.values.copy_(values)
            return self.keys, self.values
        held = slice(1, None) if before >= WINDOW else slice(before)
        keys, values = torch.cat([self.keys[:, :, held], key], 2), torch.cat([self.values[:, :, held], value], 2)
        self.keys.copy_(keys[:, :, -WINDOW:])
        self.values.copy_(values[:, :, -WINDOW:])
        return keys, values


class Model(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        width = HEADS * WIDTH
        self.embed = nn.Embedding(VOCABULARY, width)
        self.query, self.out = (nn.ModuleList(nn.Linear(width, width) for _ in range(layers)) for _ in range(2))
        self.pair = nn.ModuleList(nn.Linear(width, 2 * GROUPS * WIDTH) for _ in range(layers))

    def forward(self, tokens, caches, padding):
        """Return the logits of the last token. `padding` counts the tokens before each text, which are hidden."""
        x = self.embed(tokens)
        new = tokens.shape[1]
        start, first, size = caches[0].positions(new)
        i, j = torch.arange(new)[:, None] + start, torch.arange(size) + first
        keep = (j <= i) & (j >= padding[:, None, None])
        if caches[0].window is not None:
            keep = keep & (j > i - caches[0].window)
        bias = torch.where(keep, 0.0, torch.finfo(x.dtype).min)[:, None]
        for query, pair, out, cache in zip(self.query, self.pair, self.out, caches, strict=True):
            q = query(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
            k, v = pair(x).unflatten(-1, (2, GROUPS, WIDTH)).permute(2, 0, 3, 1, 4)
            k, v = (y.repeat_interleave(HEADS // GROUPS, 1) for y in cache.update(k, v))
            weights = torch.softmax(q @ k.mT * WIDTH**-0.5 + bias, -1, dtype=torch.float32)
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
        return x[:, -1] @ self.embed.weight.T


def generated(run, cache, lengths, layers):
    """Return the logits of each step: prompts of these lengths in turn, each followed by two single tokens."""
    caches = [cache(2) for _ in range(layers)]
    random = torch.Generator().manual_seed(3)
    found, padding = [], torch.tensor([0, 2])
    for length in lengths:
        tokens = torch.randint(VOCABULARY, (2, length), generator=random)
        for _ in range(3):
            found.append(run(tokens, caches, padding))
            tokens = found[-1].argmax(-1, keepdim=True)
    return torch.stack(found)


def check_tokens(cache, dynamic):
    layers = 2 if dynamic else 1
    torch.manual_seed(0)
    model, lengths = Model(layers), (4, 3, 7)
    with torch.no_grad(), new_reports() as filed:
        found = generated(compiled(model, dynamic=dynamic, inner="eager"), cache, lengths, layers)
        expected = generated(model, cache, lengths, layers)
    assert found.argmax(-1).equal(expected.argmax(-1))
    torch.testing.assert_close(found, expected)
    sites = [site for report in filed for site in report.sites]
    assert len(sites) >= 2 * layers and all(site.rewritten for site in sites), "\n".join(map(str, filed))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("cache", [JoinedWindow, Joined], ids=lambda cache: cache.__name__)
def test_tokens_from_a_cache_that_is_joined_are_those_of_eager(cache, dynamic):
    check_tokens(cache, dynamic)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("cache", [Static, StaticWindow], ids=lambda cache: cache.__name__)
def test_tokens_from_a_cache_that_is_written_are_those_of_eager(cache, dynamic):
    check_tokens(cache, dynamic)
