"""Write random score programs in several spellings: one canonical spec, and one result."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.passes.programs import CHOICES, INF, LOW, Program, Spelling, arrange, tensors, write
from tests.support import compiled, error, new_reports, run

pytestmark = pytest.mark.slow


def subsets(*names):
    return st.lists(st.sampled_from(names), unique=True, max_size=2).map(lambda x: tuple(sorted(x)))


programs = st.builds(
    Program,
    scale=st.sampled_from([0.25, 1.0, 4.0]),
    groups=st.sampled_from([4, 4, 2, 1]),
    cap=st.sampled_from([None, None, 8.0]),
    bias=subsets("row", "pair", "full", "alibi"),
    masks=subsets("causal", "window", "padding", "document"),
    fill=st.sampled_from([INF, LOW]),
    sink=st.sampled_from([False, False, True]),
    head_mask=st.sampled_from([False, False, True]),
)
spellings = st.builds(Spelling, **{name: st.sampled_from(values) for name, values in CHOICES.items()})


def lifted(p: Program, s: Spelling):
    """Return the spec of a spelling's one site, and the compiled function, which uses the inner compiler "eager"."""
    torch._dynamo.reset()
    fast = compiled(write(p, s), inner="eager", fullgraph=True)
    with new_reports() as filed:
        fast(**arrange(tensors(p), s))
    sites = [site for report in filed for site in report.sites]
    assert [site.rewritten for site in sites] == [True], f"{p}\n{s}\n" + "\n".join(map(str, filed))
    return sites[0].spec, fast


def results(fn, x: dict[str, torch.Tensor], s: Spelling, dtype: torch.dtype) -> list[torch.Tensor]:
    """Compute the output and the gradients in the order of `tensors(p)`, for any layout of the spelling."""
    leaves = {
        n: (t.detach().to(dtype) if t.is_floating_point() else t).clone().requires_grad_(t.is_floating_point())
        for n, t in x.items()
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        out = fn(**arrange(leaves, s))
    finally:
        torch.set_default_dtype(before)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    out.backward(seed)
    return [out.detach().double(), *(t.grad.double() for t in leaves.values() if t.requires_grad)]


def agree(p: Program, spelt: list[Spelling]) -> None:
    x = tensors(p)
    plain = Spelling()
    want = results(write(p, plain), x, plain, torch.float64)
    own = results(write(p, plain), x, plain, torch.float32)
    texts = {}
    for s in spelt:
        spec, fast = lifted(p, s)
        texts.setdefault(spec.to_json(), []).append((s, spec))
        got = results(fast, x, s, torch.float32)
        assert error(got, want) <= 4 * error(own, want) + 1e-5, f"{p}\n{s}\n{spec}"
    assert len(texts) == 1, f"{p}\n" + "\n".join(
        f"{s}\n{spec}\n{spec.captures}" for group in texts.values() for s, spec in group[:1]
    )


@settings(
    max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate]
)  # no shrinking: each example compiles
@given(programs, spellings)
def test_two_spellings_of_a_random_program_are_one_spec_and_one_result(p, s):
    agree(p, [Spelling(), s])


BUSY = Program(groups=2, cap=8.0, bias=("pair", "row"), masks=("causal", "padding"), fill=INF, head_mask=True)
SPELT = [(f.name, value) for f in fields(Spelling) for value in CHOICES[f.name] if value != f.default]


def busy(name: str, value: object) -> tuple[Program, Spelling]:
    p = replace(BUSY, sink=name == "sink", head_mask=value != "divided_later")
    return p, replace(Spelling(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(n, v, id=f"{n}={v}") for n, v in SPELT],
)
def test_each_way_of_writing_one_part_gives_the_plain_spec(name, value):
    p, s = busy(name, value)
    assert lifted(p, s)[0] == lifted(p, Spelling())[0]


@pytest.mark.parametrize(
    "change",
    [
        dict(scale=0.5),
        dict(groups=4),
        dict(cap=None),
        dict(cap=4.0),
        dict(bias=("pair",)),
        dict(masks=("causal",)),
        dict(masks=("padding", "window")),
        dict(fill=LOW),
        dict(sink=True),
        dict(head_mask=False),
    ],
    ids=str,
)
def test_another_program_is_another_spec(change):
    """This holds for all changes except the number of groups, which is not part of a spec."""
    same = lifted(replace(BUSY, **change), Spelling())[0] == lifted(BUSY, Spelling())[0]
    assert same == (change == dict(groups=4))


def test_every_spelling_of_dropout_is_one_spec():
    q, k, v = (torch.randn(2, 4, 24, 8) for _ in range(3))
    drops = [
        lambda w: torch.nn.functional.dropout(w, 0.1, True),
        lambda w: torch.dropout(w, 0.1, train=True),
        torch.nn.Dropout(0.1),
        lambda w: torch.nn.functional.dropout(w, p=0.1, training=True, inplace=True),
    ]
    specs = set()
    for drop in drops:
        torch._dynamo.reset()
        with new_reports() as filed:
            compiled(lambda q, k, v: drop((q @ k.mT).softmax(-1)) @ v, inner="eager")(q, k, v)  # noqa: B023
        specs |= {site.spec for report in filed for site in report.rewritten}
        assert [len(r.rewritten) for r in filed] == [1]
    assert len(specs) == 1


def test_the_librarys_operator_lifts_to_the_score_that_one_would_write():
    q, k, v = (torch.randn(2, 4, 24, 8) for _ in range(3))

    def call(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def masked(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.ones(24, 24, dtype=torch.bool).tril()
        )

    def hand(q, k, v):
        i = torch.arange(24)
        return (q @ k.mT / 8**0.5).masked_fill(i[None, :] > i[:, None], INF).softmax(-1) @ v

    found = []
    for fn in (call, masked, hand):
        torch._dynamo.reset()
        with new_reports() as filed:
            run(compiled(fn, inner="eager"), (q, k, v), False)
        found += [site.spec for report in filed for site in report.rewritten]
    assert len(found) == 3
    assert found[0] == found[1]
    assert found[0].score is found[2].score
