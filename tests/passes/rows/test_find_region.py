"""Run attention that needs whole rows of scores in chunks of rows, unless its rows mix."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import assert_kept, check, compiled, new_reports, qkv, rand

T, S = 40, 56


def inputs(**sizes):
    return qkv(**{"t": T, "s": S, **sizes})


def scores_of(q, k):
    return (q @ k.mT) * 0.3


def talking_heads(q, k, v):
    mix = torch.eye(4, dtype=q.dtype) + 0.1
    s = torch.einsum("bhqk,hg->bgqk", scores_of(q, k), mix).softmax(-1)
    return torch.einsum("bhqk,hg->bgqk", s, mix) @ v


def heads_mixed_by_a_product(q, k, v):
    mix = torch.ones(4, 4, dtype=q.dtype).tril()
    s = (scores_of(q, k).permute(0, 2, 3, 1) @ mix).permute(0, 3, 1, 2)
    return s.softmax(-1) @ v


def heads_mixed_by_a_convolution(q, k, v):
    mix = (torch.eye(4, dtype=q.dtype) + 0.2).view(4, 4, 1, 1)
    return F.conv2d(F.conv2d(scores_of(q, k), mix).softmax(-1), mix) @ v


def best_keys(q, k, v):
    s = scores_of(q, k)
    return s.masked_fill(s < s.topk(8, dim=-1).values[..., -1:], float("-inf")).softmax(-1) @ v


def best_keys_scattered(q, k, v):
    s = scores_of(q, k)
    best, where = s.topk(8, dim=-1)
    return torch.full_like(s, float("-inf")).scatter(-1, where, best).softmax(-1) @ v


def sparsemax(q, k, v):
    s = scores_of(q, k)
    z = s.sort(-1, descending=True).values
    n = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    total = z.cumsum(-1)
    support = (1 + n * z > total).sum(-1, keepdim=True)
    tau = (total.gather(-1, support - 1) - 1) / support
    return (s - tau).clamp_min(0) @ v


def entmax_by_bisection(q, k, v):
    s = scores_of(q, k) * 0.5
    low = s.amax(-1, keepdim=True) - 1
    with_half = low
    for n in range(8):
        mid = with_half + 0.5 ** (n + 1)
        mass = (s - mid).clamp_min(0).square().sum(-1, keepdim=True)
        with_half = torch.where(mass >= 1, mid, with_half)
    p = (s - with_half.detach()).clamp_min(0).square()
    return (p / p.sum(-1, keepdim=True)).sort(-1).values.softmax(-1) @ v


def gated(q, k, v):
    s = scores_of(q, k)
    return (s.softmax(-1) * torch.sigmoid(s.mean(-1, keepdim=True))) @ v


def two_weights_combined(q, k, v):
    place = -(torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs().to(q.dtype)
    gate = torch.sigmoid(torch.arange(4, dtype=q.dtype)).view(1, -1, 1, 1)
    w = (1 - gate) * scores_of(q, k).softmax(-1) + gate * place.softmax(-1)
    return (w / w.sum(-1, keepdim=True)) @ v


def difference(q, k, v):
    (a, b), (c, d) = q.chunk(2, -1), k.chunk(2, -1)
    return (scores_of(a, c).softmax(-1) - 0.4 * scores_of(b, d).softmax(-1)) @ v


def heads_normalised(q, k, v):
    w = scores_of(q, k).softmax(-1).permute(0, 2, 3, 1)
    return F.layer_norm(w, (4,)).permute(0, 3, 1, 2) @ v


def merged_batches(q, k, v):
    b, h, t, d = q.shape
    s = torch.bmm(q.reshape(b * h, t, d), k.reshape(b * h, -1, d).mT).view(b, h, t, -1)
    s = s - s.mean(1, keepdim=True)
    return torch.bmm(s.softmax(-1).reshape(b * h, t, -1), v.reshape(b * h, -1, d)).view(b, h, t, d)


def causal(q, k, v):
    keep = torch.arange(q.shape[2])[:, None] + 16 >= torch.arange(k.shape[2])
    s = scores_of(q, k).masked_fill(~keep, float("-inf"))
    return torch.stack([s.softmax(-1), (2 * s).softmax(-1)]).amax(0) @ v


def triangle(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(2)
    s = scores_of(q, k).where(keep, float("-inf"))
    return s.sort(-1).values.softmax(-1) @ v


def heads_moved_and_tiled(q, k, v):
    w = scores_of(q, k).softmax(-1)
    mean = w.movedim(1, -1).mean(-1).unsqueeze(1).tile(1, 4, 1, 1)
    return (w - 0.5 * mean.broadcast_to(w.shape)).sort(-1).values @ v


FORMS = [talking_heads, heads_mixed_by_a_product, heads_mixed_by_a_convolution, best_keys, best_keys_scattered,
         sparsemax, entmax_by_bisection, gated, two_weights_combined, difference, heads_normalised, merged_batches,
         causal, triangle, heads_moved_and_tiled]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", FORMS, ids=[fn.__name__ for fn in FORMS])
def test_whole_rows_run_in_chunks(fn, dynamic, shapes_left):
    (site,) = check(fn, *inputs(), dynamic=dynamic)
    assert (site.decision.tier, site.decision.kernel, site.refusal) == ("chunked", "rows", None)
    assert not [s for s in shapes_left if T in s and S in s]


def test_a_mask_that_is_given_is_read_and_rows_without_a_key_are_as_in_eager():
    def fn(q, k, v, keep):
        s = scores_of(q, k).masked_fill(~keep[:, None], float("-inf"))
        return torch.einsum("bhqk,hg->bgqk", s.softmax(-1), torch.eye(4, dtype=q.dtype)) @ v

    keep = torch.rand(2, T, S, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[0, 5:9] = False
    check(fn, *inputs(), keep, train=False)


def test_weights_that_are_returned_come_from_the_same_pass(shapes_left):
    def fn(q, k, v):
        w = torch.einsum("bhqk,hg->bgqk", scores_of(q, k).softmax(-1), torch.eye(4, dtype=q.dtype) + 0.1)
        return w @ v, w, w.mean(1)

    check(fn, *inputs())
    assert shapes_left.count((2, 4, T, S)) == 1


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_forward_and_backward_draw_the_same_dropout(inner):
    """The output is linear in the values, so <out, g> is <v, dv> only for the same dropout."""

    def fn(q, k, v):
        return F.dropout(talking(scores_of(q, k)), 0.4, True) @ v

    def talking(s):
        return torch.einsum("bhqk,hg->bgqk", s.softmax(-1), torch.eye(4) + 0.1)

    q, k, v = inputs()
    v.requires_grad_()
    run = compiled(fn, inner=inner)
    torch.manual_seed(5)
    out = run(q, k, v)
    g = rand(*out.shape)
    out.backward(g)
    torch.testing.assert_close((out * g).sum(), (v * v.grad).sum(), rtol=1e-4, atol=1e-3)
    torch.manual_seed(5)
    assert torch.equal(run(q, k, v), out)
    assert not torch.equal(run(q, k, v), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype):
    check(best_keys, *(x.to(dtype) for x in inputs()), exact=False)


@pytest.mark.slow
def test_the_cost_rule_leaves_small_scores_and_weights_that_are_returned():
    def weights_too(q, k, v):
        w = talking_heads(q, k, torch.eye(k.shape[2]))
        return w @ v, w

    cases = (talking_heads, T, "pay off only from 64 MiB"), (talking_heads, 2048, "MiB"), (weights_too, T, "")
    for train in (False, True):
        for fn, size, word in cases:
            torch._dynamo.reset()
            with new_reports() as filed:
                compiled(fn, rewrite="cost")(*(x.requires_grad_(train) for x in qkv(b=1, t=size, s=size)))
            (site,) = filed[0].sites[-1:]
            assert site.rewritten == (size == 2048) and word in site.decision.reason
            assert not site.rewritten or site.decision.kernel == "rows compiled"


# -- operands written in place -------------------------------------------------------------------------
def written_operands(q, k, v):
    q, keep = q * 1.0, torch.zeros(T, S, dtype=torch.bool)
    q[..., :4] += q[..., 4:] * 0.5
    keep[:, :9] = True
    keep.fill_diagonal_(True)
    return talking_heads(q, k, v), scores_of(q, k).masked_fill(~keep, float("-inf")).sort(-1).values.softmax(-1) @ v


def one_key_written(q, k, v):
    s = scores_of(q, k)
    s[..., -1] += q[..., 0]
    return s.softmax(-1) @ v


def row_and_itself(q, k, v):
    s = torch.cat([scores_of(q, k), (q * v[:, :, :T]).sum(-1, keepdim=True)], -1).softmax(-1)
    return s[..., :-1] @ v + s[..., -1:] * v[:, :, :T]


def written_scores(q, k, v):
    s = scores_of(q, k)
    s[..., :5] += 1.0
    s[..., 7] = s[..., 8] * 0.5
    return s.sort(-1).values.softmax(-1) @ v


@pytest.mark.parametrize(
    ("fn", "sites"), [(written_operands, 2), (written_scores, 1), (one_key_written, 1), (row_and_itself, 1)]
)
def test_writes_before_the_first_read_are_read(fn, sites):
    check(fn, *inputs(), sites=sites)


def test_a_write_after_the_first_read_is_refused():
    def fn(q, k, v):
        q = q * 1.0
        s = scores_of(q, k)
        q[..., :4] += 1.0
        return s.sort(-1).values.softmax(-1) @ v, q

    assert_kept(fn, *inputs(), code="rows_mixed", train=False)


def written_result(q, k, v):
    w = torch.cat([q @ k[:, :, :4].mT, q @ k.mT], -1).softmax(-1)
    out = w[..., 4:] @ v
    out.mul_(2)
    return out


def one_of_several(q, k, v):
    bias, factor = torch.stack([q[0, :2, :, :1] * 0.1, q[0, :2, :, 1:2].sigmoid()]).expand(2, 2, T, S).unbind(0)
    w = (scores_of(q, k)[:, :2] + bias).softmax(-1) * factor
    return (w / w.sum(-1, keepdim=True)) @ v[:, :2]


def sums_of_a_mask(q, k, v):
    keep = torch.ones(T, S).tril(-3).bool()
    w = scores_of(q, k).masked_fill(~keep, -1e9).softmax(-1)
    return w.masked_fill(keep.sum(-1, keepdim=True) < 1, 0.0) @ v


def decays_divided_by_their_sums(q, k, v):
    decay = torch.ones(T, S, dtype=q.dtype).tril()
    s = scores_of(q, k) * (decay / decay.sum(-1, keepdim=True).sqrt())
    return (s / s.abs().sum(-1, keepdim=True).clamp(min=1)) @ v


@pytest.mark.parametrize("fn", [written_result, one_of_several, sums_of_a_mask, decays_divided_by_their_sums])
def test_what_is_made_beside_the_scores_stays_outside(fn):
    check(fn, *inputs())


# -- rows that mix -----------------------------------------------------------------------------------
def reversed_rows(s):
    return s.flip(-2).softmax(-1)


def rolled(s):
    return s.roll(1, -2).softmax(-1)


def summed_over_rows(s):
    return s.cumsum(-2).softmax(-1)


def centred_over_rows(s):
    return (s - s.mean((-2, -1), keepdim=True)).softmax(-1)


def batch_norm(s):
    return F.batch_norm(s, None, None, training=True).softmax(-1)


def sorted_rows(s):
    return s.softmax(-1).sort(-2).values


def written(s):
    s.view(-1)[3] = 0.0
    return s.softmax(-1).cumsum(-1)


def turned(s):
    return s[..., :T].mT.softmax(-1)


def merged_rows(s):
    return s.softmax(-1).flatten(2).sort(-1).values.view(s.shape)


def drawn(s):
    return (s - torch.rand_like(s)).sort(-1).values.softmax(-1)


def wide_convolution(s):
    return F.conv2d(s, torch.ones(4, 4, 3, 1, dtype=s.dtype) / 12, padding=(1, 0)).softmax(-1)


MIXED = {
    reversed_rows: "rows_mixed", rolled: "rows_mixed", summed_over_rows: "rows_mixed",
    centred_over_rows: "rows_mixed", batch_norm: "rows_mixed", sorted_rows: "no_values", written: "rows_mixed",
    merged_rows: "no_values", wide_convolution: "rows_mixed",
}  # fmt: skip


@pytest.mark.parametrize(("weights", "code"), MIXED.items(), ids=[fn.__name__ for fn in MIXED])
def test_rows_that_mix_are_refused(weights, code):
    assert_kept(lambda q, k, v: weights(scores_of(q, k)) @ v, *inputs(), code=code)


def test_a_draw_that_cannot_be_repeated_is_refused():
    with new_reports() as filed:
        compiled(lambda q, k, v: drawn(scores_of(q, k)) @ v)(*inputs())
    assert not any(site.rewritten for report in filed for site in report.sites)


def test_rows_and_columns_that_change_places_are_refused():
    def fn(q, k, v):
        w = scores_of(q, k).sort(-1).values.softmax(-1)
        return (w @ w.mT) @ v

    q, k, v = inputs(s=T)
    assert_kept(fn, q, k, v, code="rows_mixed")


def test_a_refusal_names_the_operator_that_mixes_rows():
    with new_reports() as filed:
        compiled(lambda q, k, v: rolled(scores_of(q, k)) @ v)(*inputs())
    (site,) = filed[0].sites
    assert site.refusal is not None and "roll" in str(site.refusal)


def test_values_of_each_rows_own():
    """Relative positions in the values (Shaw et al. 2018): rows of queries are a batch dim of the second product."""
    i = torch.arange(T)

    def fn(q, k, v, table):
        a = (q @ k.mT * 0.25).softmax(-1)
        near = table[(i[None] - i[:, None]).clamp(-4, 4) + 4]
        rows = a.permute(2, 0, 1, 3).reshape(T, -1, T) @ near
        return a @ v + rows.reshape(T, *a.shape[:2], -1).permute(1, 2, 0, 3)

    q, k, v = (torch.randn(2, 3, T, 8) for _ in range(3))
    check(fn, q, k, v, torch.randn(9, 8), sites=2)


# -- dimensions of the same size -------------------------------------------------------------------------
N = 16  # queries, keys, heads' width


def test_heads_that_talk_with_as_many_keys_as_a_head_is_wide():
    def fn(x, before, after):
        q, k, v = x.chunk(3, dim=-1)
        s = torch.einsum("bhij,hg->bgij", torch.einsum("bhid,bhjd->bhij", q, k) * 0.25, before)
        return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhij,hg->bgij", s.softmax(-1), after), v)

    (site,) = check(fn, rand(2, 4, N, 3 * N), rand(4, 4), rand(4, 4))
    assert site.dims == {"T": N, "S": N}


def test_queries_that_are_the_output_of_an_attention_with_as_many_keys_as_a_head_is_wide():
    def fn(q, k, v, before):
        for _ in range(2):
            s = torch.einsum("bhij,hg->bgij", q @ k.mT * 0.25, before)
            q = s.softmax(-1) @ v
        return q

    check(fn, rand(2, 4, N, N), rand(2, 4, N, N), rand(2, 4, N, N), rand(4, 4), sites=2)


def test_a_bias_that_is_a_sum_of_gathered_curves_is_computed_before():
    def fn(q, k, v, curves, distance):
        bias = curves.gather(-1, distance.expand(2, 2, 4, N, N)).sum(0)
        return ((q @ k.mT) * 0.25 + bias).softmax(-1) @ v

    (site,) = check(fn, *(rand(2, 4, N, 8) for _ in range(3)), rand(2, 2, 4, N, 40), torch.randint(40, (2, 1, 1, N, N)))
    assert site.decision is not None and site.decision.kernel != "rows"


def test_a_view_of_the_scores_that_is_returned_has_its_strides_for_symbolic_sizes():
    def fn(q, k, v):
        s = q @ k.mT
        return (s[:, 0] * s[:, 1]).softmax(-1) @ v[:, 0], s[:, 0]

    q, k, v = inputs(h=2)
    got, want = compiled(fn, dynamic=True)(q, k, v)[1], fn(q, k, v)[1]
    assert got.stride() == want.stride()


def test_an_input_that_is_only_compared_or_measured_takes_no_gradient():
    def fn(q, k, v, gate, mix):
        s = torch.where(gate > 0, scores_of(q, k), 0.0).softmax(-1)
        return torch.einsum("bhqk,hg->bgqk", s, torch.ones_like(mix)) @ v

    args = *inputs(), rand(T, S), rand(4, 4)
    (site,) = check(fn, *args)
    assert site.decision.kernel == "rows"
    leaves = [x.clone().requires_grad_() for x in args]
    compiled(fn)(*leaves).sum().backward()
    assert [x.grad is None for x in leaves] == [False, False, False, True, True]


def test_a_number_that_is_computed_from_one_read_off_a_tensor_is_passed_as_a_tensor():
    def fn(q, k, v, gain):
        s = scores_of(q, k) * (1 / (gain.item() + 1))
        return torch.einsum("bhqk,hg->bgqk", s.softmax(-1), torch.eye(4, dtype=q.dtype)) @ v

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        (site,) = check(fn, *inputs(), torch.tensor(1.7), train=False)
    assert site.decision.kernel == "rows"


def test_rows_that_are_the_weight_of_a_linear_layer():
    def fn(q, k, v):
        s = q @ k.T
        w = s.masked_fill(s < s.topk(4, -1).values[..., -1:], float("-inf")).softmax(-1)
        return F.linear(v.T, w)

    (site,) = check(fn, rand(T, 8), rand(20, 8), rand(20, 6))
    assert site.spec is None
