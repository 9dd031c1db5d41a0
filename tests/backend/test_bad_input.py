"""Handle odd options, models and inputs: an error before compiling, a note, one warning, or eager's own behavior."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch

from attnfx.errors import OptionError
from tests.support import check, compiled, error, new_reports, qkv, rand, run

SCALE = 0.3
INF = float("-inf")


def attend(q, k, v):
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def causal(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    return ((q @ k.mT) * SCALE).masked_fill(j > i, INF).softmax(-1) @ v


# -- options ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"rewrit": "always"}, "'rewrite'"),
        ({"rewrite": "allways"}, "'always'"),
        ({"inner": "inducter"}, "'inductor'"),
        ({"tiers": ["flsh"]}, "'flash'"),
        ({"strict": "tru"}, "True"),
    ],
)
def test_a_bad_option_names_the_nearest_valid_one_before_anything_is_compiled(monkeypatch, options, nearest):
    reached = []
    monkeypatch.setattr("attnfx.compiler.pipeline.run", lambda *a: reached.append(a))
    with pytest.raises(Exception, match=nearest) as caught:
        torch.compile(attend, backend="attnfx", options=options)(*qkv())
    assert isinstance(caught.value, OptionError) or "OptionError" in str(caught.value)
    assert reached == []


def test_an_environment_variable_sets_a_default_and_is_named_where_it_is_bad(monkeypatch):
    monkeypatch.setenv("ATTNFX_REWRITE", "nver")
    with pytest.raises(Exception, match=r"ATTNFX_REWRITE.*'never'"):
        torch.compile(attend, backend="attnfx")(*qkv())


# -- models that cannot be traced -----------------------------------------------------------------------
def test_a_model_that_cannot_be_traced_is_compiled_as_it_is(monkeypatch):
    """For a graph that only Dynamo can handle, there is a note or one warning, and the result is right."""
    from attnfx.passes.fx.examples import Untraceable

    def fail(*_):
        raise Untraceable("an operator that is unknown")

    monkeypatch.setattr("attnfx.passes.prepare.trace.run", fail)
    with new_reports() as filed, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        args = qkv()
        torch.testing.assert_close(compiled(attend, inner="inductor")(*args), attend(*args))
    ours = [w for w in seen if "attnfx" in str(w.message)]
    assert len(ours) <= 1
    assert ours or any("an operator that is unknown" in note for report in filed for note in report.notes)


def test_a_sparse_input_beside_the_attention_is_no_obstacle():
    def fn(q, k, v, s, x):
        return attend(q, k, v), torch.sparse.mm(s, x)

    s, x = torch.eye(4).to_sparse(), rand(4, 4)
    args = qkv()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        got = compiled(fn)(*args, s, x)
    torch.testing.assert_close(got[0], attend(*args))
    torch.testing.assert_close(got[1], x)


# -- values -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("fn", [attend, causal])
def test_nan_and_inf_in_live_positions_spread_as_in_eager(fn, which, bad):
    args = qkv(t=24)
    args[which][1, 2, 0, 3] = bad  # key 0 is live for every query of a causal mask
    check(fn, *args, train=False)


def test_scores_that_overflow_float16_become_infinite_as_in_eager():
    q, k, v = (x.half() for x in qkv(t=24, d=16))
    q, k = q * 200, k * 200  # products beyond 65504
    assert attend(q, k, v).isnan().any()
    check(attend, q, k, v, train=False, exact=False)


def test_scores_near_float16s_range_stay_finite_as_in_eager():
    q, k, v = (x.half() for x in qkv(t=24, d=16))
    q, k = q * 30, k * 30
    assert not attend(q, k, v).isnan().any()
    check(attend, q, k, v, train=False, exact=False, tolerance=2e-2)


def test_a_row_without_a_live_key_is_nan_in_training_as_well():
    def fn(q, k, v, keep):
        return ((q @ k.mT) * SCALE).masked_fill(~keep, INF).softmax(-1) @ v

    keep = torch.ones(24, 24, dtype=torch.bool)
    keep[5] = False
    q, k, v = qkv(t=24)
    got, want = compiled(fn)(q, k, v, keep), fn(q, k, v, keep)
    assert torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any()
    torch.testing.assert_close(got.nan_to_num(), want.nan_to_num())


def test_large_scores_do_not_overflow_the_exponential():
    q, k, v = qkv(t=24)
    check(attend, q * 100, k * 100, v, train=False)


# -- sizes --------------------------------------------------------------------------------------------------
SHAPES = {
    "an empty batch": dict(b=0, t=9),
    "no queries": dict(t=0, s=9),
    "one query": dict(t=1, s=9),
    "one key": dict(t=9, s=1),
    "one of each": dict(t=1, s=1),
    "one head": dict(h=1, t=9),
    "one batch": dict(b=1, t=9),
    "all ones": dict(b=1, h=1, t=1, s=1, d=1),
    "head dim one": dict(t=9, d=1),
    "an odd head dim": dict(t=9, d=7),
    "odd lengths": dict(t=131, s=257),
    "a long key side": dict(t=3, s=1021),
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fn", [attend, causal])
def test_sizes_at_the_edge_give_what_eager_gives(fn, sizes):
    check(fn, *qkv(**sizes), tolerance=1e-3)  # if a gradient is zero, only rounding is compared


@pytest.mark.parametrize("fn", [attend, causal])
@pytest.mark.parametrize("dynamic", [None, True])
def test_no_keys_at_all_give_zeros_as_in_eager(fn, dynamic):
    check(fn, *qkv(t=9, s=0), sites=2 if dynamic else 1, dynamic=dynamic)


@pytest.mark.slow
def test_sizes_at_the_edge_of_one_dynamic_compilation_are_right():
    fast = compiled(causal, dynamic=True)
    for sizes in (dict(t=17), dict(t=1), dict(b=1, t=5), dict(b=0, t=5), dict(t=3, s=0), dict(t=129, s=257)):
        args = qkv(**sizes)
        assert error(run(fast, args, False), run(causal, args, False)) < 1e-5, sizes


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_the_edges_of_sizes_survive_inductor(inner):
    check(causal, *qkv(b=1, t=1, s=3), inner=inner)


# -- layouts ------------------------------------------------------------------------------------------------
def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "last dimension not contiguous":
        return x.mT.contiguous().mT
    if how == "every second element":
        return x.repeat_interleave(2, dim=3)[..., ::2]
    if how == "zero stride over the batch":
        return x[:1].expand_as(x)
    if how == "zero stride over heads and rows":
        return x[:, :1, :1].expand_as(x)
    assert how == "an offset into a larger tensor"
    return torch.nn.functional.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2]


LAYOUTS = [
    "transposed",
    "last dimension not contiguous",
    "every second element",
    "zero stride over the batch",
    "zero stride over heads and rows",
    "an offset into a larger tensor",
]


@pytest.mark.parametrize("how", LAYOUTS)
def test_strided_inputs_give_what_eager_gives(how):
    args = [strided(x, how) for x in qkv(t=24)]
    assert not args[0].is_contiguous()
    fast = compiled(causal)
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), causal(*args))
    leaves = [x.clone().requires_grad_() for x in qkv(t=24)]
    fast(*[strided(x, how) for x in leaves]).square().sum().backward()
    mine = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    causal(*[strided(x, how) for x in leaves]).square().sum().backward()
    for got, x in zip(mine, leaves):
        torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 24, 24), (2, 1, 1, 24), (1, 4, 1, 1), (24, 1), ()])
def test_a_bias_broadcasts_along_any_dimension(shape):
    def fn(q, k, v, bias):
        return ((q @ k.mT) * SCALE + bias).softmax(-1) @ v

    check(fn, *qkv(t=24), torch.randn(shape))


def test_a_bias_expanded_with_zero_strides_is_read_as_it_is():
    def fn(q, k, v, bias):
        return ((q @ k.mT) * SCALE + bias).softmax(-1) @ v

    q, k, v = qkv(t=24)
    bias = rand(2, 1, 1, 24).expand(2, 4, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(q, k, v, bias), fn(q, k, v, bias))


def test_the_output_has_eagers_strides():
    def fn(q, k, v):
        return attend(q, k, v).transpose(1, 2)

    args = qkv(t=24)
    assert compiled(fn)(*args).stride() == fn(*args).stride()


def test_one_tensor_as_query_key_and_value():
    check(lambda x: ((x @ x.mT) * SCALE).softmax(-1) @ x, rand(2, 4, 24, 8))


# -- threads and processes --------------------------------------------------------------------------------------
def test_two_threads_compile_at_once():
    outcomes: dict[int, float] = {}

    def work(n: int) -> None:
        def fn(q, k, v):
            return ((q @ k.mT) * (0.1 * (n + 1))).masked_fill(torch.arange(k.shape[2]) > 20 + n, INF).softmax(-1) @ v

        args = [rand(2, 4, 30 + n, 8, seed=n * 3 + m) for m in range(3)]
        outcomes[n] = error(run(compiled(fn), args, True), run(fn, args, True))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert sorted(outcomes) == [0, 1]
    assert max(outcomes.values()) < 1e-5


FORK = """
import os, torch
import attnfx.backend, attnfx.kernels.operators.attention
def fn(q, k, v):
    return ((q @ k.mT) * 0.3).softmax(-1) @ v
args = [torch.randn(1, 2, 8, 4) for _ in range(3)]
child = os.fork()
out = torch.compile(fn, backend="attnfx", options={"rewrite": "always", "inner": "aot_eager"})(*args)
torch.testing.assert_close(out, fn(*args))
import attnfx.report.report
assert len(attnfx.report.report.reports()[-1].rewritten) == 1
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child failed"
"""


@pytest.mark.slow
def test_a_process_that_forks_after_the_import_compiles_in_both_halves():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
