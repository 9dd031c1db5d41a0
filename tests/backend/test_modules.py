"""Rewrite attention modules as people write them in plain PyTorch, correctly in inference and training."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import check, compiled, error, new_reports, rand, run


class ChunkedSelfAttention(nn.Module):
    """A vision transformer's attention that loops over chunks of queries to save memory."""

    def __init__(self, width: int, heads: int, chunk: int):
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        parts = []
        for start in range(0, n, self.chunk):
            weights = (q[:, :, start : start + self.chunk] @ k.transpose(-2, -1)) * self.scale
            parts.append(weights.softmax(dim=-1) @ v)
        return self.out(torch.cat(parts, dim=2).transpose(1, 2).reshape(b, n, c))


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class LoRA(nn.Module):
    """A frozen projection with a trainable low-rank update."""

    def __init__(self, width: int, out: int, rank: int = 4, alpha: float = 8.0):
        super().__init__()
        self.base = nn.Linear(width, out)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)
        self.gain = alpha / rank
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * self.gain


class GroupedLoRAAttention(nn.Module):
    """Grouped heads, biases on q, k and v, RMS-normed queries and keys, LoRA on q and v."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, self.d = heads, groups, width // heads
        self.q = LoRA(width, width)
        self.k = nn.Linear(width, groups * self.d)
        self.v = LoRA(width, groups * self.d)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.d), RMSNorm(self.d)
        for module in (self.k, self.out, self.q_norm, self.k_norm):
            module.requires_grad_(False)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q_norm(self.q(x).view(b, t, self.heads, self.d)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(b, t, self.groups, self.d)).transpose(1, 2)
        v = self.v(x).view(b, t, self.groups, self.d).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.groups, dim=1)
        v = v.repeat_interleave(self.heads // self.groups, dim=1)
        keep = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(2, 3) / math.sqrt(self.d)).masked_fill(~keep, torch.finfo(q.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32 if q.dtype == torch.bfloat16 else None).to(q.dtype)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, -1))


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Compute attention as the reference code in the documentation of PyTorch's fused operator."""
    t, s = q.size(-2), k.size(-2)
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    bias = torch.zeros(t, s, dtype=q.dtype, device=q.device)
    if is_causal:
        bias.masked_fill_(torch.ones(t, s, dtype=torch.bool).tril(diagonal=0).logical_not(), float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
        else:
            bias = attn_mask + bias
    weights = q @ k.transpose(-2, -1) * scale
    weights += bias
    weights = torch.softmax(weights, dim=-1)
    weights = torch.dropout(weights, dropout_p, train=dropout_p > 0)
    return weights @ v


class MaskedAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float = 0.0, scale: float | None = None):
        super().__init__()
        self.heads, self.dropout, self.scale = heads, dropout, scale
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, mask=None, is_causal=False):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.project(x).chunk(3, dim=-1))
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal, self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x, angles):
    """Apply a rotary embedding to adjacent pairs; x (b, t, h, d), angles (t, d / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(3).type_as(x)


class CachedAttention(nn.Module):
    """Attention with RoPE, grouped heads, and a key/value cache that is written at `input_pos`."""

    def __init__(self, width: int, heads: int, groups: int, longest: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.groups, self.d, self.longest = heads, groups, width // heads, longest
        self.project = nn.Linear(width, (heads + 2 * groups) * self.d, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        inverse = 10000.0 ** (-torch.arange(0, self.d, 2) / self.d)
        self.register_buffer("angles", torch.outer(torch.arange(longest).float(), inverse), persistent=False)

    def open_cache(self, b: int, dtype: torch.dtype = torch.float32):
        self.register_buffer("keys", torch.zeros(b, self.groups, self.longest, self.d, dtype=dtype))
        self.register_buffer("values", torch.zeros(b, self.groups, self.longest, self.d, dtype=dtype))

    def forward(self, x, mask=None, input_pos=None):
        b, t, _ = x.shape
        if t > self.longest:
            raise ValueError(f"a sequence of {t} is longer than {self.longest}")
        q, k, v = self.project(x).split([self.heads * self.d, self.groups * self.d, self.groups * self.d], dim=-1)
        q, k, v = (y.view(b, t, -1, self.d) for y in (q, k, v))
        angles = self.angles[:t] if input_pos is None else self.angles[input_pos]
        q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if input_pos is not None:
            self.keys.index_copy_(2, input_pos, k)
            self.values.index_copy_(2, input_pos, v)
            k, v = self.keys, self.values
            if mask is None:
                mask = torch.arange(self.longest)[None, :] <= input_pos[:, None]
        elif mask is None:
            mask = torch.ones(t, t, dtype=torch.bool).tril()
        group = self.heads // self.groups
        k = k[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
        v = v[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / self.d**0.5
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
        weights = self.dropout(scores.softmax(-1))
        return self.out((weights @ v).transpose(1, 2).contiguous().view(b, t, -1))


def same_draw(module: nn.Module, value: torch.Tensor, call) -> float:
    """Return the relative difference of <out, g> and <value, d value>, for a call that is linear in `value`."""
    out = call(value)
    g = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, value, g)
    a, b = (out.detach().double() * g).sum(), (value.detach().double() * grad).sum()
    return ((a - b).abs() / a.abs().clamp_min(1e-3)).item()


# -- a loop over chunks of queries ------------------------------------------------------------------
@pytest.mark.parametrize("train", [False, True])
def test_a_loop_over_chunks_of_queries_is_one_attention(train):
    check(ChunkedSelfAttention(48, 3, 16), rand(2, 153, 48), train=train, sites=1)


@pytest.mark.slow
def test_a_loop_over_chunks_of_queries_survives_inductor():
    check(ChunkedSelfAttention(48, 3, 64), rand(2, 153, 48), sites=1, inner="inductor")


# -- grouped heads, norms, LoRA -----------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_grouped_heads_with_normed_queries_and_lora_are_rewritten_without_expanding_the_heads(train, dtype):
    module = GroupedLoRAAttention(48, 6, 2).to(dtype)
    (site,) = check(
        module, rand(2, 37, 48, dtype=dtype), train=train, tolerance=None if dtype == torch.float32 else 5e-2
    )
    assert (site.dims["H"], site.dims["G"]) == (6, 2)


def test_only_the_lora_weights_get_gradients():
    module = GroupedLoRAAttention(48, 6, 2)
    compiled(module)(rand(2, 37, 48)).square().sum().backward()
    learned = {name for name, p in module.named_parameters() if p.grad is not None}
    assert learned == {"q.down.weight", "q.up.weight", "v.down.weight", "v.up.weight"}
    assert all(p.grad.abs().max() > 0 for p in module.parameters() if p.grad is not None)


def test_a_training_step_moves_the_lora_weights_as_eager_does():
    torch.manual_seed(3)
    mine, theirs = GroupedLoRAAttention(48, 6, 2), GroupedLoRAAttention(48, 6, 2)
    theirs.load_state_dict(mine.state_dict())
    x = rand(2, 37, 48)
    for module, call in ((mine, compiled(mine)), (theirs, theirs)):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for name, p in mine.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-4, atol=1e-6)


# -- masks, a given scale, dropout --------------------------------------------------------------------
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("train", [False, True])
def test_a_causal_flag_and_a_given_scale_are_lifted(train, scale):
    module = MaskedAttention(32, 4, scale=scale).train(train)
    (site,) = check(module, rand(2, 29, 32), kwargs={"is_causal": True}, train=train)
    assert "causal" in site.mask


@pytest.mark.parametrize("train", [False, True])
def test_a_custom_bool_mask_is_lifted(train):
    keep = torch.rand(29, 29) > 0.4
    keep[..., 0] = True
    check(MaskedAttention(32, 4).train(train), rand(2, 29, 32), keep, train=train)


@pytest.mark.parametrize("train", [False, True])
def test_a_custom_additive_mask_is_lifted_and_gets_its_gradient(train):
    check(MaskedAttention(32, 4).train(train), rand(2, 29, 32), rand(2, 4, 29, 29), train=train)


def test_a_causal_and_a_custom_mask_at_once():
    check(MaskedAttention(32, 4), rand(2, 29, 32), rand(29, 29), kwargs={"is_causal": True})


@pytest.mark.slow
def test_dropout_in_training_keeps_the_expectation_and_the_draw():
    q, k = rand(2, 4, 29, 8), rand(2, 4, 29, 8)
    v = rand(2, 4, 29, 8).requires_grad_()
    with new_reports() as filed:
        fast = compiled(lambda v: attention(q, k, v, dropout_p=0.2, is_causal=True))
        assert same_draw(nn.Identity(), v, fast) < 1e-4
    assert [s.spec.dropout for r in filed for s in r.rewritten] == [0.2]
    with torch.no_grad():
        mean = torch.stack([fast(v) for _ in range(400)]).mean(0)
        torch.testing.assert_close(mean, attention(q, k, v, is_causal=True), rtol=0, atol=0.3)


def test_dropout_is_absent_in_inference():
    (site,) = check(MaskedAttention(32, 4, dropout=0.3).eval(), rand(2, 29, 32), train=False)
    assert site.spec.dropout == 0


# -- RoPE, grouped heads, cache -------------------------------------------------------------------------
@pytest.mark.parametrize("dynamic", [None, True])
def test_rotary_grouped_attention_trains(dynamic):
    *_, site = check(
        CachedAttention(32, 4, 2, 64), rand(2, 23, 32), dynamic=dynamic, sites=2 if dynamic else 1
    )  # Dynamo may compile twice
    assert site.rewritten
    assert (str(site.dims["H"]), str(site.dims["G"])) == ("4", "2")


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_decoding_with_a_cache_gives_what_the_whole_sequence_gives(inner):
    module = CachedAttention(32, 4, 2, 24).eval()
    module.open_cache(2)
    x = rand(2, 11, 32)
    want = CachedAttention.forward(module, x)
    fast = compiled(module, inner=inner)
    with torch.no_grad(), new_reports() as filed:
        parts = [fast(x[:, :8], input_pos=torch.arange(8))]
        parts += [fast(x[:, n : n + 1], input_pos=torch.tensor([n])) for n in range(8, 11)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-4, atol=1e-5)
    assert all(len(r.rewritten) == 1 and not r.kept for r in filed)
    assert module.keys[:, :, 11:].abs().max() == 0


def test_an_inference_mask_that_is_given_replaces_the_causal_one():
    module = CachedAttention(32, 4, 2, 24).eval()
    module.open_cache(2)
    keep = torch.arange(24)[None, :].expand(5, 24) < 3
    fast, x, at = compiled(module), rand(2, 5, 32), torch.arange(5)
    with torch.no_grad():
        got = fast(x, keep, input_pos=at)
        assert error([got.double()], [module(x, keep, input_pos=at).double()]) < 1e-5
        assert error([got.double()], [module(x, input_pos=at).double()]) > 1e-2


def test_dropout_runs_in_training_only():
    module = CachedAttention(32, 4, 2, 64, dropout=0.5)
    fast, x = compiled(module), rand(2, 23, 32)
    with new_reports() as filed, torch.no_grad():
        module.train()
        assert not torch.equal(fast(x), fast(x))
        module.eval()
        assert error(run(fast, [x], False), run(module, [x], False)) < 1e-5
    assert [s.spec.dropout for r in filed for s in r.rewritten] == [0.5, 0.0]


def test_the_length_check_still_raises():
    module = CachedAttention(32, 4, 2, 16)
    fast = compiled(module)
    fast(rand(2, 16, 32))
    with pytest.raises(ValueError, match="longer than 16"):
        fast(rand(2, 17, 32))
