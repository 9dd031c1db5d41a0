"""Put random operators before, around and after a softmax: nothing fails, and each rewrite matches eager."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support import assert_right, rand

pytestmark = pytest.mark.slow

B, H, T, D = 2, 3, 12, 8
LOW = torch.finfo(torch.float32).min
I, J = torch.arange(T)[:, None], torch.arange(T)[None, :]

# every mask keeps a row's own key, so that rows are never NaN
MASKS = {
    "causal": lambda x: J <= I,
    "window": lambda x: (I - J).abs() < 3,
    "blocks": lambda x: I // 4 == J // 4,
    "sink": lambda x: (J <= I) & (I - J < 4) | (J < 2),
    "triangle": lambda x: torch.ones(T, T).triu(1) == 0,
    "given": lambda x: x["pairs"],
    "by batch": lambda x: x["pairs"] & x["masks"],
}
SHAPES = {
    "keys": (T,), "rows": (T, 1), "heads": (H, 1, 1), "pairs": (T, T), "batches": (B, 1, 1, T), "all": (B, H, T, T),
}  # fmt: skip
QUERIES = {
    "plain": lambda q: q,
    "reversed": lambda q: q.flip(2),
    "rolled": lambda q: q.roll(1, 2),
    "normal": lambda q: F.normalize(q, dim=-1),
    "strided": lambda q: q.transpose(1, 2).contiguous().transpose(1, 2),
    "half rotated": lambda q: torch.cat([q[..., D // 2 :], -q[..., : D // 2]], -1),
}
PRODUCTS = {
    "matmul": lambda q, k: q @ k.mT,
    "transposed": lambda q, k: (k @ q.mT).mT,
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bijh", q, k).permute(0, 3, 1, 2),
    "broadcast": lambda q, k: (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1),
    "bmm": lambda q, k: torch.bmm(q.reshape(-1, T, D), k.reshape(-1, T, D).mT).view(B, H, T, T),
}
SCORES = {
    **{f"times {c}": lambda s, x, c=c: s * c for c in (0.3, -1.0)},
    **{f"plus {n}": lambda s, x, n=n: s + x[n] for n in SHAPES},
    **{f"times {n}": lambda s, x, n=n: s * x[n] for n in SHAPES},
    **{
        f"{n} fills {fill}": lambda s, x, m=m, fill=fill: s.masked_fill(~m(x), fill)
        for n, m in MASKS.items()
        for fill in (-math.inf, LOW, -5.0)
    },
    **{f"{n} adds": lambda s, x, m=m: s + (1 - m(x).float()) * LOW for n, m in MASKS.items()},
    **{f"{n} chooses": lambda s, x, m=m: torch.where(m(x), s, s * 0.5) for n, m in MASKS.items()},
    "square": lambda s, x: s**2,
    "in place": lambda s, x: s.mul(0.5).add_(0.25),
    "cap": lambda s, x: 4 * torch.tanh(s / 4),
    "clamp": lambda s, x: s.clamp(-2, 2),
    "distance": lambda s, x: s - (I - J).abs() * 0.2,
    "table": lambda s, x: s + x["table"][(I - J).abs().clamp(max=3)].permute(2, 0, 1),
    "roll": lambda s, x: s.roll(1, -1),
    "flip": lambda s, x: s.flip(-1),
    "flipped rows": lambda s, x: s.flip(-2),
    "transpose": lambda s, x: s.mT,
    "less the mean": lambda s, x: s - s.mean(-1, keepdim=True),
    "less the most": lambda s, x: s - s.amax(-1, keepdim=True),
    "sums": lambda s, x: s.cumsum(-1) * 0.1,
    "mixed heads": lambda s, x: torch.einsum("bhij,hg->bgij", s, x["mix"]),
    "largest": lambda s, x: torch.where(s < s.topk(4, -1).values[..., -1:], -9.0, s),
    "other heads": lambda s, x: s.flip(1),
    "first key": lambda s, x: torch.cat([s[..., :1] * 2, s[..., 1:]], -1),
    "double": lambda s, x: s.double().to(s.dtype),
}
NORMALISERS = {
    "softmax": lambda s, x: s.softmax(-1),
    "over queries": lambda s, x: s.softmax(-2),
    "over heads": lambda s, x: s.softmax(1),
    "by hand": lambda s, x: (e := (s - s.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True),
    "logarithm": lambda s, x: s.log_softmax(-1).exp(),
    "sigmoid": lambda s, x: s.sigmoid(),
    "with a sink": lambda s, x: torch.cat([s, x["heads"].expand(B, H, T, 1)], -1).softmax(-1)[..., :-1],
    "shares": lambda s, x: s.relu() / (s.relu().sum(-1, keepdim=True) + 0.1),
    "in double": lambda s, x: F.softmax(s, -1, dtype=torch.float64).to(s.dtype),
}
WEIGHTS = {
    "plain": lambda w, x: w,
    "masked": lambda w, x: w * (J <= I),
    "again": lambda w, x: (w * x["pairs"]) / ((w * x["pairs"]).sum(-1, keepdim=True) + 1e-2),
    "mean of heads": lambda w, x: w.mean(1, keepdim=True).expand(-1, H, -1, -1),
    "scaled": lambda w, x: w * x["heads"],
    "mixed heads": lambda w, x: torch.einsum("bhij,hg->bgij", w, x["mix"]),
    "transposed": lambda w, x: w.mT,
    "twice": lambda w, x: w @ w,
}
RESULTS = {
    "nothing": lambda s, w: (),
    "mean of heads": lambda s, w: (w.mean(1),),
    "keys": lambda s, w: (w.sum(-2), w.amax(-1)),
    "scores": lambda s, w: (s.clamp_min(-9.0),),
    "weights": lambda s, w: (w[:, 0],),
}


def one(table):
    return st.sampled_from(list(table))


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])  # no shrinking: it compiles
@given(
    one(QUERIES), one(PRODUCTS), st.lists(one(SCORES), max_size=4), one(NORMALISERS), one(WEIGHTS), one(RESULTS),
    st.booleans(),
)  # fmt: skip
def test_what_is_rewritten_gives_what_eager_gives(query, product, scores, normaliser, weights, results, dynamic):
    def fn(q, k, v, x):
        s = PRODUCTS[product](QUERIES[query](q), k)
        for name in scores:
            s = SCORES[name](s, x)
        w = WEIGHTS[weights](NORMALISERS[normaliser](s, x), x)
        return w @ v, *RESULTS[results](s, w)

    x = {n: rand(*shape, seed=m) for m, (n, shape) in enumerate(SHAPES.items())}
    generator = torch.Generator().manual_seed(3)
    x["pairs"] = (torch.rand(T, T, generator=generator) < 0.5) | (I == J)
    x["masks"] = (torch.rand(B, 1, T, T, generator=generator) < 0.5) | (I == J)
    x |= {"table": rand(4, H, seed=7), "mix": rand(H, H, seed=8)}
    torch._dynamo.reset()
    assert_right(fn, *(rand(B, H, T, D, seed=n) for n in (10, 11, 12)), x, dynamic=dynamic, inner="eager")
