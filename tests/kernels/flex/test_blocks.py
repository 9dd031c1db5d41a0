"""The block mask of a predicate: every tile with a live score is listed, and only tiles without a dead one as full."""

from dataclasses import dataclass

import pytest
import torch

from attnfx.ir import algebra as A
from attnfx.kernels.flex.blocks import block_mask
from attnfx.mask import FLEX_TILE
from attnfx.spec import B, H, I, J

CPU = torch.device("cpu")
SIZES = [(300, 300), (256, 512), (130, 700), (1, 400), (200, 100)]


def at(index, kind="i"):
    return A.load(0, index, kind)


@dataclass
class Case:
    """A predicate, the same on tensors b, h, i, j and the capture, and a function that makes the capture."""

    keep: object
    plain: object
    capture: object = None
    exact: bool = True


def near(width):
    return A.ge0(A.sub(A.const(width), A.maximum(A.sub(I, J), A.sub(J, I))))


CASES = {
    "everything": Case(A.TRUE, lambda b, h, i, j, c: (i == i) & (j == j)),
    "causal": Case(A.ge(I, J), lambda b, h, i, j, c: i >= j),
    "window": Case(near(40), lambda b, h, i, j, c: (i - j).abs() <= 40, exact=False),
    "blocks of 50": Case(
        A.eq0(A.sub(A.floordiv(I, A.const(50)), A.floordiv(J, A.const(50)))), lambda b, h, i, j, c: i // 50 == j // 50
    ),
    "dilated": Case(
        A.eq0(A.mod(A.sub(I, J), A.const(7))), lambda b, h, i, j, c: (i - j) % 7 == 0, exact=False
    ),
    "by head": Case(A.or_(A.ge(I, J), A.ge(H, A.const(2))), lambda b, h, i, j, c: (i >= j) | (h >= 2)),
    "padding": Case(at((B, J), "b"), lambda b, h, i, j, c: c[b, j], lambda t, s: torch.arange(s).expand(2, s) < s // 2),
    "causal and padding": Case(
        A.and_(at((B, J), "b"), A.ge(I, J)),
        lambda b, h, i, j, c: c[b, j] & (i >= j),
        lambda t, s: torch.stack([torch.arange(s) >= s // 2, torch.arange(s) >= 0]),
        exact=False,
    ),
    "documents": Case(
        A.eq0(A.sub(at((B, I)), at((B, J)))),
        lambda b, h, i, j, c: c[b, i] == c[b, j],
        lambda t, s: torch.stack([torch.arange(max(t, s)) // 90, torch.arange(max(t, s)) // 33]),
    ),
    "dense": Case(
        at((I, J), "b"), lambda b, h, i, j, c: c[i, j],
        lambda t, s: (torch.arange(t)[:, None] // 60 + torch.arange(s) // 100) % 2 == 0,
    ),
    "longest row": Case(
        A.ge0(A.sub(at(()), J)), lambda b, h, i, j, c: (j <= c) & (i == i), lambda t, s: torch.tensor(s // 3)
    ),
}  # fmt: skip


def marked(number, order, rows, keys):
    """Return the tiles that a list marks, (batch, heads, row tiles, key tiles)."""
    out = torch.zeros(*order.shape[:2], rows, keys, dtype=torch.bool)
    for b, h, q in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).tolist():
        out[b, h, q, order[b, h, q, : number[b, h, q]].long()] = True
    return out.expand(2, 4, rows, keys)


def tiles_of(dense):
    """Return for each tile whether a score is live, and whether all are."""
    rows, keys = (-(-n // FLEX_TILE) for n in dense.shape[2:])
    some, every = (torch.zeros(2, 4, rows, keys, dtype=torch.bool) for _ in range(2))
    for q in range(rows):
        for k in range(keys):
            part = dense[:, :, q * FLEX_TILE : (q + 1) * FLEX_TILE, k * FLEX_TILE : (k + 1) * FLEX_TILE]
            some[:, :, q, k], every[:, :, q, k] = part.any(-1).any(-1), part.all(-1).all(-1)
    return some, every


@pytest.mark.parametrize("length", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("average", [False, True])
def test_each_tile_with_a_live_score_is_visited_and_a_full_one_has_no_dead_score(name, length, average):
    (t, s), case = length, CASES[name]
    capture = None if case.capture is None else case.capture(t, s)
    if name == "documents" and t > s:
        pytest.skip("a document is known for each row and key")
    sizes = {"B": 2, "H": 4, "T": t, "S": s}
    captures = [] if capture is None else [capture]
    found = block_mask(case.keep, True, average, captures, sizes, CPU, True)
    axes = [torch.arange(n).view(-1, *[1] * d) for n, d in ((2, 3), (4, 2), (t, 1), (s, 0))]
    dense = case.plain(*axes, capture).expand(2, 4, t, s)
    some, every = tiles_of(dense)
    rows, keys = some.shape[2:]
    partial = marked(*found[:2], rows, keys)
    full = torch.zeros_like(partial) if found[2] is None else marked(*found[2:4], rows, keys)
    assert not (some & ~(partial | full)).any(), "a live score is not visited"
    assert not (partial & full).any() and not (full & ~every).any()
    lost = ~dense.any(-1)
    hopeless = torch.stack([lost[:, :, q * FLEX_TILE : (q + 1) * FLEX_TILE].any(-1) for q in range(rows)], -1)
    if average:
        assert (partial | full)[hopeless].all(), "a row without a live key does not visit every key"
    elif case.exact:
        assert torch.equal(partial | full, some)
        assert found[2] is None or torch.equal(full, every)
    assert torch.equal(marked(*found[4:6], keys, rows).mT, partial)


def test_a_mask_that_only_the_score_program_knows_lists_full_tiles_alone():
    number, _, full, order = block_mask(A.ge(I, J), False, False, [], {"B": 1, "H": 1, "T": 384, "S": 384}, CPU, False)
    assert number.sum() == 0 and full.tolist() == [[[1, 2, 3]]] and order[0, 0, 2].tolist() == [0, 1, 2]


def test_a_dense_mask_of_each_head_is_not_read_to_find_empty_tiles():
    keep = A.load(0, (B, H, I, J), "b")
    mask = torch.zeros(2, 4, 256, 256, dtype=torch.bool)
    number, *_ = block_mask(keep, True, False, [mask], {"B": 2, "H": 4, "T": 256, "S": 256}, CPU, False)
    assert number.tolist() == [[[2, 2]]]
