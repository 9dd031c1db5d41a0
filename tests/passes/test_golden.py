"""Compare graph, program and rewritten graph of the main forms with golden text. ATTNFX_ACCEPT=1 accepts changes."""

import pytest
import torch
import torch.nn.functional as F

from attnfx.compiler import pipeline
from attnfx.passes.prepare import trace
from tests.passes.golden import sections, text
from tests.support import compiled, new_reports, rand

INF = float("-inf")


def plain(q, k, v):
    return ((q @ k.transpose(-2, -1)) * 0.25).softmax(dim=-1) @ v


def causal_masked_fill(q, k, v):
    t = q.shape[2]
    keep = torch.tril(torch.ones(t, t)).view(1, 1, t, t)
    return ((q @ k.transpose(-2, -1)) * 0.25).masked_fill(keep == 0, INF).softmax(dim=-1) @ v


def grouped_repeat_kv(q, k, v):
    b, g, t, d = k.shape
    k = k[:, :, None].expand(b, g, 2, t, d).reshape(b, 2 * g, t, d)
    v = v[:, :, None].expand(b, g, 2, t, d).reshape(b, 2 * g, t, d)
    weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def packed_projection_with_padding(x, w, keep):
    b, t, c = x.shape
    q, k, v = (x @ w).reshape(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
    extended = (1.0 - keep[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
    return ((q @ k.mT) / 2.0 + extended).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, c)


def dropout_training(q, k, v):
    return F.dropout(((q @ k.mT) * 0.25).softmax(-1), 0.1, True) @ v


def sink(q, k, v, logits):
    b, h, t, _ = q.shape
    scores = torch.cat([(q @ k.mT) * 0.25, logits.reshape(1, h, 1, 1).expand(b, h, t, 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


def library_call(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def heads(g=4):
    return rand(2, 4, 24, 16), rand(2, g, 24, 16), rand(2, g, 24, 16)


FORMS = [
    (plain, heads),
    (causal_masked_fill, heads),
    (grouped_repeat_kv, lambda: heads(2)),
    (dropout_training, heads),
    (library_call, heads),
    (packed_projection_with_padding, lambda: (rand(2, 24, 64), rand(64, 192), torch.ones(2, 24, dtype=torch.bool))),
    (sink, lambda: (*heads(), rand(4))),
]


@pytest.mark.parametrize(("fn", "args"), FORMS, ids=[fn.__name__ for fn, _ in FORMS])
def test_the_graph_before_and_after(fn, args, golden, monkeypatch):
    results, traced = [], []
    original_run, original_trace = pipeline.run, trace.run

    def run_trace(graph):
        count = original_trace(graph)
        traced.append(text(graph.gm))
        return count

    def run(gm, *rest, **named):
        results.append(original_run(gm, *rest, **named))
        return results[-1]

    monkeypatch.setattr(trace, "run", run_trace)
    monkeypatch.setattr(pipeline, "run", run)
    with new_reports() as filed, torch.no_grad():
        compiled(fn, inner="eager")(*args())
    (site,) = filed[0].rewritten
    parts = {
        "before": traced[0],
        "site": f"{site.summary()}\nmask: {site.mask}\n{site.spec}",
        "after": text(results[0].gm),
    }
    golden(f"{fn.__name__}.txt", sections(parts))
