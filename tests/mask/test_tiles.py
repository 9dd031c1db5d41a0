"""Compare key ranges, tiles and live rows of a mask with brute force by the interpreter."""

import math
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnfx.ir import algebra as A
from attnfx.ir.interpret import evaluate
from attnfx.mask import affine as polyhedron
from attnfx.mask import describe, key_ranges, live, rows_live, tiles, visited
from attnfx.mask import row_intervals as module
from attnfx.mask.row_intervals import spans
from attnfx.spec import AttentionSpec, B, H, I, J
from tests.mask.masks import (
    ALIGNED,
    CAUSAL,
    dilated,
    documents,
    masked,
    minus,
    n,
    near,
    neighbourhood,
    pad,
    same_block,
    window,
)

small = st.integers(1, 9)


def logic(leaves, most=5):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map(lambda v: A.and_(*v)),
            st.lists(inner, min_size=2, max_size=3).map(lambda v: A.or_(*v)),
            inner.map(A.not_),
            st.tuples(inner, inner, inner).map(lambda v: A.where(*v)),
        ),
        max_leaves=most,
    ).filter(lambda keep: keep.op != "const")


plain = st.one_of(
    st.sampled_from([CAUSAL, ALIGNED, A.lt(J, I)]),
    small.map(window),
    small.map(near),
    small.map(lambda v: A.lt(J, n(v))),
    small.map(same_block),
    small.map(lambda v: A.le(A.floordiv(J, n(v)), A.floordiv(I, n(v)))),
    small.map(lambda v: A.eq(A.mod(minus(I, J), n(v)), n(0))),
)


