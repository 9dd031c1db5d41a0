"""Define random score programs and spellings, the ways to write one, for the respelling tests.

A program defines the computation, a spelling the code. `write(program, spelling)` returns a plain PyTorch function of
the tensors from `tensors(program)`; `arrange` converts these to the spelling's layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

B, H, T, D = 2, 4, 24, 8
INF, LOW = float("-inf"), torch.finfo(torch.float32).min
WINDOW = 7


@dataclass(frozen=True)
class Program:
    scale: float = 0.25
    groups: int = 4
    cap: float | None = None
    bias: tuple[str, ...] = ()  # of row (B, S), pair (H, T, S), full (B, H, T, S), alibi (H,)
    masks: tuple[str, ...] = ()  # of causal, window, padding, document
    fill: float = INF
    sink: bool = False
    head_mask: bool = False


@dataclass(frozen=True)
class Spelling:
    layout: str = "bhtd"
    scale: str = "scores"
    repeat: str = "interleave"
    cap: str = "divide"
    bias: str = "right"
    causal: str = "arange"
    masking: str = "masked_fill"
    joined: bool = True
    softmax: str = "operator"
    sink: str = "column"
    upcast: str = "none"


CHOICES: dict[str, tuple] = {
    "layout": ("bhtd", "bthd", "einsum", "einsum_bthd", "bmm", "fused", "stored_transposed", "baddbmm"),
    "scale": ("scores", "query", "key", "divide", "both", "in_place", "tensor"),
    "repeat": ("interleave", "expand", "five_dims"),
    "cap": ("divide", "multiply"),
    "bias": ("right", "left", "alpha", "in_place"),
    "causal": ("arange", "tril", "triu", "reversed", "buffer"),
    "masking": ("masked_fill", "where", "add", "in_place", "product"),
    "joined": (True, False),
    "softmax": ("operator", "method", "by_hand", "divided_later", "shifted_operator", "logsumexp", "log_softmax"),
    "sink": ("column", "by_hand"),
    "upcast": ("none", "dtype", "float"),
}


def tensors(p: Program, seed: int = 0) -> dict[str, Tensor]:
    """Create every tensor of the program, in (b, h, t, d) order."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    out = dict(q=r(B, H, T, D), k=r(B, p.groups, T, D), v=r(B, p.groups, T, D))
    shapes = dict(row=(B, T), pair=(H, T, T), full=(B, H, T, T), alibi=(H,))
    out |= {name: r(*shapes[name]) for name in p.bias}
    if "padding" in p.masks:
        out["keep"] = torch.arange(T).expand(B, T) < torch.tensor([[T], [T - 5]])
    if "document" in p.masks:
        out["doc"] = torch.arange(T).div(9, rounding_mode="floor").expand(B, T).contiguous()
    out |= {name: r(H) for name in ("sink", "head_mask") if getattr(p, name)}
    return out


def arrange(x: dict[str, Tensor], s: Spelling) -> dict[str, Tensor]:
    """Convert the tensors to the layout in which the spelling takes query, key and value."""
    q, k, v = x["q"], x["k"], x["v"]
    if s.layout in ("bthd", "einsum_bthd"):
        q, k, v = (y.transpose(1, 2).contiguous() for y in (q, k, v))
    elif s.layout == "fused":
        q, k, v = (y.transpose(1, 2).flatten(2).contiguous() for y in (q, k, v))
    elif s.layout == "stored_transposed":
        k = k.mT.contiguous()
    return {**x, "q": q, "k": k, "v": v}


