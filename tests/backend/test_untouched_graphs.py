"""Pass graphs without a rewrite to Inductor as Dynamo made them."""

import torch

from tests.support import compiled, qkv, rand

SCALE = 0.3


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def softmaxes(gm) -> int:
    """Count the softmax calls in a graph and its submodules."""
    names = [str(n.target) for m in gm.modules() if hasattr(m, "graph") for n in m.graph.nodes]
    return sum("softmax" in name for name in names)


def graphs_that_reach_inductor(monkeypatch, fn, *args, **options):
    """Return the graphs that Dynamo makes of `fn`, and the graphs that Inductor receives."""
    import torch._inductor.compile_fx as inductor

    from attnfx.compiler import pipeline

    made, got = [], []
    original_run, original_compile = pipeline.run, inductor.compile_fx
    monkeypatch.setattr(pipeline, "run", lambda gm, *a, **k: (made.append(gm), original_run(gm, *a, **k))[1])
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, *a, **k: (got.append(gm), original_compile(gm, *a, **k))[1])
    compiled(fn, inner="inductor", **options)(*args)
    return made, got


def test_a_graph_with_nothing_to_find_reaches_inductor_as_dynamo_made_it(monkeypatch):
    made, got = graphs_that_reach_inductor(monkeypatch, lambda x, w: torch.tanh(x @ w) + 1, rand(4, 8), rand(8, 8))
    assert len(made) == 1
    assert got[0] is made[0]


def test_a_graph_with_a_softmax_that_is_no_attention_reaches_inductor_as_dynamo_made_it(monkeypatch):
    made, got = graphs_that_reach_inductor(
        monkeypatch, lambda x, w: (x @ w).softmax(-1).log().mean(), rand(4, 8), rand(8, 8)
    )
    assert len(made) == 1
    assert got[0] is made[0]


def test_rewrite_never_hands_over_dynamos_own_graph(monkeypatch):
    made, got = graphs_that_reach_inductor(monkeypatch, attend, *qkv(), rewrite="never")
    assert got[0] is made[0]
    assert softmaxes(got[0]) == 1


def test_dynamos_graph_is_not_changed_by_a_rewrite(monkeypatch):
    made, got = graphs_that_reach_inductor(monkeypatch, attend, *qkv())
    assert got[0] is not made[0]
    assert softmaxes(made[0]) == 1
    assert softmaxes(got[0]) == 0


def test_a_vmap_that_draws_for_each_element_passes_through_untouched(monkeypatch):
    def fn(q, k, v):
        return torch.vmap(lambda *x: attend(*x) + 0 * torch.rand(()), randomness="different")(q, k, v)

    args = qkv()
    made, got = graphs_that_reach_inductor(monkeypatch, fn, *args)
    assert all(a is b for a, b in zip(made, got))
    torch.testing.assert_close(compiled(fn)(*args), fn(*args))


def test_func_grad_passes_through_untouched(monkeypatch):
    def fn(q, k, v):
        return torch.func.grad(lambda q: attend(q, k, v).square().sum())(q)

    args = qkv()
    made, got = graphs_that_reach_inductor(monkeypatch, fn, *args)
    assert all(a is b for a, b in zip(made, got))
    torch.testing.assert_close(compiled(fn)(*args), fn(*args), rtol=1e-4, atol=1e-5)
