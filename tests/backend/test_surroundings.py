"""Keep all code that attnfx does not rewrite unchanged, including the surroundings of a rewrite.

Random programs around attentions (tests/fuzz) must match eager in results with their dtypes, strides and aliases, in
gradients, in writes to inputs and buffers, and in the state of the generator. A finding is one line:
`python tests/fuzz/run.py --recipe "LINE"` replays it, and without a line the script continues the search.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from torch._ops import OpOverload
from torch.fx import GraphModule

from attnfx.compiler import pipeline
from tests.fuzz.hold import Outcome, hold
from tests.fuzz.parts import ATTENTIONS, EDITS, NEIGHBORS
from tests.fuzz.recipes import Recipe, Step, recipe, shrink

pytestmark = pytest.mark.slow

FIRST, GROUPS, SIZE = 10000, 10, 7
PARTS = [*NEIGHBORS, *EDITS, *ATTENTIONS]


def told(outcome: Outcome) -> str:
    return "\n  ".join([f"{outcome.verdict}: {outcome.recipe}", *outcome.told])


@pytest.mark.parametrize("group", range(GROUPS))
def test_nothing_changes_beside_an_attention(group):
    outcomes = [hold(recipe(FIRST + SIZE * group + n, "mixed")) for n in range(SIZE)]
    findings = [told(o) for o in outcomes if o.finding]
    assert not findings, "\n".join(findings)
    assert sum(o.rewritten > 0 for o in outcomes) >= SIZE // 2


# One recipe for each finding of the search.
HELD = "seed=1 {} dynamic=no inner={} tokens=8 inputs=plain entry=scaled | {}"
FOUND = {
    "an operand read through a write": ("train", "eager", "transpose_written | attend[operands=bare]"),
    "a write in the body of a function": ("train", "eager", "attend | function_in_place"),
    "a scatter in a backward pass": ("train", "eager", "function_scattering | attend"),
    "a write under no_grad": ("train", "eager", "attend | masked_set@no_grad"),
    "a part written under no_grad": ("train", "eager", "every_other_added@no_grad | softmax_over_batch | attend"),
    "numbers drawn for nothing": ("infer", "eager", "attend | draw_unread"),
    "a part added to": ("train", "aot_eager", "slice_added | attend"),
    "windows of two shapes": ("train", "eager", "windows_of_two_shapes"),
    "strides of a part of the scores": ("train", "eager", "attend[operands=one_key scores=part_returned]"),
    "a draw that is checkpointed": ("infer", "aot_eager", "noise_like@checkpointed | attend"),
    "the result written to": ("train", "eager", "attend[operands=one_head mixed=every_other_row]"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_away(name):
    outcome = hold(Recipe.parse(HELD.format(*FOUND[name])))
    assert outcome.verdict == "same" and outcome.rewritten, told(outcome)


def test_a_recipe_is_read_as_it_is_printed():
    for seed in range(300):
        made = recipe(seed, "mixed")
        assert Recipe.parse(str(made)) == made


@pytest.mark.parametrize("name", ["slice_added", "view_read_later", "library_masked"])
def test_a_recipe_holds_the_part_that_is_asked_for(name):
    made = recipe(5, only=name)
    assert any(name == s.name or name in dict(s.made).values() for s in made.steps)


def test_a_recipe_is_shrunk_to_what_is_needed():
    made = replace(recipe(3, "mixed"), dynamic="auto", steps=(*recipe(3).steps, Step("clamped", wraps=("no_grad",))))
    small = shrink(made, lambda r: any(s.name == "clamped" for s in r.steps))
    assert [str(s) for s in small.steps] == ["clamped"] and small.dynamic == "no" and small.inputs == "plain"


# -- the search finds planted faults ------------------------------------------------------------------------
def the_write_dropped(gm: GraphModule) -> None:
    """Drop the last write, as a dead code elimination would that misses an operator's side effect."""
    for n in reversed(gm.graph.nodes):
        if getattr(getattr(n.target, "_schema", None), "is_mutable", False):
            n.replace_all_uses_with(n.args[0])
            gm.graph.erase_node(n)
            return


def results_through(gm: GraphModule, target: OpOverload, *args: object) -> None:
    """Pass every result of the graph through one more operator."""
    out = gm.graph.output_node()
    with gm.graph.inserting_before(out):
        made = [gm.graph.call_function(target, (x, *args)) for x in out.args[0]]
    out.args = (tuple(made),)


def strides_lost(gm: GraphModule) -> None:
    results_through(gm, torch.ops.aten.contiguous.default)


def a_number_drawn(gm: GraphModule) -> None:
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(torch.ops.aten.rand.default, ([1],))


def views_copied(gm: GraphModule) -> None:
    results_through(gm, torch.ops.aten.clone.default)


def the_gradient_lost(gm: GraphModule) -> None:
    first = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    with gm.graph.inserting_after(first):
        made = gm.graph.call_function(torch.ops.aten.detach.default, (first,))
    first.replace_all_uses_with(made, delete_user_cb=lambda u: u is not made, propagate_meta=False)


def a_double_made(gm: GraphModule) -> None:
    results_through(gm, torch.ops.aten.to.dtype, torch.float64)


def it_fails(gm: GraphModule) -> None:
    raise ZeroDivisionError("planted")


HOW = "seed=1 train dynamic=no inner=eager tokens=9 inputs=plain entry=scaled"
PLANTED = {
    the_write_dropped: (f"{HOW} | attend | running_mean", {"state", "values"}),
    strides_lost: (f"{HOW} | attend | strides_returned", {"strides"}),
    a_number_drawn: (f"{HOW} | attend", {"generator"}),
    views_copied: (f"{HOW} | attend | view_returned", {"alias"}),
    the_gradient_lost: (f"{HOW} | attend", {"gradient"}),
    a_double_made: (f"{HOW} | attend", {"values", "type"}),
    it_fails: (f"{HOW} | attend", {"ZeroDivisionError"}),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(monkeypatch, plant):
    text, kinds = PLANTED[plant]
    assert hold(Recipe.parse(text)).verdict == "same"
    original = pipeline.run

    def rewritten(gm, *rest, **named):
        result = original(gm, *rest, **named)
        assert result.gm is not None
        plant(result.gm)
        result.gm.recompile()
        return result

    monkeypatch.setattr(pipeline, "run", rewritten)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = hold(Recipe.parse(text))
    assert outcome.finding and outcome.kinds & kinds, told(outcome)
