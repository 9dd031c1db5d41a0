"""Generate random attentions of many classes, compile each, and compare results and gradients with float64.

    python tests/passes/random_graphs.py [--graphs 20000] [--seed 0] [--workers 1] [--show]

A seed determines the program. The test suite runs the first of them; this script runs as many as asked, in processes of
their own, and prints the seeds that failed with their errors.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BATCH = 200  # programs per process
B, H, T, D = 2, 3, 12, 8
ROWS, COLUMNS = 3, 4  # the tokens as a grid
LOW = torch.finfo(torch.float32).min
I, J = torch.arange(T)[:, None], torch.arange(T)[None, :]
Edit = Callable[[Tensor, dict[str, Tensor]], Tensor]

# every mask keeps a row's own key, so that rows are never NaN
MASKS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "causal": lambda x: J <= I,
    "window": lambda x: (I - J).abs() < 3,
    "blocks": lambda x: I // 4 == J // 4,
    "sink": lambda x: (J <= I) & (I - J < 4) | (J < 2),
    "triangle": lambda x: torch.ones(T, T).triu(1) == 0,
    "stacked": lambda x: torch.hstack([I >= 0, I >= 1, torch.ones(T, T - 2).tril(-2) > 0]) | (I == J),
    "joined": lambda x: torch.cat([x["pairs"][:5] | (J[:, :] < 2), torch.ones(T - 5, T, dtype=torch.bool)], 0),
    "written": lambda x: _written(torch.zeros(T, T, dtype=torch.bool)),
    "indexed": lambda x: _indexed(torch.eye(T)) > 0,
    "given": lambda x: x["pairs"],
}  # fmt: skip
BATCHED = {"by batch": lambda x: x["pairs"] & x["masks"], "documents": lambda x: _same(x["ids"])[:, None]}
SHAPES = {
    "keys": (T,), "rows": (T, 1), "heads": (H, 1, 1), "pairs_bias": (T, T), "batches": (B, 1, 1, T),
    "all": (B, H, T, T),
}  # fmt: skip
PLAIN_SHAPES = {n: SHAPES[n] for n in ("keys", "rows", "pairs_bias")}


def _same(ids: Tensor) -> Tensor:
    return ids[:, :, None] == ids[:, None, :]


def _written(mask: Tensor) -> Tensor:
    mask[:, :2] = True
    mask[4:, 4:8] = True
    mask.fill_diagonal_(True)
    return mask


def _indexed(mask: Tensor) -> Tensor:
    mask[torch.arange(T - 1), torch.arange(1, T)] = 1.0
    mask[torch.arange(3)[:, None], torch.arange(6)] = 1.0
    return mask


# -- queries and products ----------------------------------------------------------------------------
QUERIES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda q: q,
    "reversed": lambda q: q.flip(2),
    "rolled": lambda q: q.roll(1, 2),
    "normal": lambda q: F.normalize(q, dim=-1),
    "strided": lambda q: q.transpose(1, 2).contiguous().transpose(1, 2),
    "half rotated": lambda q: torch.cat([q[..., D // 2 :], -q[..., : D // 2]], -1),
    "rotated in place": lambda q: _rotated(q * 1.0),
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.mT,
    "transposed": lambda q, k: (k @ q.mT).mT,
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bijh", q, k).permute(0, 3, 1, 2),
    "broadcast": lambda q, k: (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1),
    "bmm": lambda q, k: torch.bmm(q.reshape(-1, T, D), k.reshape(-1, T, D).mT).view(B, H, T, T),
    "baddbmm": lambda q, k: torch.baddbmm(
        q.new_ones(1, 1, T), q.reshape(-1, T, D), k.reshape(-1, T, D).mT, beta=0.5, alpha=0.7
    ).view(B, H, T, T),
    "halves": lambda q, k: q[..., :4] @ k[..., :4].mT + q[..., 4:] @ k[..., 4:].mT,
    "by heads": lambda q, k: torch.stack([q[:, n] @ k[:, n].mT for n in range(H)], 1),
}  # fmt: skip


def _rotated(q: Tensor) -> Tensor:
    q[..., :4] += q[..., 4:] * 0.5
    return q


# -- scores -------------------------------------------------------------------------------------------
def _filled(mask: Callable[[dict[str, Tensor]], Tensor], fill: float) -> Edit:
    return lambda s, x: s.masked_fill(~mask(x), fill)


def _edits(masks: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Edit]:
    return {
        **{f"plus {n}": lambda s, x, n=n: s + x[n] for n in shapes},
        **{f"times {n}": lambda s, x, n=n: s * x[n] for n in shapes},
        **{f"{n} fills {fill}": _filled(m, fill) for n, m in masks.items() for fill in (-math.inf, LOW, -5.0)},
        **{f"{n} adds": lambda s, x, m=m: s + (1 - m(x).float()) * LOW for n, m in masks.items()},
        **{f"{n} chooses": lambda s, x, m=m: torch.where(m(x), s, s * 0.5) for n, m in masks.items()},
    }


def _sliced(s: Tensor, added: Tensor) -> Tensor:
    s = s * 1.0
    s[..., :, :4] += added[..., :4]
    s[..., 2:, 3:] *= 0.5
    return s


def _own_key(s: Tensor, fill: float) -> Tensor:
    s = s * 1.0
    s[..., torch.arange(T), torch.arange(T)] = fill
    return s


def _detached(s: Tensor) -> Tensor:
    with torch.no_grad():
        damping = (s.softmax(-1).cumsum(-1) - 1).abs() + (I - J).abs() * 0.01
    return s * (-0.3 * damping).exp()


# the last two dims are rows and keys; any number of dims before them
PLAIN_SCORES: dict[str, Edit] = {
    **{f"times {c}": lambda s, x, c=c: s * c for c in (0.3, -1.0)},
    **_edits(MASKS, PLAIN_SHAPES),
    "square": lambda s, x: s**2,
    "in place": lambda s, x: s.mul(0.5).add_(0.25),
    "cap": lambda s, x: 4 * torch.tanh(s / 4),
    "slope": lambda s, x: F.prelu(s, s.new_full((1,), 0.2)),
    "clamp": lambda s, x: s.clamp(-2, 2),
    "distance": lambda s, x: s - (I - J).abs() * 0.2,
    "roll": lambda s, x: s.roll(1, -1),
    "flip": lambda s, x: s.flip(-1),
    "flipped rows": lambda s, x: s.flip(-2),
    "transpose": lambda s, x: s.mT,
    "less the mean": lambda s, x: s - s.mean(-1, keepdim=True),
    "less the most": lambda s, x: s - s.amax(-1, keepdim=True),
    "sums": lambda s, x: s.cumsum(-1) * 0.1,
    "largest": lambda s, x: torch.where(s < s.topk(4, -1).values[..., -1:], -9.0, s),
    "first key": lambda s, x: torch.cat([s[..., :1] * 2, s[..., 1:]], -1),
    "double": lambda s, x: s.double().to(s.dtype),
    "slices in place": lambda s, x: _sliced(s, x["keys"]),
    "own key": lambda s, x: _own_key(s, -5e4),
    "damped by its sums": lambda s, x: _detached(s),
    "gates": lambda s, x: s + (g := F.logsigmoid(x["rows"]).cumsum(0)) - g.mT,
}
SCORES: dict[str, Edit] = {
    **PLAIN_SCORES,
    **_edits(BATCHED, SHAPES),
    "table": lambda s, x: s + x["table"][(I - J).abs().clamp(max=3)].permute(2, 0, 1),
    "mixed heads": lambda s, x: torch.einsum("bhij,hg->bgij", s, x["mix"]),
    "other heads": lambda s, x: s.flip(1),
    "windows of heads": lambda s, x: torch.cat([s[:, :1], s[:, 1:].masked_fill((I - J).abs() > 2, LOW)], 1),
}
FACTORS = {"square", "times -1.0", *(f"times {n}" for n in SHAPES)}  # of a mask: NaN or noise in eager
NORMALISERS: dict[str, Edit] = {
    "softmax": lambda s, x: s.softmax(-1),
    "over queries": lambda s, x: s.softmax(-2),
    "by hand": lambda s, x: (e := (s - s.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True),
    "logarithm": lambda s, x: s.log_softmax(-1).exp(),
    "less the logarithm of sums": lambda s, x: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "sigmoid": lambda s, x: s.sigmoid(),
    "with a sink": lambda s, x: torch.cat([s, x["sink"].expand(*s.shape[:-1], 1)], -1).softmax(-1)[..., :-1],
    "with one more": lambda s, x: (e := (s - (m := s.amax(-1, True).relu())).exp()) / ((-m).exp() + e.sum(-1, True)),
    "shares": lambda s, x: s.relu() / (s.relu().sum(-1, keepdim=True) + 0.1),
    "squared": lambda s, x: s.relu() ** 2 / T,
    "over queries, then shares": lambda s, x: (w := s.softmax(-2)) / (w.sum(-1, keepdim=True) + 1e-3),
    "stick breaking": lambda s, x: _stick(s),
    "in double": lambda s, x: F.softmax(s, -1, dtype=torch.float64).to(s.dtype),
}  # fmt: skip


def _stick(s: Tensor) -> Tensor:
    log_left = F.logsigmoid(-s).masked_fill(J >= I, 0.0)
    left = log_left.flip(-1).cumsum(-1).flip(-1) - log_left
    return (F.logsigmoid(s) + left).exp().masked_fill(J >= I, 0.0)


PLAIN_WEIGHTS: dict[str, Edit] = {
    "plain": lambda w, x: w,
    "masked": lambda w, x: w * (J <= I),
    "again": lambda w, x: (w * x["pairs"]) / ((w * x["pairs"]).sum(-1, keepdim=True) + 1e-2),
    "transposed": lambda w, x: w.mT,
    "twice": lambda w, x: w @ w,
    "in place": lambda w, x: w.mul(1.0).mul_(0.5),
}
WEIGHTS: dict[str, Edit] = {
    **PLAIN_WEIGHTS,
    "mean of heads": lambda w, x: w.mean(1, keepdim=True).expand(-1, w.shape[1], -1, -1),
    "scaled": lambda w, x: w * x["heads"],
    "mixed heads": lambda w, x: torch.einsum("bhij,hg->bgij", w, x["mix"]),
    "difference": lambda w, x: w - 0.3 * w.flip(1),
}
RESULTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "nothing": lambda s, w: (),
    "mean of a dim": lambda s, w: (w.mean(0),),
    "keys": lambda s, w: (w.sum(-2), w.amax(-1)),
    "scores": lambda s, w: (s.clamp_min(-9.0),),
    "weights": lambda s, w: (w[..., :3, :],),
}


# -- classes of attention ------------------------------------------------------------------------------
class Chosen:
    """The operators chosen for a program, by their names."""

    def __init__(self, rng: random.Random, plain: bool):
        scores, weights = (PLAIN_SCORES, PLAIN_WEIGHTS) if plain else (SCORES, WEIGHTS)

        def mostly_first(table: dict[str, Any]) -> str:
            return rng.choices(list(table), [len(table), *[1] * (len(table) - 1)])[0]

        query, product = rng.choice(list(QUERIES)), rng.choice(list(PRODUCTS))
        edits = rng.choices(list(scores), k=rng.randint(0, 4))
        masked = next((n for n, name in enumerate(edits) if name.endswith(("-inf", str(LOW), " adds"))), len(edits))
        edits = [n for at, n in enumerate(edits) if at < masked or n not in FACTORS]
        normaliser, weighted, results = mostly_first(NORMALISERS), mostly_first(weights), mostly_first(RESULTS)
        self.names = ", ".join([query, product, *edits, normaliser, weighted, results])
        self.query, self.product, self.edits = QUERIES[query], PRODUCTS[product], [scores[n] for n in edits]
        self.normaliser, self.weights, self.results = NORMALISERS[normaliser], weights[weighted], RESULTS[results]

    def scored(self, q: Tensor, k: Tensor) -> Tensor:
        return self.product(self.query(q), k)

    def edited(self, s: Tensor, x: dict[str, Tensor]) -> Tensor:
        for edit in self.edits:
            s = edit(s, x)
        return s

    def weigh(self, s: Tensor, x: dict[str, Tensor]) -> Tensor:
        return self.weights(self.normaliser(s, x), x)


Out = tuple[Tensor, ...]
FORMS: dict[str, Callable[[Chosen, Tensor, Tensor, Tensor, dict[str, Tensor]], Out]] = {}
PLAIN: set[str] = set()  # classes whose scores lack heads


def form(plain: bool = False) -> Callable[[Callable], Callable]:
    def record(fn: Callable) -> Callable:
        FORMS[fn.__name__] = fn
        PLAIN.update({fn.__name__} if plain else set())
        return fn

    return record


@form()
def one(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    s = c.edited(c.scored(q, k), x)
    w = c.weigh(s, x)
    return w @ v, *c.results(s, w)


@form()
def added_table(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Add the products with a table of relative positions."""
    s = c.scored(q, k) + torch.einsum("bhid,ijd->bhij", q, x["places"][I - J + T - 1])
    w = c.weigh(c.edited(s, x), x)
    return (w @ v,)


