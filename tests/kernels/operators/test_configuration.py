"""Pass the chosen tile to its kernel."""

import re

import pytest
import torch

from attnfx.kernels.call import Call
from attnfx.kernels.flash.host.tiles import Tile, decode_tiles, forward_tiles
from attnfx.kernels.operators import attention as operator
from attnfx.kernels.operators.configuration import Configuration, parse
from attnfx.spec import AttentionSpec


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("flash,chunked", (Configuration("flash"), Configuration("chunked"))),
        ("flash:128x64/8/3,chunked", (Configuration("flash", Tile(128, 64, 8, 3)), Configuration("chunked"))),
        ("decode:16x128/4/3/32", (Configuration("decode", Tile(16, 128, 4, 3), 32),)),
    ],
)
def test_a_configuration_is_read_as_it_is_written(text, parts):
    assert parse(text) == parts and ",".join(map(str, parts)) == text


@pytest.mark.parametrize("text", ["flash:", "flash:128", "flash:128x64/8", "flash:100x64/8/3", "a b", "flash:0x64/8/3"])
def test_a_configuration_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"tier {text!r}")):
        parse(text)


def test_the_chosen_tile_is_given_to_the_kernel(monkeypatch):
    given = []

    def forward(call, tile=None, splits=0):
        given.append((tile, splits))
        return call.outputs()

    flash = operator.TIERS["flash"]._replace(supports=lambda call: None, forward=forward)
    monkeypatch.setitem(operator.TIERS, "flash", flash)
    x = torch.randn(1, 2, 8, 16)
    for tiers in ("flash:128x64/8/3,chunked", "flash"):
        operator.choose(tiers, Call(AttentionSpec(), x, x, x)).forward(Call(AttentionSpec(), x, x, x))
    assert given == [(Tile(128, 64, 8, 3), 0), (None, 0)]


@pytest.mark.parametrize("tiles", [forward_tiles, decode_tiles])
def test_the_chosen_tile_is_tried_first_and_the_table_stays_behind_it(monkeypatch, tiles):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device, chosen = torch.device("cuda"), Tile(32, 32, 4, 2)
    table = tiles(device, torch.bfloat16, 64)
    assert tiles(device, torch.bfloat16, 64, chosen)[0] == chosen
    assert [t for t in tiles(device, torch.bfloat16, 64, chosen) if t != chosen] == [t for t in table if t != chosen]
    assert chosen not in tiles(torch.device("cpu"), torch.bfloat16, 64, chosen)  # the interpreter has its own
