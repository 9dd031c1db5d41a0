"""Visit the live tiles of masks that the indices alone decide, and skip empty tiles between them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnfx.ir import algebra as A
from attnfx.ir.interpret import evaluate
from attnfx.kernels.call import Call
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host import forward as launch
from attnfx.kernels.flash.host import walks
from attnfx.kernels.flash.host.backward import Backward, backward
from attnfx.kernels.flash.host.ranges import along_keys, along_rows
from attnfx.kernels.flash.host.tiles import Tile
from attnfx.mask import tile_bounds as boxes
from attnfx.spec import AttentionSpec, H, I, J
from tests.kernels.cases import CAUSAL, FINITE, INF, masked
from tests.kernels.flash.cases import TILE, tensors, whole

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
APART = A.sub(I, J)


def n(value):
    return A.const(value)


def near(x, y, reach):
    return A.le(A.unary("abs", A.sub(x, y)), n(reach))


def window(width):
    return A.and_(CAUSAL, A.lt(APART, n(width)))


def image(width, reach):
    """Return the mask of an image's pixels, row by row, that are at most `reach` rows and columns away."""
    rows, columns = ([f(x, n(width)) for x in (I, J)] for f in (A.floordiv, A.mod))
    return A.and_(near(*rows, reach), near(*columns, reach))


def every(period, share):
    return A.lt(A.mod(APART, n(period)), n(share))


GAPS = {
    "sink and window": A.and_(CAUSAL, A.or_(A.lt(APART, n(20)), A.lt(J, n(4)))),
    "blocks apart": A.eq(A.mod(A.floordiv(I, n(16)), n(3)), A.mod(A.floordiv(J, n(16)), n(3))),
    "dilated": A.and_(CAUSAL, every(64, 9)),
    "image": image(48, 3),
    "by head": A.or_(A.eq(A.floordiv(I, n(32)), A.floordiv(J, n(32))), A.and_(A.lt(H, n(1)), A.lt(J, n(5)))),
}
SIZES = dict(B=2, H=2, T=150, S=170)
WITHOUT = {"causal": CAUSAL, "window": window(30), "blocks": A.eq(A.floordiv(I, n(40)), A.floordiv(J, n(40)))}


def matrix(keep, sizes):
    """Evaluate keep[h, i, j] element by element."""
    h, t, s = (range(sizes[x]) for x in "HTS")
    return np.array([[[evaluate(keep, dict(b=0, h=x, i=i, j=j, **sizes)) for j in s] for i in t] for x in h], bool)


def check_path(path, live, block, step):
    """Check that each tile with a live score is visited once, and that full tiles are fully live and in bounds. `live`
    is (H, rows, keys)."""
    for t in range(len(path.walks)):
        rows = live[:, t * block : (t + 1) * block]
        start, full_start, full_end, end = path.walks[t]
        visited = list(range(start, end, step))
        full = {j0 for j0 in visited if full_start <= j0 < full_end}
        assert (full_end - full_start) % step == 0
        if path.states is not None:
            (_, _, most, count), order = (x[t] for x in path.lists())
            visited, full = order[:count].tolist(), full | set(order[:most].tolist())
            assert len(set(visited)) == count
        for j0 in range(0, live.shape[2], step):
            tile = rows[..., j0 : j0 + step]
            assert j0 in visited or not tile.any()
            assert j0 not in full or (tile.all() and tile.shape[2] == step)


indices = st.sampled_from([I, J, APART, A.add(I, J), A.add(A.mul(n(2), I), A.neg(J))])
numbers = st.integers(1, 40)
comparisons = st.one_of(
    st.tuples(indices, numbers).map(lambda v: A.lt(*(v[0], n(v[1])))),
    st.tuples(indices, numbers, numbers).map(lambda v: A.lt(A.mod(v[0], n(v[1])), n(1 + v[2] % v[1]))),
    st.tuples(indices, numbers, numbers).map(lambda v: A.le(A.floordiv(v[0], n(v[1])), n(v[2] - 20))),
    st.tuples(numbers, numbers).map(lambda v: image(*v)),
    st.tuples(indices, indices, numbers).map(lambda v: A.ge(A.minimum(v[0], n(v[2])), A.maximum(v[1], n(3)))),
    numbers.map(lambda v: A.le(APART, A.where(A.lt(H, n(1)), n(v), A.add(J, n(3))))),
    numbers.map(lambda v: A.eq(A.mod(A.floordiv(I, n(v)), n(3)), A.mod(A.floordiv(J, n(v)), n(3)))),
    numbers.map(lambda v: A.lt(A.mul(I, J), n(v * v))),
    st.just(CAUSAL),
)
masks = st.one_of(
    comparisons,
    st.tuples(comparisons, comparisons).map(lambda v: A.and_(*v)),
    st.tuples(comparisons, comparisons).map(lambda v: A.or_(v[0], A.not_(v[1]))),
    st.tuples(comparisons, comparisons, comparisons).map(lambda v: A.where(*v)),
)


