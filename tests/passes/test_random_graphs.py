"""Compile random attentions of many classes: nothing fails, and each rewrite matches eager."""

import pytest

from tests.passes.random_graphs import FORMS, hold, program

pytestmark = pytest.mark.slow

SEEDS = range(48)


@pytest.mark.parametrize("first", SEEDS[::8])
def test_what_is_rewritten_gives_what_eager_gives(first):
    for seed in range(first, first + 8):
        hold(seed)


def test_all_classes_are_frequent():
    names = [program(seed).name.split(":")[0] for seed in range(1000)]
    assert all(names.count(name) >= 10 for name in FORMS)