@form()
def added_grid(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Add decomposed row and column positions."""
    grid = q.reshape(B, H, ROWS, COLUMNS, D)
    rows = torch.einsum("bhyxd,yzd->bhyxz", grid, x["places"][:ROWS, None] + x["places"][None, :ROWS])
    columns = torch.einsum("bhyxd,xzd->bhyxz", grid, x["places"][:COLUMNS, None] - x["places"][None, :COLUMNS])
    s = c.scored(q, k).view(B, H, ROWS, COLUMNS, ROWS, COLUMNS) + rows[..., None] + columns[..., None, :]
    w = c.weigh(c.edited(s.view(B, H, T, T), x), x)
    return (w @ v,)


def _skewed(s: Tensor) -> Tensor:
    """Shift row i of products with 2T - 1 distances, so that column j is key j."""
    s = F.pad(s, (0, 1)).flatten(-2)
    s = F.pad(s, (0, T - 1))
    return s.view(*s.shape[:-1], T + 1, 2 * T - 1)[..., :T, T - 1 :]


@form()
def added_skew(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Add skewed products with relative positions, with a bias of its own."""
    s = c.scored(q + x["heads"], k) + _skewed((q - x["heads"]) @ x["places"].mT)
    w = c.weigh(c.edited(s * 0.3, x), x)
    return (w @ v,)


@form()
def several_values(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Read one set of weights by products with values, points and pairs."""
    s = c.edited(c.scored(q, k), x)
    w = c.weigh(s, x)
    points = torch.einsum("bhij,bjhpc->bihpc", w, x["points"])
    pairs = (w.permute(0, 2, 1, 3) @ x["edges"]).flatten(2)
    return torch.cat([(w @ v).transpose(1, 2).flatten(2), points.flatten(2), pairs], -1), *c.results(s, w)


@form()
def relative_values(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Add products of the weights with a table of relative positions."""
    w = c.weigh(c.edited(c.scored(q, k), x), x)
    return (w @ v + torch.einsum("bhij,ijd->bhid", w, x["places"][I - J + T - 1]),)


@form()
def both_ways(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Normalize one product over keys and over queries."""
    s = c.edited(c.scored(q, k), x)
    return c.weigh(s, x) @ v, c.weigh(s.mT, x) @ q, s.softmax(-2).mT @ v


@form(plain=True)
def rows_first(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Order dims as rows, keys, batch, heads."""
    i, j, u = (t.permute(2, 0, 1, 3) for t in (q, k, v))
    s = torch.einsum("ibnd,jbnd->ijbn", i, j) * 0.4
    s = s.masked_fill((J > I)[:, :, None, None], -math.inf) + x["pairs_bias"][:, :, None, None] + x["heads"].flatten()
    w = s.softmax(1)
    return torch.einsum("ijbn,jbnd->ibnd", w, u).flatten(2), w.mean(3)


@form(plain=True)
def matrices(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Use matrices without a batch."""
    s = q[0, 0] @ k[0, 0].T / math.sqrt(D)
    s = c.edited(s, x)
    w = c.weigh(s, x)
    return w @ v[0, 0], *c.results(s, w)


@form(plain=True)
def one_matrix(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Use a batch without heads."""
    s = c.edited(torch.bmm(q[:, 0], k[:, 1].transpose(1, 2)), x)
    w = c.weigh(s, x)
    return torch.bmm(w, v[:, 0]), *c.results(s, w)


@form(plain=True)
def memory(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Read keys and values from the weights of linear layers; normalize over tokens, then over the memory."""
    s = F.linear(q.transpose(1, 2).flatten(2), x["memory"])
    w = s.softmax(1)
    w = w / (1e-6 + w.sum(-1, keepdim=True))
    return F.linear(w, x["memory"].T), F.linear(s.softmax(-1), x["memory"].T)


@form(plain=True)
def shared(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Share the queries, or the values, over the batch."""
    s = c.edited(torch.matmul(c.query(q)[0, 0], k[:, 0].transpose(1, 2)), x)
    t = q[:, 0] @ k[:, 1].mT
    return c.weigh(s, x) @ v[:, 0], t.softmax(-1) @ v[0, 1]


@form()
def edges(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Give each query keys and values of its own."""
    e = x["edges"].unsqueeze(1)
    s = (c.query(q).unsqueeze(3) * (k.unsqueeze(2) + e)).sum(-1) * 0.4
    w = c.weigh(c.edited(s, x), x)
    return ((w.unsqueeze(-1) * (v.unsqueeze(2) + e)).sum(3),)


@form()
def two_layers(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Write a shared bias in place again in each layer."""
    bias = x["batches"].expand(B, H, T, T).clone()
    for _ in range(2):
        bias.masked_fill_(~x["masks"], -9.0)
        v = c.weigh(c.edited(c.scored(q, k) + bias, x), x) @ v
    return (v,)


@form()
def without_gradient(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Compute a bias without gradients from other products."""
    with torch.no_grad():
        bias = (q @ k.mT).softmax(-1) * 0.5 + x["pairs_bias"]
    w = c.weigh(c.edited(c.scored(q, k) + bias, x), x)
    return (w @ v,)


@form()
def query_chunks(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Loop over chunks of queries."""
    outs = []
    for start in range(0, T, 5):
        s = q[:, :, start : start + 5] @ k.mT * 0.4 + x["pairs_bias"][start : start + 5]
        outs.append(s.masked_fill(~(I[start : start + 5] >= J), -math.inf).softmax(-1) @ v)
    return (torch.cat(outs, 2),)


@form()
def head_loop(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Loop over heads."""
    outs = []
    for n in range(H):
        s = q[:, n] @ k[:, n].mT + x["heads"][n] * (I - J).abs()
        outs.append(s.masked_fill(~x["pairs"], LOW).softmax(-1) @ v[:, n])
    return (torch.cat(outs, -1),)


@form()
def key_sets(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Join scores of local keys and of a pooled context."""
    pooled, u = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
    s = torch.cat([c.edited(c.scored(q, k), x), q @ pooled.mT], -1)
    w = s.softmax(-1)
    return (w[..., :T] @ v + w[..., T:] @ u,)


@form()
def pooled_query(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Ask all tokens by one pooled token, and one pooled token by all."""
    one = q.mean(2, keepdim=True)
    down = (one @ k.mT + x["batches"]).softmax(-1) @ v
    scores = c.edited(c.scored(q, k), x)[..., :1].clamp_min(LOW)  # no row of -inf alone: see docs/limits.md
    up = scores.softmax(-1) @ down
    return down, up


@form()
def windows(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Attend within rows and within columns of a grid, and join both."""
    q, k, v = (t.view(B, H, ROWS, COLUMNS, D) for t in (q, k, v))
    rows = (q @ k.mT * 0.4 + x["pairs_bias"][:COLUMNS, :COLUMNS]).softmax(-1) @ v
    q, k, v = (t.transpose(2, 3) for t in (q, k, v))
    columns = (q @ k.mT * 0.4).softmax(-1) @ v
    return (torch.cat([rows, columns.transpose(2, 3)], -1),)


@form()
def cross_shaped(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Normalize over the keys of a token's row and of its column at once."""
    q, k, v = (t.view(B, H, ROWS, COLUMNS, D) for t in (q, k, v))
    rows = torch.einsum("bhyxd,bhyzd->bhyxz", q, k)
    columns = torch.einsum("bhyxd,bhzxd->bhyxz", q, k)
    w = torch.cat([rows, columns], -1).softmax(-1)
    out = torch.einsum("bhyxz,bhyzd->bhyxd", w[..., :COLUMNS], v)
    return (out + torch.einsum("bhyxz,bhzxd->bhyxd", w[..., COLUMNS:], v),)


@form()
def landmarks(c: Chosen, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Out:
    """Go through landmarks with an iterated pseudo-inverse."""
    few_q, few_k = (t.view(B, H, ROWS, COLUMNS, D).mean(3) for t in (q, k))
    left, middle, right = (q @ few_k.mT).softmax(-1), (few_q @ few_k.mT).softmax(-1), (few_q @ k.mT).softmax(-1)
    z = middle.mT / (middle.sum(-2, keepdim=True).amax(-1, keepdim=True) * middle.sum(-1, keepdim=True).amax(-2, True))
    for _ in range(2):
        m = middle @ z
        z = 0.25 * z @ (13 * torch.eye(ROWS) - m @ (15 * torch.eye(ROWS) - m @ (7 * torch.eye(ROWS) - m)))
    return (left @ z @ (right @ v),)


# -- programs -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Program:
    """A random attention: `call` takes query, key, value (B, H, T, D) and named tensors."""

    name: str
    call: Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Out]
    dynamic: bool


def program(seed: int) -> Program:
    """Create the program of a seed. Some 40% are of the first class; all classes are as frequent in the others."""
    rng = random.Random(seed)
    name = "one" if rng.random() < 0.4 else rng.choice(list(FORMS))
    attention, chosen, dynamic = FORMS[name], Chosen(rng, name in PLAIN), rng.random() < 0.2
    title = f"{name}: {chosen.names}{', dynamic' if dynamic else ''}"
    return Program(title, lambda q, k, v, x: attention(chosen, q, k, v, x), dynamic)


def tensors() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Create query, key and value, and the tensors that operators read by name."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = {n: drawn(*shape) for n, shape in SHAPES.items()}
    x |= {"table": drawn(4, H), "mix": drawn(H, H), "sink": drawn(1), "memory": drawn(7, H * D)}
    x |= {"places": drawn(2 * T - 1, D), "points": drawn(B, T, H, 2, 3), "edges": drawn(B, T, T, D)}
    x["pairs"] = (torch.rand(T, T, generator=generator) < 0.5) | (I == J)
    x["masks"] = (torch.rand(B, 1, T, T, generator=generator) < 0.5) | (I == J)
    x["ids"] = torch.randint(0, 3, (B, T), generator=generator)
    q, k, v = (drawn(B, H, T, D) for _ in range(3))
    return q, k, v, x


def hold(seed: int) -> bool:
    """Compare a seed's program with eager and float64, forward and backward; return whether all its sites are
    rewritten. Raise AssertionError if results differ, and any exception that compiling or running it raises."""
    from tests.support import assert_right, cast

    made = program(seed)
    check = functools.partial(assert_right, made.call, dynamic=made.dynamic, inner="eager")
    torch._dynamo.reset()
    try:
        sites = check(*tensors())
    except AssertionError:  # rounding, such as that of a gradient of zero, is small, and gone if both run in float64
        sites = check(*tensors(), tolerance=5e-3)
        check(*cast(tensors(), torch.float64))
    return bool(sites) and all(s.rewritten for s in sites)


# -- many programs -----------------------------------------------------------------------------------------
def serve(first: int, count: int) -> None:
    """Compare programs and print a line of JSON for each."""
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != Path(__file__).resolve().parent]
    # importable without the root on sys.path, whose folder `kernels` hides the package
    tests = types.ModuleType("tests")
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests
    for seed in range(first, first + count):
        told = ""
        try:
            verdict = "rewritten" if hold(seed) else "kept"
        except Exception as problem:
            verdict, told = "failed", f"{type(problem).__name__}: {problem}"
        print(json.dumps({"seed": seed, "name": program(seed).name, "verdict": verdict, "told": told}), flush=True)


def batch(first: int, count: int) -> list[dict[str, Any]]:
    """Compare `count` programs in processes of their own; a program that ends its process counts as failed."""
    answers: list[dict[str, Any]] = []
    while len(answers) < count:
        at = first + len(answers)
        command = [sys.executable, __file__, "--serve", "--seed", str(at), "--graphs", str(first + count - at)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
        answers += lines
        if len(answers) < count:
            seed = first + len(answers)
            told = f"exit status {ran.returncode}: {ran.stderr[-400:]}"
            answers.append({"seed": seed, "name": program(seed).name, "verdict": "failed", "told": told})
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print each program's verdict")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.seed, args.graphs)
        return 0
    verdicts: Counter[str] = Counter()
    begun = time.monotonic()
    starts = range(args.seed, args.seed + args.graphs, BATCH)
    with ThreadPoolExecutor(args.workers) as pool:
        for answers in pool.map(lambda at: batch(at, min(BATCH, args.seed + args.graphs - at)), starts):
            for answer in answers:
                verdicts[answer["verdict"]] += 1
                if args.show or answer["verdict"] == "failed":
                    print(f"{answer['verdict']}: seed {answer['seed']}: {answer['name']}\n  {answer['told'][:600]}")
            each = (time.monotonic() - begun) / verdicts.total()
            print(f"{verdicts.total()} programs, {each:.2f} s each, {dict(verdicts)}", flush=True)
    return 1 if verdicts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
