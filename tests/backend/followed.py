"""The obstacles again, rewritten by hand as the report advises: name -> (function, options)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.backend.obstacles import ALWAYS, NO_ROWS, OBSTACLES, B, H, Obstacle, T, scores

FOLLOWED: dict[str, Obstacle] = {}


def follows(options=ALWAYS):
    def add(fn):
        FOLLOWED[fn.__name__] = Obstacle(fn, OBSTACLES[fn.__name__].code, options)
        return fn

    return add


def with_options(name, options):
    FOLLOWED[name] = OBSTACLES[name]._replace(options=options)


with_options("short_sequence", ALWAYS)
with_options("tier_not_allowed", {"rewrite": "always", "tiers": ["decode", "chunked"]})
with_options("scores_beside_the_last", ALWAYS)
with_options("scores_of_their_own_rank", ALWAYS)


@follows()
def weights_returned(q, k, v):
    return scores(q, k).softmax(-1) @ v


@follows()
def softmax_over_all_pairs(q, k, v):
    return scores(q, k).softmax(-1) @ v


@follows()
def weights_transposed(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v


@follows(NO_ROWS)
def softmax_over_two_sources(q, k, v):
    weights = torch.cat([scores(q, k), scores(q, 2 * k)], -1).softmax(-1)
    return weights @ torch.cat([v, v], -2)


@follows(NO_ROWS)
def difference_of_softmaxes(q, k, v):
    return scores(q, k).softmax(-1) @ v - 0.2 * (scores(k, q).softmax(-1) @ v)


@follows(NO_ROWS)
def divided_by_their_length(q, k, v):
    weights = scores(q, k).softmax(-1)
    return (weights @ v) / weights.square().sum(-1, keepdim=True).sqrt()


@follows()
def dropped_out_twice(q, k, v):
    return F.dropout(scores(q, k).softmax(-1), 0.19) @ v


@follows()
def weights_raised_after_dropout(q, k, v):
    return F.dropout(scores(q, k).softmax(-1) + 0.1, 0.1) @ v


@follows()
def dropped_weights_returned(q, k, v):
    weights = scores(q, k).softmax(-1)
    return F.dropout(weights, 0.1) @ v, weights


@follows()
def everything_dropped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


@follows(NO_ROWS)
def logarithm_of_masked_rows(q, k, v):
    hidden = torch.ones(T, T, dtype=torch.bool).triu()
    masked = scores(q, k).masked_fill(hidden, -math.inf)
    return (masked - masked.exp().sum(-1, keepdim=True).log()).exp() @ v


@follows()
def unknown_operator(q, k, v):
    return scores(q, k).cumsum(-1).softmax(-1) @ v


@follows()
def smoothed_over_queries(q, k, v):
    return F.conv2d(scores(q, k), torch.ones(H, H, 1, 3), padding=(0, 1)).softmax(-1) @ v


@follows()
def batch_norm_in_training(q, k, v):
    s = F.batch_norm(scores(q, k), torch.zeros(H), torch.ones(H), training=False)
    return s.softmax(-1) @ v


@follows()
def scores_less_their_mean(q, k, v):
    return scores(q, k).tanh().softmax(-1) @ v


@follows()
def complex_scores(q, k, v):
    return (q @ k.mT - q @ k.mT).softmax(-1) @ v


@follows(NO_ROWS)
def integer_scores(q, k, v):
    return (q.long().float() @ k.long().float().mT).softmax(-1) @ v


@follows(NO_ROWS)
def values_without_a_width(q, k, v):
    weights = scores(q, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v.sum(-1, keepdim=True)).squeeze(-1)


@follows(NO_ROWS)
def keys_gathered_for_each_query(q, k, v):
    near = (torch.arange(T)[:, None] + torch.arange(6)) % T
    s = torch.einsum("bhind,bhijd->bhinj", q.unsqueeze(-2), k[:, :, near])
    return torch.einsum("bhinj,bhijd->bhind", s.softmax(-1), v[:, :, near]).squeeze(-2)


@follows()
def codebook(q, k, v):
    entries = k[0, 0].expand(B, H, -1, -1)
    return (q @ entries.mT).softmax(-1) @ entries


@follows()
def break_before_the_softmax(q, k, v):
    return scores(q, k).softmax(-1) @ v


@follows()
def break_after_the_softmax(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v


@follows()
def mask_that_depends_on_data(q, k, v):
    if q.max().item() > 0:
        q = q * 2
    return scores(q, k).softmax(-1) @ v


@follows()
def scores_in_low_precision(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return (q @ k.mT).softmax(-1) @ v


@follows()
def draws_inside_vmap(q, k, v):
    return F.dropout(scores(q, k).softmax(-1)) @ v


@follows()
def inside_a_loop(q, k, v):
    for _ in range(3):
        q = scores(q, k).softmax(-1) @ v
    return q


@follows()
def weights_alone(q, k, v):
    return scores(q, k).softmax(-1) @ v


@follows()
def inverted_weights(q, k, v):
    return torch.linalg.inv(torch.eye(T) * 2) @ (scores(q, k).softmax(-1) @ v)
