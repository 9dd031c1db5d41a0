"""Compare one graph before and after each pass of `prepare` with golden text. ATTNFX_ACCEPT=1 accepts changes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attnfx.compiler import pipeline
from attnfx.compiler.context import Context
from attnfx.options import Options
from attnfx.report.report import Report
from tests.passes.golden import sections, whole
from tests.support import rand

B, H, T, S, D = 2, 2, 6, 8, 4
PASSES = {step.__name__.rpartition(".")[2]: step for step in pipeline.PREPARE}


def inline_checkpoints(q, k, v):
    return checkpoint(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v, use_reentrant=False)


def expand_vmap(q, k, v):
    return torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)


def functionalize(q, k, v, bias):
    scores = q @ k.mT
    scores += bias
    scores[..., 5:] = float("-inf")
    return scores.softmax(-1) @ v


def delay_writes(q, k, v, length):
    scores = (q @ k.mT).masked_fill(torch.arange(S) >= length, float("-inf"))
    length.add_(1)
    return scores.softmax(-1) @ v


def detach_no_grad(q, k, v):
    scores = q @ k.mT
    with torch.no_grad():
        decay = scores.softmax(-1).cumsum(-1)
    return (scores * decay).softmax(-1) @ v


def distribute_products(q, k, v, table, w, b):
    pairs = torch.cat([q[:, :, :, None].expand(-1, -1, -1, S, -1), k[:, :, None].expand(-1, -1, T, -1, -1)], -1)
    places = (torch.arange(S) - torch.arange(T)[:, None]).clamp(-1, 1) + 1
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) + F.linear(pairs, w, b).squeeze(-1)
    return (scores + torch.einsum("bhid,ijd->bhij", q, table[places])).softmax(-1) @ v


def hoist_concat(q, k, v, w):
    return torch.cat([F.linear((x @ k.mT).softmax(-1) @ v, w) for x in q.split(3, 2)], 2)


def merge_online_softmax(q, k, v):
    (first, second), (u, w) = ((q @ x.mT for x in k.split(4, 2)), v.split(4, 2))
    top = first.amax(-1, keepdim=True)
    out, total = (first - top).exp() @ u, (first - top).exp().sum(-1, keepdim=True)
    new = torch.maximum(top, second.amax(-1, keepdim=True))
    weights, shrunk = (second - new).exp(), (top - new).exp()
    return (out * shrunk + weights @ w) / (total * shrunk + weights.sum(-1, keepdim=True))


def merge_key_sets(q, k, v):
    (j, k), (u, v) = k.split(4, 2), v.split(4, 2)
    weights = torch.cat([q @ j.mT, q @ k.mT], -1).softmax(-1)
    return weights[..., :4] @ u + weights[..., 4:] @ v


def merge_score_terms(q, k, v, p, r):
    return (q @ k.mT + (p @ r.mT) * 0.5).softmax(-1) @ v


def align_relative_values(q, k, table):
    flat = F.pad(F.pad((q @ k.mT).softmax(-1), (0, S - 1)).flatten(2), (S, 0))
    return flat.view(B, H, S, 2 * S)[..., 1:] @ table


def heads():
    return rand(B, H, T, D), rand(B, H, S, D), rand(B, H, S, D)


FORMS = [
    (inline_checkpoints, heads),
    (expand_vmap, heads),
    (functionalize, lambda: (*heads(), rand(T, S))),
    (delay_writes, lambda: (*heads(), torch.tensor(3))),
    (detach_no_grad, lambda: [x.requires_grad_() for x in heads()]),
    (distribute_products, lambda: (*heads(), rand(3, D), rand(1, 2 * D), rand(1))),
    (hoist_concat, lambda: (*heads(), rand(D, D))),
    (merge_online_softmax, heads),
    (merge_key_sets, heads),
    (merge_score_terms, lambda: (*heads(), rand(B, H, T, 2), rand(B, H, S, 2))),
    (align_relative_values, lambda: (rand(B, H, S, D), rand(B, H, S, D), rand(1, 1, 2 * S - 1, D))),
]


def prepared(gm, steps, monkeypatch):
    """Format a graph of Dynamo after some of the passes."""
    monkeypatch.setattr(pipeline, "PREPARE", steps)
    return whole(pipeline.prepare(gm, Context(Options(), Report())).gm)


@pytest.mark.parametrize(("fn", "args"), FORMS, ids=[fn.__name__ for fn, _ in FORMS])
def test_a_pass_changes_the_graph_as_shown(fn, args, golden, monkeypatch):
    graphs, steps = [], pipeline.PREPARE
    torch.compile(fn, backend=lambda gm, _: graphs.append(gm) or gm.forward, dynamic=False)(*args())
    (gm,) = graphs
    at = steps.index(PASSES[fn.__name__])
    before, after = (prepared(gm, steps[:n], monkeypatch) for n in (at, at + 1))
    assert before != after, "the pass changes nothing"
    golden(f"{fn.__name__}.txt", sections({"before": before, "after": after}))


def test_every_pass_but_the_trace_is_shown():
    assert {fn.__name__ for fn, _ in FORMS} == set(PASSES) - {"trace"}