affine = st.one_of(
    plain,
    st.tuples(small, small).map(lambda v: A.eq(A.mod(A.add(I, J), n(v[0] + 1)), n(v[1]))),
    st.tuples(small, small).map(lambda v: neighbourhood(v[0] + 1, v[1] // 3)),
    small.map(lambda v: A.le(minus(I, J), A.where(A.lt(H, n(1)), n(v), n(3)))),
    small.map(lambda v: A.ge(A.minimum(A.add(I, n(v)), n(7)), A.maximum(J, A.mul(n(2), minus(J, n(v)))))),
    small.map(lambda v: A.eq(A.unary("abs", minus(I, J)), A.where(CAUSAL, n(v), n(2)))),
)


exact = st.one_of(affine, logic(plain, 3), st.tuples(affine, plain).map(lambda v: A.and_(*v))).filter(
    lambda keep: keep.op != "const"
)


opaque = st.one_of(
    st.just(pad()),
    st.just(documents(1)),
    st.just(A.lt(J, A.load(2, (B,), "i"))),
    st.just(A.load(3, (H, minus(J, I)), "b")),
    st.just(A.lt(A.mul(I, J), n(20))),
)


sizes_of = st.builds(lambda t, s: {"B": 2, "H": 2, "T": t, "S": s}, st.integers(1, 20), st.integers(1, 20))


def table(keep, sizes, seed=0):
    """Return {(i, j)} live for some (b, h), {(i, j)} dead for some (b, h), and the number of live (b, h, i, j)."""
    draw = random.Random(seed)
    values = {}

    def load(slot, index):
        return values.setdefault((slot, index), draw.randrange(2) if slot in (0, 1, 3) else draw.randrange(20))

    alive, dead, count = set(), set(), 0
    for b, h, i, j in product(*(range(sizes[name]) for name in "BHTS")):
        env = {"b": b, "h": h, "i": i, "j": j, **sizes}
        if evaluate(keep, env, load):
            alive.add((i, j))
            count += 1
        else:
            dead.add((i, j))
    return alive, dead, count


def rectangle(i0, i1, j0, j1):
    return set(product(range(i0, i1), range(j0, j1)))


@settings(max_examples=200, deadline=None)
@given(exact, sizes_of, st.integers(1, 9))
def test_key_ranges_of_an_affine_mask_are_exact(keep, sizes, block):
    alive, dead, _ = table(keep, sizes)
    found = key_ranges(AttentionSpec(score=masked(keep)), sizes, block)
    assert [r.i0 for r in found] == list(range(0, sizes["T"], block))
    assert [r.i1 for r in found] == [min(r.i0 + block, sizes["T"]) for r in found]
    for r in found:
        keys = [j for i, j in alive if r.i0 <= i < r.i1]
        assert (r.j0, r.j1) == ((min(keys), max(keys) + 1) if keys else (0, 0))
        assert r.full == (bool(keys) and not rectangle(*r[:4]) & dead)


@settings(max_examples=200, deadline=None)
@given(logic(st.one_of(affine, opaque)), sizes_of, st.integers(1, 9), st.integers(0, 99))
def test_key_ranges_are_sound_whatever_the_captures_hold(keep, sizes, block, seed):
    alive, dead, _ = table(keep, sizes, seed)
    for r in key_ranges(AttentionSpec(score=masked(keep)), sizes, block):
        assert all(r.j0 <= j < r.j1 for i, j in alive if r.i0 <= i < r.i1)
        assert not r.full or not rectangle(*r[:4]) & dead


@settings(max_examples=150, deadline=None)
@given(exact, sizes_of, st.integers(1, 6), st.integers(1, 6))
def test_tiles_of_an_affine_mask_are_exact(keep, sizes, tile_q, tile_k):
    alive, dead, count = table(keep, sizes)
    found = tiles(masked(keep), sizes, tile_q, tile_k)
    kinds = []
    for qi, ki in product(range(found.rows), range(found.columns)):
        q, k = qi * tile_q, ki * tile_k
        scores = rectangle(q, min(q + tile_q, sizes["T"]), k, min(k + tile_k, sizes["S"]))
        kinds.append("empty" if not scores & alive else "full" if not scores & dead else "partial")
        assert found.classify(qi, ki) == kinds[-1]
    assert [found.empty, found.full, found.partial] == [kinds.count(kind) for kind in ("empty", "full", "partial")]
    assert found.live_fraction == pytest.approx(count / math.prod(sizes.values()))


@settings(max_examples=150, deadline=None)
@given(logic(st.one_of(affine, opaque)), sizes_of, st.integers(1, 6), st.integers(0, 99))
def test_tiles_are_sound_whatever_the_captures_hold(keep, sizes, tile, seed):
    alive, dead, count = table(keep, sizes, seed)
    found = tiles(masked(keep), sizes, tile, tile)
    assert {found.classify(i // tile, j // tile) for i, j in alive} <= {"full", "partial"}
    assert {found.classify(i // tile, j // tile) for i, j in dead} <= {"empty", "partial"}
    assert found.live_fraction >= count / math.prod(sizes.values()) - 1e-12


steep = st.builds(
    lambda a, b, c: A.ge(A.add(A.mul(n(a), I), n(c)), A.mul(n(b), J)),
    st.integers(-40, 40), st.integers(1, 3), st.integers(-99, 99),
)  # fmt: skip


stepped = st.builds(
    lambda a, b, c: A.le(A.floordiv(J, n(a)), A.add(A.floordiv(I, n(b)), n(c))),
    st.integers(1, 40), st.integers(1, 40), st.integers(-3, 3),
)  # fmt: skip


slanted = st.builds(
    lambda a, b, c, d: A.le(A.floordiv(A.add(J, A.mul(n(a), I)), n(b)), A.add(A.mul(n(d), A.floordiv(I, n(c))), n(d))),
    st.integers(-3, 3), st.integers(2, 9), st.integers(2, 9), st.integers(-2, 2),
)  # fmt: skip


of_intervals = st.one_of(
    st.sampled_from([CAUSAL, ALIGNED, A.lt(J, I)]),
    st.integers(1, 80).map(window),
    st.integers(1, 80).map(near),
    st.integers(1, 80).map(same_block),
    st.integers(1, 80).map(lambda v: A.lt(J, n(v))),
    st.integers(1, 80).map(lambda v: A.ge(I, n(v))),
    st.integers(2, 70).map(lambda v: A.ge(A.mod(I, n(v)), n(v // 2))),
    st.integers(2, 70).map(lambda v: A.le(J, A.add(A.mod(I, n(v)), n(9)))),
    steep,
    stepped,
    slanted,
)


longer = st.builds(lambda t, s: {"B": 1, "H": 1, "T": t, "S": s}, st.integers(1, 140), st.integers(1, 140))


@settings(max_examples=120, deadline=None)
@given(logic(of_intervals, 3), longer, st.sampled_from([32, 64, 96, 48]), st.integers(1, 70))
def test_what_a_block_of_rows_visits_is_exact_where_rows_are_intervals(keep, sizes, block, step):
    alive, dead, _ = table(keep, sizes)
    score = masked(keep)
    bounds = []
    for r in key_ranges(score, sizes, block):
        keys = [j for i, j in alive if r.i0 <= i < r.i1]
        bounds.append((min(keys), max(keys) + 1) if keys else (0, 0))
        assert (r.j0, r.j1) == bounds[-1]
        assert r.full == (bool(keys) and not rectangle(*r[:4]) & dead)
    found = visited(score, sizes, block, step)
    visits = [-(-high // step) - low // step for low, high in bounds]
    all_tiles = -(-sizes["T"] // block) * -(-sizes["S"] // step)
    full = all_tiles - len({(i // block, j // step) for i, j in dead})
    known = spans(*[polyhedron.numeric(f(score), sizes) for f in (live, live)], sizes, block)
    assert found.total >= sum(visits) and found.full <= full
    if known.exact:
        assert (found.blocks, found.total, found.full) == (len(visits), sum(visits), full)
        assert (found.shortest, found.longest) == (min(visits), max(visits))
        seen = {(i, j) for i in range(sizes["T"]) for low, high in [bounds[i // block]]
                for j in range(low // step * step, min(-(-high // step) * step, sizes["S"]))}  # fmt: skip
        assert visited(score, sizes, block, step).scores == len(seen)


@pytest.mark.parametrize("keep", [
    CAUSAL, window(300), A.and_(CAUSAL, A.or_(window(1000), A.lt(J, n(4)))), A.or_(CAUSAL, A.lt(J, n(9000))),
    same_block(1500), same_block(4096), A.and_(CAUSAL, same_block(5000)), documents(),
])  # fmt: skip
@pytest.mark.parametrize("rows", [32768 + 100, 50000, 131072])
@pytest.mark.parametrize("block", [64, 128])
def test_what_is_visited_of_many_rows_is_estimated_from_some(keep, rows, block, monkeypatch):
    score, sizes = masked(keep), {"B": 1, "H": 1, "T": rows, "S": rows}
    found, scores = visited(score, sizes, block, 64), visited(score, sizes, block, 1).scores
    monkeypatch.setattr(module, "GROUPS", 1 << 30)
    exact = visited(score, sizes | {"B": 2}, block, 64), visited(score, sizes | {"B": 2}, block, 1).scores
    assert found.blocks == exact[0].blocks and found.longest <= exact[0].longest
    for name in ("total", "full"):
        assert getattr(found, name) == pytest.approx(getattr(exact[0], name), rel=0.03, abs=found.blocks)
    assert scores == pytest.approx(exact[1], rel=0.03)


@pytest.mark.parametrize("keep", [
    CAUSAL, ALIGNED, window(50), near(3), same_block(48), A.and_(CAUSAL, window(33)),
    A.and_(CAUSAL, A.or_(window(20), A.lt(J, n(4)))), A.or_(CAUSAL, A.lt(J, n(40))), A.and_(CAUSAL, same_block(64)),
    A.le(A.floordiv(J, n(16)), A.floordiv(I, n(16))), A.and_(ALIGNED, pad()), documents(),
])  # fmt: skip
@pytest.mark.parametrize("block", [16, 64])
def test_common_masks_need_no_polyhedral_library(keep, block, monkeypatch):
    monkeypatch.setattr(polyhedron, "MAX_OPERATIONS", 1)
    sizes = {"B": 2, "H": 2, "T": 192, "S": 256}
    numbers = polyhedron.numeric(keep, sizes)
    assert spans(numbers, numbers, sizes, block).exact
    assert len(key_ranges(masked(keep), sizes, block)) == 192 // block


@settings(max_examples=150, deadline=None)
@given(logic(st.one_of(affine, opaque)), sizes_of, st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_what_a_block_of_rows_visits_is_a_bound_elsewhere(keep, sizes, block, step, seed):
    alive, dead, _ = table(keep, sizes, seed)
    found = visited(masked(keep), sizes, block, step)
    keys = {}
    for i, j in alive:
        keys.setdefault(i // block, set()).add(j // step)
    assert found.total >= sum(max(k) - min(k) + 1 for k in keys.values())
    all_tiles = -(-sizes["T"] // block) * -(-sizes["S"] // step)
    assert found.full <= all_tiles - len({(i // block, j // step) for i, j in dead})


@settings(max_examples=150, deadline=None)
@given(logic(st.one_of(affine, opaque)), sizes_of, st.integers(0, 99))
def test_rows_are_called_live_only_where_each_has_a_live_key(keep, sizes, seed):
    one = {**sizes, "B": 1, "H": 1}
    alive, _, _ = table(keep, one, seed)
    every = {i for i, _ in alive} == set(range(sizes["T"]))
    assert every or not rows_live(masked(keep), one)


def test_rows_live_knows_causal_windows_and_doubts_padding():
    sizes = {"B": 2, "H": 2, "T": 50, "S": 50}
    assert rows_live(masked(A.and_(CAUSAL, window(7))), sizes)
    assert rows_live(A.DOT, sizes)
    assert not rows_live(masked(A.and_(CAUSAL, pad())), sizes)
    assert not rows_live(masked(A.lt(J, I)), sizes)  # the first query sees nothing
    assert rows_live(masked(ALIGNED), {**sizes, "T": 40})
    assert not rows_live(masked(ALIGNED), {**sizes, "S": 40})


def test_a_symbolic_size_of_the_spec_is_a_number_when_it_is_asked():
    spec = AttentionSpec(score=masked(A.and_(CAUSAL, A.lt(minus(I, J), A.size("n0")))), sizes=("n0",))
    sizes = {"B": 1, "H": 1, "T": 100, "S": 100}
    assert [r[2:4] for r in key_ranges(spec, {**sizes, "n0": 10}, 50)] == [(0, 50), (41, 100)]
    assert [r[2:4] for r in key_ranges(spec, {**sizes, "n0": 70}, 50)] == [(0, 50), (0, 100)]


def test_a_mask_that_is_too_hard_falls_back_to_the_whole_range(monkeypatch):
    monkeypatch.setattr(polyhedron, "MAX_OPERATIONS", 30)
    sizes = {"B": 1, "H": 1, "T": 301, "S": 307}
    score = masked(A.and_(CAUSAL, dilated(31)))
    assert {r[2:] for r in key_ranges(AttentionSpec(score=score), sizes, 100)} == {(0, 307, False)}
    found = tiles(score, sizes, 100, 100)
    assert (found.empty, found.full, found.partial, found.live_fraction) == (0, 0, 16, 1.0)
    assert found.classify(0, 3) == "partial"
    assert not rows_live(score, sizes)
    assert describe(score, sizes) == "fixed pattern"


def test_a_count_that_isl_stops_halfway_is_not_believed(monkeypatch):
    monkeypatch.setattr(polyhedron, "MAX_COUNT", 10_000)
    keep = A.or_(A.lt(J, n(256)), A.eq(A.mod(A.add(I, J), n(2)), n(0)))
    found = tiles(masked(A.and_(CAUSAL, keep)), {"B": 1, "H": 1, "T": 1009, "S": 1009}, 256, 256)
    assert (found.empty, found.full, found.partial) == (6, 3, 7)
    assert found.live_fraction > 0.6


def test_a_tile_outside_the_matrix_is_an_error():
    found = tiles(masked(CAUSAL), {"B": 1, "H": 1, "T": 10, "S": 10}, 4, 4)
    with pytest.raises(IndexError, match=r"tile \(3, 0\) is outside 3 x 3 tiles"):
        found.classify(3, 0)
