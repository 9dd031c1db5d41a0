"""Naive models, each with one deliberate obstacle: name -> (function, the code that the report must state, options).

The line that the report must name ends in "# here".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, T, D = 2, 4, 24, 8
INF = math.inf


class Obstacle(NamedTuple):
    fn: Callable[..., Any]
    code: str
    options: dict[str, Any]


OBSTACLES: dict[str, Obstacle] = {}
ALWAYS = {"rewrite": "always"}
NO_ROWS = {"rewrite": "always", "tiers": ["library", "flash", "decode"]}


def obstacle(code: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        OBSTACLES[fn.__name__] = Obstacle(fn, code, options)
        return fn

    return add


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) * 0.25


# -- kept by the decision ----------------------------------------------------------------------------
@obstacle("slower")
def short_sequence(q, k, v):
    return scores(q, k).softmax(-1) @ v  # here


@obstacle("weights_read")
def weights_returned(q, k, v):
    weights = scores(q, k).softmax(-1)  # here
    return weights @ v, weights


@obstacle("no_tier", rewrite="always", tiers=["decode"])
def tier_not_allowed(q, k, v):
    return scores(q, k).softmax(-1) @ v  # here


# -- the softmax -------------------------------------------------------------------------------------
@obstacle("softmax_dim", **NO_ROWS)
def softmax_over_queries(q, k, v):
    return scores(q, k).softmax(-2) @ v  # here


@obstacle("softmax_dim", **ALWAYS)
def softmax_over_all_pairs(q, k, v):
    return scores(q, k).flatten(2).softmax(-1).view(B, H, T, T) @ v  # here


@obstacle("softmax_dim", **NO_ROWS)
def weights_transposed(q, k, v):
    weights = scores(q, k).softmax(-1)  # here
    return weights.mT @ v


@obstacle("columns", **NO_ROWS)
def softmax_over_two_sources(q, k, v):
    weights = torch.cat([scores(q, k), scores(q, 2 * k)], -1).softmax(-1)  # here
    return weights[..., :T] @ v


@obstacle("normaliser", **NO_ROWS)
def divided_by_the_sum_over_queries(q, k, v):
    weights = scores(q, k).exp()
    return (weights / weights.sum(-2, keepdim=True)) @ v  # here


@obstacle("normaliser", **NO_ROWS)
def divided_by_their_length(q, k, v):
    weights = scores(q, k).softmax(-1)  # here
    return (weights / weights.square().sum(-1, keepdim=True).sqrt()) @ v


@obstacle("several_softmaxes", **NO_ROWS)
def difference_of_softmaxes(q, k, v):
    weights = scores(q, k).softmax(-1)  # here
    return (weights - 0.2 * scores(k, q).softmax(-1)) @ v


@obstacle("several_softmaxes", **NO_ROWS)
def product_of_softmaxes(q, k, v):
    weights = scores(q, k)
    return (weights.softmax(-1) * scores(k, q).softmax(-1)) @ v  # here


@obstacle("several_dropouts", **NO_ROWS)
def dropped_out_twice(q, k, v):
    weights = scores(q, k).softmax(-1)  # here
    return F.dropout(F.dropout(weights, 0.1), 0.1) @ v


@obstacle("dropout_place", **NO_ROWS)
def weights_raised_after_dropout(q, k, v):
    weights = scores(q, k).softmax(-1)  # here
    return (F.dropout(weights, 0.1) + 0.1) @ v


@obstacle("one_draw", **ALWAYS)
def dropped_weights_returned(q, k, v):
    weights = F.dropout(scores(q, k).softmax(-1), 0.1)  # here
    return weights @ v, weights


@obstacle("dropout", **ALWAYS)
def everything_dropped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=1.0)  # here


@obstacle("masked_rows", **NO_ROWS)
def logarithm_of_masked_rows(q, k, v):
    hidden = torch.ones(T, T, dtype=torch.bool).triu()
    masked = scores(q, k).masked_fill(hidden, torch.finfo(torch.float32).min)
    return (masked - masked.exp().sum(-1, keepdim=True).log()).exp() @ v  # here


# -- the scores --------------------------------------------------------------------------------------
@obstacle("rows_mixed", **ALWAYS)
def mask_by_the_mean_score(q, k, v):
    s = scores(q, k)
    mean = s.mean()
    return s.masked_fill(s < mean, -INF).softmax(-1) @ v  # here


@obstacle("rows_mixed", **ALWAYS)
def unknown_operator(q, k, v):
    s = torch.linalg.inv(scores(q, k))  # here
    return s.softmax(-1) @ v


@obstacle("rows_mixed", **ALWAYS)
def random_scores(q, k, v):
    return F.gumbel_softmax(scores(q, k), dim=-1) @ v  # here


@obstacle("rows_mixed", **ALWAYS)
def summed_up_over_queries(q, k, v):
    s = scores(q, k).cumsum(-2)  # here
    return s.softmax(-1) @ v


@obstacle("rows_mixed", **ALWAYS)
def smoothed_over_queries(q, k, v):
    s = F.conv2d(scores(q, k), torch.ones(H, H, 3, 3), padding=1)  # here
    return s.softmax(-1) @ v


@obstacle("rows_mixed", **ALWAYS)
def batch_norm_in_training(q, k, v):
    s = F.batch_norm(scores(q, k), None, None, training=True)  # here
    return s.softmax(-1) @ v


@obstacle("score_used", **NO_ROWS)
def scores_of_their_own_rank(q, k, v):
    s = scores(q, k)
    first = s.sort(-1).values[..., :1]  # here
    return (s - first).tanh().softmax(-1) @ v


@obstacle("score_used", **NO_ROWS)
def scores_beside_the_last(q, k, v):
    s = q @ k.mT  # here
    return (s.tanh() + s[..., -1:]).softmax(-1) @ v


@obstacle("reduction", **NO_ROWS)
def scores_less_their_mean(q, k, v):
    s = scores(q, k)
    return (s - s.mean(-1, keepdim=True)).tanh().softmax(-1) @ v  # here


@obstacle("dtype", **ALWAYS)
def complex_scores(q, k, v):
    s = torch.complex(q, q) @ torch.complex(k, k).mT  # here
    return s.real.softmax(-1) @ v


@obstacle("no_product", **NO_ROWS)
def integer_scores(q, k, v):
    s = (q.long() @ k.long().mT).float()  # here
    return s.softmax(-1) @ v


# -- the weights and the values ----------------------------------------------------------------------
@obstacle("rows_mixed", **ALWAYS)
def weights_summed_up_over_queries(q, k, v):
    weights = scores(q, k).softmax(-1)
    weights = weights.cumsum(-2)  # here
    return weights @ v


@obstacle("rows_mixed", **ALWAYS)
def weights_rolled(q, k, v):
    weights = scores(q, k).softmax(-1)
    weights = weights.roll(1, -2)  # here
    return weights @ v


@obstacle("not_lifted", **NO_ROWS)
def inverted_weights(q, k, v):
    weights = scores(q, k).softmax(-1)
    return torch.linalg.inv(weights) @ v  # here


@obstacle("contraction", **ALWAYS)
def sum_over_keys_and_heads(q, k, v):
    weights = scores(q, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bid", weights, v)  # here


@obstacle("values", **NO_ROWS)
def values_without_a_width(q, k, v):
    weights = scores(q, k).softmax(-1)
    return torch.einsum("bhij,bhj->bhi", weights, v.sum(-1))  # here


@obstacle("no_values", **ALWAYS)
def weights_alone(q, k, v):
    return scores(q, k).softmax(-1)  # here


# -- the operands ------------------------------------------------------------------------------------
@obstacle("rows", **NO_ROWS)
def keys_gathered_for_each_query(q, k, v):
    near = (torch.arange(T)[:, None] + torch.arange(6)) % T
    s = torch.einsum("bhid,bhijd->bhij", q, k[:, :, near])  # here
    return torch.einsum("bhij,bhijd->bhid", s.softmax(-1), v[:, :, near])


@obstacle("mutated", **ALWAYS)
def keys_changed_in_place(q, k, v):
    s = scores(q, k)
    k.add_(1.0)  # here
    return s.softmax(-1) @ v + k.mean()


@obstacle("shared_keys", **ALWAYS)
def codebook(q, k, v):
    entries = k[0, 0]
    return (q @ entries.T).softmax(-1) @ entries  # here


# -- the graph ---------------------------------------------------------------------------------------
@obstacle("graph_break", **ALWAYS)
def break_before_the_softmax(q, k, v):
    s = scores(q, k)
    torch._dynamo.graph_break()  # here
    return s.softmax(-1) @ v


@obstacle("graph_break", **ALWAYS)
def break_after_the_softmax(q, k, v):
    weights = scores(q, k).softmax(-1)
    print(end="")  # here
    return weights @ v


@obstacle("graph_break", **ALWAYS)
def mask_that_depends_on_data(q, k, v):
    s = scores(q, k)
    if s.max().item() > 0:  # here
        s = s.tril()
    return s.softmax(-1) @ v


@obstacle("region", **ALWAYS)
def scores_in_low_precision(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        s = q @ k.mT  # here
    return s.float().softmax(-1) @ v


@obstacle("functorch", **ALWAYS)
def draws_inside_vmap(q, k, v):
    def one(q, k, v):
        return F.dropout(scores(q, k).softmax(-1)) @ v  # here

    return torch.vmap(one, randomness="different")(q, k, v)


@obstacle("higher_order", **ALWAYS)
def inside_a_loop(q, k, v):
    from torch._higher_order_ops.while_loop import while_loop

    def step(n, x):
        return n + 1, scores(x, k).softmax(-1) @ v  # here

    return while_loop(lambda n, x: n < 3, step, (torch.tensor(0), q))


@obstacle("not_attention", **ALWAYS)
def classifier(q, k, v):
    return q.mean((1, 2)).softmax(-1), scores(q, k)  # here
