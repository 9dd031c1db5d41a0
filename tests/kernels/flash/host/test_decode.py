"""Skip keys in the decode kernels: by the indices, and by the summary of a mask in a tensor."""

import math
from dataclasses import replace

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.mask import key_span
from attnfx.mask import runtime_summary as summary
from attnfx.spec import AttentionSpec, B, Capture, H, I, J
from tests.kernels.cases import DOT, FINITE, INF, masked
from tests.kernels.flash.cases import tensors, whole
from tests.kernels.flash.host.test_mask_summary import compiled, passes, small
from tests.kernels.flash.test_addend import states_of
from tests.support import new_reports

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
assert small and passes  # fixtures
S, STEP = 200, 16
TILE = Tile(16, STEP, 1, 1)


def cache(*parts, rows=1):
    """Create a mask (2, rows, S) that keeps these parts of each batch's keys."""
    kept = torch.zeros(2, rows, S, dtype=torch.bool)
    for b, keys in enumerate(parts):
        kept[b, :, keys] = True
    return kept


def kept_call(kept, fill, added, rows=1, more=A.TRUE, index=(B, I, J), **shape):
    """Create a call with the summary of its mask, boolean or additive."""
    capture = torch.zeros(kept.shape).masked_fill(~kept, fill) if added else kept
    load = A.load(0, index, "f" if added else "b")
    score = A.add(DOT, load) if added else masked(A.and_(load, more), fill)
    spec = AttentionSpec(score=score, captures=(Capture(load.kind, len(index)),))
    call = Call(spec, *tensors(rows, S, **shape), (capture,))
    return replace(call, summary=states_of(call))


def compare(call, visited=None):
    """Compare with the whole matrix in float64, and check the number of listed tiles of each batch."""
    want = whole(call.spec, *(x.double() for x in (call.query, call.key, call.value)), call.captures)
    out, logsumexp = split.forward(call, TILE, wanted=5)
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5, equal_nan=True)
    if visited is not None:
        decoded, _ = split.launches(call, out, logsumexp, TILE, wanted=5)
        for made in decoded.before:
            made.run(out.device)
        assert decoded.arguments["walks"][0][:, 0, 0, 3].tolist() == visited


PADDED = slice(20, 70), slice(150, None)
ALL = 13


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_empty_tiles_are_left_out(fill, added):
    compare(kept_call(cache(*PADDED), fill, added, heads=4, groups=2), [4, 4])


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_a_row_without_a_live_key_is_eagers(fill, added):
    """Its masked keys average or make NaN. For NaN, a boolean mask can skip every key."""
    compare(kept_call(cache(slice(0, 0), slice(7, 90)), fill, added), [0 if fill == -INF and not added else ALL, 6])


@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_one_row_of_several_without_a_live_key(fill):
    kept = cache(*PADDED, rows=3)
    kept[0, 1] = False
    compare(kept_call(kept, fill, True, rows=3), [ALL, 4])


def test_rows_that_share_no_live_grain_see_every_tile():
    """Each row has a live key, but the summary cannot show that."""
    kept = cache(slice(0, 0), slice(7, 90), rows=2)
    kept[0, 0, 3], kept[0, 1, 100] = True, True
    compare(kept_call(kept, FINITE, True, rows=2), [ALL, 6])


def test_indices_and_a_tensor():
    window = A.lt(A.sub(A.const(60), J), A.const(20))  # keys from 41
    compare(kept_call(cache(*PADDED), -INF, False, more=window, heads=4, groups=2), [3, 4])
    compare(kept_call(cache(*PADDED), FINITE, False, more=window, heads=4, groups=2), [3, 4])
    compare(kept_call(cache(slice(20, 40), slice(150, None)), FINITE, False, more=window), [ALL, 4])