def write(p: Program, s: Spelling) -> Callable[..., Tensor]:
    def attention(**x: Tensor) -> Tensor:
        q, k, v = opened(x, p, s)
        left, right = factors(p, s, q)
        scores = product(q * left if left is not None else q, k * right if right is not None else k, p, s)
        scores = scaled(scores, p, s, left, right)
        if p.cap is not None:
            scores = (
                p.cap * torch.tanh(scores / p.cap) if s.cap == "divide" else torch.tanh(scores * (1 / p.cap)).mul(p.cap)
            )
        scores = biased(scores, x, p, s)
        scores = masked(scores, x, p, s)
        if s.upcast == "float":
            scores = scores.float()
        return weighted(scores, v, x, p, s)

    return attention


def opened(x, p, s):
    """Return query (b, h, t, d), key and value in the product's layout; expand heads unless `five_dims`."""
    q, k, v = x["q"], x["k"], x["v"]
    if s.layout == "bthd":
        q, k, v = q.transpose(1, 2), k.permute(0, 2, 1, 3), v.transpose(1, 2)
    elif s.layout == "einsum_bthd":
        q, k, v = (y.movedim(1, 2) for y in (q, k, v))
    elif s.layout == "fused":
        q, k, v = (y.view(B, T, -1, D).transpose(1, 2) for y in (q, k, v))
    elif s.layout == "stored_transposed":
        k = k.mT
    if p.groups != H and not grouped(p, s):
        n = H // p.groups
        if s.repeat == "interleave":
            k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
        else:
            k, v = (y[:, :, None].expand(B, p.groups, n, T, D).reshape(B, H, T, D) for y in (k, v))
    return q, k, v


def grouped(p, s) -> bool:
    return p.groups != H and s.repeat == "five_dims" and s.layout in ("bhtd", "bthd", "fused")


def factors(p, s, q):
    """Return the factors of query and key before the product."""
    root = math.sqrt(p.scale)
    return {"query": (p.scale, None), "key": (None, p.scale), "both": (root, root)}.get(s.scale, (None, None))


def scaled(scores, p, s, left, right):
    if left is not None or right is not None or s.layout == "baddbmm":
        return scores
    if s.scale == "divide":
        return scores / (1 / p.scale)
    if s.scale == "tensor":
        return scores * torch.full([], p.scale)
    if s.scale == "in_place":
        scores *= p.scale
        return scores
    return scores * p.scale


def product(q, k, p, s):
    if grouped(p, s):
        return (
            (q.view(B, p.groups, -1, T, D) @ k.unsqueeze(2).mT).view(B, H, T, T)
            if s.layout == "bhtd"
            else (q.unflatten(1, (p.groups, -1)) @ k.unsqueeze(2).mT).flatten(1, 2)
        )
    if s.layout == "einsum":
        return torch.einsum("bhqd,bhkd->bhqk", q, k)
    if s.layout == "einsum_bthd":
        return torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
    if s.layout == "bmm":
        return torch.bmm(q.reshape(B * H, T, D), k.reshape(B * H, T, D).transpose(1, 2)).view(B, H, T, T)
    if s.layout == "baddbmm":
        flat = [y.reshape(B * H, T, D) for y in (q, k)]
        alpha = 1.0 if s.scale in ("query", "key", "both") else p.scale
        return torch.baddbmm(q.new_empty(B * H, T, T), flat[0], flat[1].mT, beta=0, alpha=alpha).view(B, H, T, T)
    return torch.matmul(q, k.transpose(-2, -1))


def biased(scores, x, p, s):
    terms = []
    for name in p.bias:
        if name == "row":
            terms.append(x["row"][:, None, None, :])
        elif name == "pair":
            terms.append(x["pair"].unsqueeze(0))
        elif name == "full":
            terms.append(x["full"])
        else:
            at = torch.arange(T)
            terms.append(x["alibi"].view(1, H, 1, 1) * (at[None, :] - at[:, None]))
    for term in terms:
        if s.bias == "left":
            scores = term + scores
        elif s.bias == "alpha":
            scores = torch.sub(scores, term * 0.5, alpha=-2)
        elif s.bias == "in_place":
            scores += term
        else:
            scores = scores + term
    return scores


