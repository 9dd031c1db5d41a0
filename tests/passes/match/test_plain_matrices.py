"""Match attention without a batch dimension, and leave layers that look like it alone."""

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


def test_attention_of_matrices_with_symbolic_sizes():
    check(lambda q, k, v: (q @ k.T).softmax(-1) @ v, rand(24, 8), rand(30, 8), rand(30, 12), dynamic=True)


def test_the_fused_operator_on_matrices():
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *(rand(24, 8) for _ in range(3)))


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