def test_a_mask_by_head():
    kept = torch.stack([cache(*PADDED)[:, 0], cache(slice(3, 80), slice(90, 100))[:, 0]], 1)[0]  # (H, S)
    call = kept_call(kept, FINITE, True, index=(H, J), heads=2, groups=2)
    assert call.summary.shape[1] == 2
    compare(call)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_heads_that_share_keys_share_a_list(fill, rows):
    """All of them visit a tile that one of them sees; with a finite fill, only if each of them sees a key."""
    starts = torch.tensor([5, 30, 100, 120])[:, None]
    kept = (torch.arange(S) >= starts) & (torch.arange(S) < starts + 20)  # (H, S)
    tiles = -(-S // STEP)
    counts = [len({j // STEP for h in some for j in kept[h].nonzero().view(-1).tolist()}) for some in ((0, 1), (2, 3))]
    call = kept_call(kept, fill, False, rows=rows, index=(H, J), heads=4, groups=2)
    compare(call)
    decoded, _ = split.launches(call, *call.outputs(), TILE, wanted=5)
    for made in decoded.before:
        made.run(call.query.device)
    assert decoded.arguments["walks"][0][0, :, 0, 3].tolist() == counts and max(counts) < tiles
    blind = kept.clone()
    blind[1] = False  # with a finite fill, a head without a key averages over all
    call = kept_call(blind, fill, False, rows=rows, index=(H, J), heads=4, groups=2)
    compare(call)


def test_what_is_empty_is_not_visited():
    call = kept_call(cache(*PADDED), FINITE, True)
    key, value = call.key.clone(), call.value.clone()
    key[0, :, 80:] = value[0, :, 80:] = key[1, :, :144] = value[1, :, :144] = math.nan
    call = replace(call, key=key, value=value)
    assert not split.forward(call, TILE)[0].isnan().any()
    assert split.forward(replace(call, summary=None), TILE)[0].isnan().all()


@pytest.mark.parametrize("rows, window", [(1, 30), (4, 30), (3, 500), (2, 1)])
def test_a_window_reads_its_own_keys_alone(rows, window):
    at = A.add(I, A.size("past"))
    keep = A.and_(A.ge(at, J), A.lt(A.sub(at, J), A.const(window)))
    spec = AttentionSpec(score=masked(keep, FINITE), sizes=("past",))
    query, key, value = tensors(rows, S, heads=4, groups=2)
    first, end = key_span(keep, dict(B=2, H=4, T=rows, S=S, past=S - 50))
    assert (first, end) == (max(0, S - 50 - window + 1), S - 50 + rows)
    want = whole(spec, query.double(), key.double(), value.double(), (), (S - 50,))
    key[:, :, end + STEP :] = value[:, :, end + STEP :] = math.nan
    key[:, :, : max(0, first - STEP)] = value[:, :, : max(0, first - STEP)] = math.nan
    out, _ = split.forward(Call(spec, query, key, value, (), (S - 50,)), TILE)
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("fill", [-INF, FINITE])
def test_layers_of_a_graph_share_one_summary(passes, fill):
    query, key, value = tensors(1, S, heads=4, groups=4)
    mask = torch.zeros(2, 1, 1, S).masked_fill(~cache(*PADDED)[:, None], fill)
    mask[1] = fill

    def layers(x):
        for _ in range(2):
            x = ((x @ key.mT) * 0.25 + mask).softmax(-1) @ value
        return x

    with torch.no_grad(), new_reports() as filed:
        got = compiled(layers, "decode")(query)
    torch.testing.assert_close(got, layers(query), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert len(passes) == 1
    assert [s.decision.tier for r in filed for s in r.sites] == ["decode", "decode"]


def test_no_key_at_all():
    spec = AttentionSpec(score=masked(A.lt(J, A.const(0))))
    assert split.forward(Call(spec, *tensors(1, S)), TILE)[0].isnan().all()


def test_a_grain_larger_than_a_tile(monkeypatch):
    monkeypatch.setattr(summary, "GRAIN", 32)
    compare(kept_call(cache(*PADDED), FINITE, True), [6, 5])