def conditions(x, p, s) -> list[Tensor]:
    """Return one bool tensor per mask, True at kept scores."""
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    found = []
    for name in p.masks:
        if name == "causal":
            found.append(
                {
                    "arange": lambda: j <= i,
                    "reversed": lambda: ~(i < j),
                    "tril": lambda: torch.tril(torch.ones(T, T)) == 1,
                    "triu": lambda: ~torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1),
                    "buffer": lambda: torch.ones(2 * T, 2 * T, dtype=torch.bool).tril()[:T, :T],
                }[s.causal]()
            )
        elif name == "window":
            found.append(i - j < WINDOW if s.causal == "arange" else ~(j <= i - WINDOW))
        elif name == "padding":
            found.append(x["keep"][:, None, None, :])
        else:
            doc = x["doc"]
            found.append(
                (doc[:, None, :, None] == doc[:, None, None, :])
                if s.causal == "arange"
                else (doc.unsqueeze(-1) - doc.unsqueeze(-2) == 0)[:, None]
            )
    return found


def masked(scores, x, p, s):
    keeps = conditions(x, p, s)
    if not keeps:
        return scores
    if s.joined or s.masking in ("add", "product"):  # adding a finite fill twice would overflow
        whole = keeps[0]
        for keep in keeps[1:]:
            whole = whole & keep
        keeps = [whole]
    for keep in keeps:
        if s.masking == "where":
            scores = torch.where(keep, scores, p.fill)
        elif s.masking == "add" or (s.masking == "product" and p.fill == INF):
            scores = scores + torch.zeros(keep.shape).masked_fill(~keep, p.fill)
        elif s.masking == "product":
            scores = scores + (1.0 - keep.to(scores.dtype)) * p.fill
        elif s.masking == "in_place":
            scores.masked_fill_(~keep, p.fill)
        else:
            scores = scores.masked_fill(~keep, p.fill)
    return scores


def weighted(scores, v, x, p, s):
    if p.sink and s.sink == "column":
        scores = torch.cat([scores, x["sink"].view(1, H, 1, 1).expand(B, H, T, 1)], dim=-1)
    style = s.softmax
    if p.sink and s.sink == "by_hand":
        m = scores.amax(-1, keepdim=True)
        e = torch.exp(scores - m)
        weights = e / (e.sum(-1, keepdim=True) + torch.exp(x["sink"].view(1, H, 1, 1) - m))
    elif style == "divided_later" and not p.sink and not p.head_mask:
        e = torch.exp(scores - scores.max(-1, keepdim=True).values)
        return values(e, v, p, s) / e.sum(-1, keepdim=True)
    elif style == "by_hand":
        e = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = e / e.sum(-1, keepdim=True)
    elif style == "shifted_operator":
        weights = (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1)
    elif style == "logsumexp" and not (p.masks and p.fill == LOW):  # differs in rows without a live key
        weights = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))
    elif style == "log_softmax":
        weights = torch.log_softmax(scores, -1).exp()
    elif s.upcast == "dtype":
        weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        weights = scores.softmax(-1) if style == "method" else torch.softmax(scores, dim=3)
    if p.sink and s.sink == "column":
        weights = weights[..., :-1]
    if p.head_mask:
        weights = weights * x["head_mask"].view(1, H, 1, 1)
    return values(weights, v, p, s)


def values(weights, v, p, s):
    if grouped(p, s):
        return (weights.reshape(B, p.groups, -1, T, T) @ v.unsqueeze(2)).reshape(B, H, T, D)
    if s.layout == "einsum":
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)
    if s.layout == "einsum_bthd":
        return torch.einsum("bhqk,bkhd->bqhd", weights, v.transpose(1, 2)).transpose(1, 2)
    if s.layout in ("bmm", "baddbmm"):
        return torch.bmm(weights.reshape(B * H, T, T), v.reshape(B * H, T, D)).view(B, H, T, D)
    return weights @ v