@given(masks, st.sampled_from([(16, 16), (32, 16), (16, 8)]), st.integers(20, 50), st.integers(20, 50))
@settings(deadline=None, max_examples=60)
def test_no_live_score_is_left_out_and_no_full_tile_has_a_dead_one(keep, tile, rows, keys):
    sizes = dict(B=1, H=2, T=rows, S=keys)
    live = matrix(keep, sizes)
    check_path(along_keys(keep, sizes, *tile), live, *tile)
    check_path(along_rows(keep, sizes, *tile), live.transpose(0, 2, 1), *tile)
    states = boxes.states(keep, sizes, *tile)
    for (t, s), state in np.ndenumerate(states):
        part = live[:, t * tile[0] : (t + 1) * tile[0], s * tile[1] : (s + 1) * tile[1]]
        assert state & boxes.LIVE or not part.any()
        assert state & boxes.DEAD or part.all()


@pytest.mark.parametrize("name", GAPS)
def test_what_is_visited_is_what_is_live(name):
    """The analysis is exact for these masks, because it can decide each of their comparisons on its own."""
    live = matrix(GAPS[name], SIZES)
    for along, held in ((along_keys, live), (along_rows, live.transpose(0, 2, 1))):
        path = along(GAPS[name], SIZES, 16, 16)
        blocks, count = -(-held.shape[1] // 16), -(-held.shape[2] // 16)
        padded = np.zeros((2, blocks * 16, count * 16), bool)
        padded[:, : held.shape[1], : held.shape[2]] = held
        some = padded.reshape(2, blocks, 16, count, 16).any((0, 2, 4))
        if path.states is None:
            visited = np.ceil((path.walks[:, 3] - path.walks[:, 0]) / 16).sum()
            assert some.sum() > 7 / 8 * visited
        else:
            assert path.lists()[0][:, 3].sum() == some.sum()
            assert some.sum() <= 7 / 8 * np.ceil((path.walks[:, 3] - path.walks[:, 0]) / 16).sum()
    assert along_keys(GAPS[name], SIZES, 16, 16).states is not None


@pytest.mark.parametrize("name", WITHOUT)
def test_tiles_without_a_gap_need_no_list(name):
    assert along_keys(WITHOUT[name], SIZES, 16, 16).states is None
    assert along_rows(WITHOUT[name], SIZES, 16, 16).states is None


def test_a_long_matrix_is_not_looked_at_tile_by_tile(monkeypatch):
    monkeypatch.setattr("attnfx.kernels.flash.host.ranges.LARGEST", 0)
    for keep in (*GAPS.values(), *WITHOUT.values()):
        sizes = SIZES | dict(T=151)  # avoids cached results of other tests
        path = along_keys(keep, sizes, 32, 16)
        assert path.states is None
        check_path(path, matrix(keep, sizes), 32, 16)


@pytest.mark.parametrize(
    ("name", "fill"), [*((name, -INF) for name in GAPS), ("sink and window", FINITE), ("by head", FINITE)]
)
def test_outputs_and_gradients_are_those_of_the_whole_matrix(name, fill):
    spec = AttentionSpec(score=masked(GAPS[name], fill))
    query, key, value = tensors(99, 107, heads=2, groups=1)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    want = whole(spec, *leaves, ())
    grad = torch.randn(want.shape)
    expected = [want.detach(), *torch.autograd.grad(want, leaves, grad.double())]
    call = Call(spec, query, key, value)
    out, logsumexp = launch.forward(call, TILE)
    grads = backward(call, grad, out, logsumexp, (TILE, TILE))[:3]
    for got, x in zip((out, *grads), expected):
        torch.testing.assert_close(got.double(), x, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("name", GAPS)
def test_what_is_empty_is_not_visited_in_either_pass(name, monkeypatch):
    """A NaN in keys that a block of rows does not see does not reach its rows."""
    monkeypatch.setattr("attnfx.kernels.flash.host.ranges.SPARSE", 0.999)
    rows, keys, block = 112, 128, slice(96, 112)
    live = matrix(GAPS[name], dict(B=2, H=2, T=rows, S=keys))[:, block]
    query, key, value = tensors(rows, keys, heads=2, groups=2)
    bad = torch.tensor(~live.any((0, 1)).reshape(-1, 16).any(1).repeat(16))
    assert bad.any()
    key[:, :, bad] = value[:, :, bad] = math.nan
    call = Call(AttentionSpec(score=masked(GAPS[name], -INF)), query, key, value)
    out, logsumexp = launch.forward(call, TILE)
    of_query = backward(call, torch.ones_like(out), out, logsumexp, (TILE, TILE))[0]
    some = torch.tensor(live.any(2)).expand(2, 2, 16)
    assert some.any() and not out[:, :, block][some].isnan().any() and not of_query[:, :, block][some].isnan().any()


def test_kernels_are_given_lists_where_there_are_gaps_alone():
    for keep, listed in ((GAPS["sink and window"], True), (CAUSAL, False)):
        spec = AttentionSpec(score=masked(keep, -INF))
        query, key, value = tensors(160, 160, heads=2, groups=2)
        call = Call(spec, query, key, value)
        out, logsumexp = call.outputs()
        made = launch.forward_launch(call, out, logsumexp, TILE)
        back = Backward(call, out, out, logsumexp, (TILE, TILE))
        for one in (made, back.rows_launch(query)):
            assert (one.arguments["order"] is not None) == listed and not one.before


# -- decode -------------------------------------------------------------------------------------
PAST = A.add(I, A.size("past"))
BACK = A.sub(PAST, J)
DECODED = {
    "sink and window": A.and_(A.ge(BACK, n(0)), A.or_(A.lt(BACK, n(40)), A.lt(J, n(5)))),
    "a window or nothing": A.or_(A.and_(A.ge(BACK, n(0)), A.lt(BACK, n(40))), A.lt(J, A.sub(A.size("past"), n(300)))),
    "a prefix": A.or_(A.lt(J, n(20)), A.lt(J, A.sub(n(30), I))),
    "a hole": A.not_(A.eq(A.floordiv(J, n(64)), n(1))),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", DECODED)
def test_a_decode_kernel_leaves_out_the_longest_run_of_tiles_that_no_row_sees(name, rows):
    keys, past = 200, 200 - rows
    spec = AttentionSpec(score=masked(DECODED[name], FINITE), sizes=("past",))
    query, key, value = tensors(rows, keys, heads=4, groups=2)
    want = whole(spec, query.double(), key.double(), value.double(), (), (past,))
    live = matrix(DECODED[name], dict(B=2, H=1, T=rows, S=keys, past=past))[0].any(0)
    tiles = np.pad(live, (0, -keys % 16)).reshape(-1, 16).any(1)
    bad = torch.tensor(~tiles.repeat(16)[:keys])
    key[:, :, bad] = value[:, :, bad] = math.nan
    call = Call(spec, query, key, value, (), (past,))
    for wanted in (0, 1, 3):
        out, _ = split.forward(call, Tile(16, 16, 1, 1), wanted=wanted)
        torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
    shared = walks.over_splits(call, DECODED[name], Tile(16, 16, 1, 1), False)
    low, high = shared.gap
    assert -(-(shared.end - shared.first - (high - low)) // 16) == tiles.sum()


def test_a_mask_of_plain_conditions_has_no_gap_to_be_told_of():
    keep = A.and_(A.ge(BACK, n(0)), A.lt(BACK, n(40)))
    call = Call(AttentionSpec(score=masked(keep, -INF), sizes=("past",)), *tensors(1, 200), (), (190,))
    assert walks.over_splits(call, keep, TILE, False).gap is None
