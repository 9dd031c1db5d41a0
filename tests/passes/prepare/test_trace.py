"""Trace a graph to ATen without running it, and leave operators outside an attention unchanged."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import check, compiled, new_reports, qkv, rand

SCALE = 0.3


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


# -- other operators in the graph ---------------------------------------------------------------------
def test_a_custom_operator_beside_the_attention_is_left_alone():
    with torch.library._scoped_library("attnfx_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", lambda x: torch.empty_like(x), "Meta")

        def fn(q, k, v):
            return torch.ops.attnfx_test.twice(attend(q, k, v))

        check(fn, *qkv(), train=False)


def test_an_embedding_with_a_padding_index_keeps_its_gradient():
    def fn(table, ids, w):
        x = F.embedding(ids, table, padding_idx=0)
        q = (x @ w).unsqueeze(1)
        return attend(q, q, q)

    check(fn, rand(11, 8), torch.arange(24).view(2, 12) % 11, rand(8, 8))


def test_a_model_in_which_random_numbers_are_drawn_draws_as_many():
    def fn(q, k, v):
        return attend(q, k, v) + 0 * torch.rand(3).sum(), torch.rand(2)

    q, k, v = qkv()
    torch.manual_seed(5)
    got = compiled(fn)(q, k, v)[1]
    torch.manual_seed(5)
    assert torch.equal(got, fn(q, k, v)[1])


# -- operators recorded without being run ---------------------------------------------------------
def everything_direct(x, y, w, b, n, h):
    linear = F.linear(F.linear(x, w, b), w)
    mixed = linear * 2 + n - 0.5 * y / n
    mixed += x
    return torch.matmul(-mixed, y.mT), torch.tanh(mixed).mT.contiguous() * torch.rsqrt(y * y + 1).mT, h * n + h, n / 3


def recorded(monkeypatch, direct, autocast):
    """Return (operator, shape, dtype, strides) of each node of the trace."""
    from attnfx.passes.prepare import trace

    if not direct:
        monkeypatch.setattr(trace, "DIRECT", {})
    seen, original = [], trace.run

    def spy(graph):
        made = original(graph)
        for n in graph.gm.graph.nodes:
            held = n.meta.get("val")
            facts = (held.shape, held.dtype, held.stride()) if isinstance(held, torch.Tensor) else ()
            seen.append((str(n.target), *facts, "test_trace.py" in n.meta.get("stack_trace", "")))
        return made

    monkeypatch.setattr(trace, "run", spy)
    args = (rand(2, 4, 6), rand(2, 4, 6), rand(6, 6), rand(6), torch.arange(6), rand(6, dtype=torch.float16))

    def fn(*args):
        q = args[0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return attend(q, q, q), *everything_direct(*args)

    with new_reports() as filed:
        compiled(fn)(*args)
    torch._dynamo.reset()
    monkeypatch.undo()
    assert filed[0].sites
    return seen


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_recorded_without_being_run_is_what_running_it_records(monkeypatch, autocast):
    assert recorded(monkeypatch, True, autocast) == recorded(monkeypatch, False, autocast)


def test_what_was_not_run_can_be_changed_in_place():
    def fn(q, k, v, w):
        q = q * w
        q += 1
        return attend(q, k, v)

    check(fn, *qkv(), rand(8))


@pytest.mark.slow
def test_contiguous_is_kept_where_it_changes_nothing():
    """A compiler may give its operand other strides than eager does, as Inductor does to this `cat`."""

    def fn(x, nothing):
        made = torch.cat([x.transpose(1, 2), nothing], -1).contiguous()
        q = made.view(8, 5, 4)
        return (q @ q.mT).softmax(-1) @ q

    check(fn, rand(2, 5, 4, 4), rand(2, 4, 5, 0), train=False, inner="inductor")
