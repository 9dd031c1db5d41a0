"""Match attention without a batch dimension, and leave layers that look like it alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import assert_kept, assert_right, check, rand


def test_attention_of_one_sequence():
    def fn(x, wq, wk, wv):
        q, k, v = x @ wq, x @ wk, x @ wv
        s = q @ k.T / q.shape[-1] ** 0.5
        return s.masked_fill(torch.ones(len(x), len(x)).triu(1) > 0, float("-inf")).softmax(1) @ v

    (site,) = check(fn, rand(40, 16), *(rand(16, 8) * 0.3 for _ in range(3)))
    assert site.mask == "causal"


def test_attention_of_matrices_that_are_inputs():
    check(lambda q, k, v: (q @ k.T).softmax(-1) @ v, rand(24, 8), rand(30, 8), rand(30, 12))


def test_products_written_as_layers_without_a_bias():
    check(lambda q, k, v: F.linear(F.linear(q, k).softmax(-1), v.T), rand(24, 8), rand(30, 8), rand(30, 12))


def test_a_tensor_that_is_added_to_the_product_of_matrices():
    def fn(q, k, v, bias):
        return torch.addmm(bias, q, k.T, beta=0.5, alpha=2).softmax(-1) @ v

    (site,) = check(fn, rand(24, 8), rand(30, 8), rand(30, 12), rand(30))
    assert str(site.spec) == "score   (2 * dot) + (0.5 * c0[j])"


def test_a_tensor_that_is_added_to_the_weighted_values_is_not_lost():
    assert_right(lambda q, k, v, x: torch.addmm(x, (q @ k.T).softmax(-1), v), rand(24, 8), rand(30, 8), rand(30, 12),
                 rand(24, 12))  # fmt: skip


def test_one_key_in_an_einsum():
    def fn(q, k, v):
        return torch.einsum("bhij,bhje->bhie", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.5).softmax(-1), v)

    (site,) = check(fn, rand(2, 3, 6, 4), rand(2, 3, 1, 4), rand(2, 3, 1, 5))
    assert str(site.spec) == "score   0.5 * dot"


def test_attention_of_matrices_with_symbolic_sizes():
    check(lambda q, k, v: (q @ k.T).softmax(-1) @ v, rand(24, 8), rand(30, 8), rand(30, 12), dynamic=True)


def test_the_fused_operator_on_matrices():
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *(rand(24, 8) for _ in range(3)))


SHARED_QUERIES = {
    "matmul": lambda q, k: q @ k.mT,
    "einsum": lambda q, k: torch.einsum("nd,bdm->bnm", q, k.mT),
    "layer": lambda q, k: F.linear(k, q).transpose(1, 2),
    "of all heads": lambda q, k: (k.tanh() @ q.T * 0.5).permute(0, 2, 1),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scores", SHARED_QUERIES.values(), ids=SHARED_QUERIES)
def test_queries_that_the_whole_batch_shares(scores, dynamic):
    x = rand(6, 8), rand(3, 21, 8), rand(3, 21, 5)
    check(lambda q, k, v: scores(q, k).softmax(-1) @ v, *x, dynamic=dynamic)


def test_queries_of_which_one_is_a_parameter_and_keys_are_masked():
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.keys = nn.Parameter(rand(5, 8)), nn.Linear(8, 8)

        def forward(self, x, keep):
            s = torch.matmul(self.queries, self.keys(x).transpose(1, 2)).masked_fill(~keep[:, None], float("-inf"))
            return s.softmax(-1) @ x

    check(Pooling(), rand(2, 19, 8), torch.arange(19).expand(2, 19) < torch.tensor([[19], [11]]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_values_that_the_whole_batch_shares(dynamic):
    """Expected coordinates."""
    x = rand(2, 20, 8), rand(2, 22, 8), rand(22, 2)
    check(lambda q, k, grid: (q @ k.mT).softmax(-1) @ grid, *x, dynamic=dynamic)


def test_queries_and_values_that_the_whole_batch_shares():
    check(lambda q, k, grid: (q @ k.mT).softmax(-1) @ grid, rand(6, 8), rand(2, 22, 8), rand(22, 2))


@pytest.mark.parametrize("over", [1, 2])
def test_slots_that_pool_tokens_and_a_router_over_them(over):
    """The weights of a pool are an attention. Over the slots, the same product is a router."""
    sites = assert_right(lambda x, slots: (x @ slots).softmax(over).transpose(1, 2) @ x, rand(2, 21, 8), rand(8, 5))
    assert [s.rewritten for s in sites] == [True] * (over == 1)


def test_weights_that_the_whole_batch_shares_are_kept():
    """As an attention, each element of the batch would compute them again."""
    sites = assert_right(lambda a, b, x: (a @ b.T).relu().softmax(1) @ x, rand(9, 4), rand(9, 4), rand(2, 9, 6))
    assert not sites


def test_layers_behind_weights_of_pairs_are_kept():
    """The rows of the layer are not the keys."""
    sites = assert_right(lambda q, k, w: (q @ k.mT).softmax(1) @ w, rand(2, 12, 8), rand(2, 12, 8), rand(12, 5))
    assert not any(s.rewritten for s in sites)


def test_layers_of_input_matrices_are_not_attention():
    sites = assert_right(lambda x, a, b: torch.relu(x @ a) @ b, rand(24, 8), rand(8, 32), rand(32, 8))
    assert not any(s.rewritten for s in sites)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Parameter(rand(8, 6)), nn.Parameter(rand(6, 8))

    def forward(self, x):
        return (x @ self.gate).softmax(-1) @ self.experts


def test_a_router_of_parameters_is_kept():
    assert_kept(Router(), rand(24, 8), code="shared_keys")
