"""Define the stable codes for why an attention was kept, in one frozen table.

`python -m attnfx.report.codes` prints the page `docs/refusals.md` from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Code:
    """The explanation of a code for the user.

    title    a few words
    means    the condition that was found, in a sentence or two
    closest  the nearest form that is rewritten, as code or in words
    edit     the smallest change to the user's code or options that helps
    """

    title: str
    means: str
    closest: str
    edit: str


_PLAIN = "`(q @ k.mT * scale).softmax(-1) @ v`"
_SITES = {
    "softmax_dim": Code(
        "The softmax runs over another dim than the keys",
        "The weights are normalised over the queries (as slot attention does), over the heads, or over pairs.",
        _PLAIN,
        "Use dim=-1 of scores shaped (..., queries, keys), if the keys are what was meant.",
    ),
    "columns": Code(
        "The softmax runs over many columns that are no keys",
        "Scores of several sources are concatenated before the softmax, and a part of the weights is multiplied with "
        "the values. Up to eight more columns (sinks) are understood.",
        "`cat([s1, s2], -1).softmax(-1) @ cat([v1, v2], -2)`",
        "Concatenate the values as the scores are, and multiply the weights with them once.",
    ),
    "normaliser": Code(
        "The weights are normalised by something else than their sum",
        "What the exponentials are divided by is no sum of the same exponentials, or the weights are reduced again "
        "after the softmax.",
        "`w = (s - s.amax(-1, keepdim=True)).exp(); (w / w.sum(-1, keepdim=True)) @ v`",
        "Write `softmax(-1)`, or divide by the sum of the same exponentials over the keys.",
    ),
    "no_normaliser": Code(
        "The weights are not normalised",
        "An exponential or a gate stands between two products, and no softmax or sigmoid of the scores.",
        _PLAIN,
        "Nothing, if this is no attention.",
    ),
    "several_softmaxes": Code(
        "The weights combine several softmaxes",
        "The weights that meet the values are made of more than one softmax, such as a difference of two or a softmax "
        "of a softmax.",
        "`s1.softmax(-1) @ v - lam * (s2.softmax(-1) @ v)`: each softmax with a product of its own",
        "Multiply each softmax with the values by itself, and combine the results.",
    ),
    "several_dropouts": Code(
        "The weights are dropped out more than once",
        "Two dropouts follow each other on the weights.",
        "`dropout(s.softmax(-1), p) @ v`",
        "Use one dropout with the probability 1 - (1 - p1) * (1 - p2).",
    ),
    "dropout_place": Code(
        "The weights are changed after dropout",
        "Something other than a product or a zero fill stands between the dropout and the values.",
        "`dropout(s.softmax(-1), p) @ v`",
        "Move the dropout behind it, next to the values.",
    ),
    "dropout": Code(
        "The dropout probability is no number in [0, 1)",
        "It is a tensor, or everything is dropped.",
        "`dropout(s.softmax(-1), 0.1) @ v`",
        "Give the probability as a Python number below 1.",
    ),
    "one_draw": Code(
        "Dropped weights are read beside the attention",
        "The operator draws for itself, and what else is made of the dropped weights has to be of the same draw.",
        "`w = s.softmax(-1)`, then `dropout(w, 0.1) @ v` and `w`",
        "Read the weights before the dropout, or only sums of them and what is made of each row by itself.",
    ),
    "not_lifted": Code(
        "An operator between the scores and the values has no formula",
        "The weights reach the values through an operator that is no elementwise function, view, gather or reduction "
        "that is known.",
        "elementwise functions of the scores, views, and sums over the keys",
        "Write the operator that is named as elementwise functions, or move it before the queries or behind the "
        "values.",
    ),
    "score_used": Code(
        "The scores pass through an operator that has no formula",
        "Between the product of queries with keys and the softmax stands an operator that is not elementwise, so that "
        "a score cannot be computed by itself.",
        "`f(q @ k.mT).softmax(-1) @ v` with an elementwise f, which may read tensors of (batch, head, query, key)",
        "Write the operator that is named as an elementwise function, or apply it to the queries or the keys.",
    ),
    "reduction": Code(
        "A row of scores is reduced to change the scores",
        "A sum, mean or maximum over the keys enters the scores before the softmax, other than the maximum that "
        "cancels.",
        "`(s - s.amax(-1, keepdim=True)).softmax(-1) @ v`",
        'Leave the reduction out, or allow the tier "chunked", which computes whole rows.',
    ),
    "rows_mixed": Code(
        "Rows are mixed with each other",
        "No formula describes the weights, and the rows cannot be computed one by one either: an operator between the "
        "scores and the values mixes the queries (a cumulative sum over them, BatchNorm in training), or is not known "
        "to keep them apart.",
        "any operators that treat each query's row by itself: sort, top-k, cumulative sums over the keys",
        "Replace the operator that is named by one that works along the keys, or call eval() if it is a normalisation "
        "over the batch.",
    ),
    "no_product": Code(
        "No product of queries with keys reaches the softmax",
        "Between the softmax and the nearest product stand operators that are not understood, or the product is of "
        "integers.",
        _PLAIN,
        "Make the scores a floating-point product of queries and keys, followed by elementwise functions.",
    ),
    "contraction": Code(
        "The product with the values is of a form that is not understood",
        "It is no sum over the keys of weight times value: repeated letters in an einsum, a sum over heads as well.",
        "`w @ v` or `einsum('bhij,bhjd->bhid', w, v)`",
        "Write the product of weights and values as one matmul, or as an einsum that sums over the keys alone.",
    ),
    "values": Code(
        "The values have no width of their own",
        "The product with the weights leaves no dimension that the values have alone.",
        "values shaped (batch, heads, keys, width)",
        "Give the values a last dimension (of size 1 if need be) that the weights do not have.",
    ),
    "rows": Code(
        "The scores have no row that the query has alone",
        "Every dimension of the scores also belongs to the keys or the values: each query has keys of its own.",
        "queries shaped (batch, heads, queries, width)",
        "Give the queries a dimension of their own, of size 1 for a single query.",
    ),
    "unbatched": Code(
        "There is no batch dimension",
        "The operands are plain matrices.",
        "operands shaped (batch, queries, width)",
        "Add one: q[None], k[None], v[None].",
    ),
    "shared_keys": Code(
        "The keys are one matrix",
        "All of the batch reads the same keys and values, as with a router's gate, a codebook or a classifier.",
        "keys shaped (batch, keys, width), expanded if they are shared",
        "Nothing, if this is a codebook; else expand the keys over the batch.",
    ),
    "layout": Code(
        "An operand is gathered in a way that views cannot express",
        "Queries, keys or values are read at computed positions, or the output's dims cannot be brought into order.",
        "operands read through views, permutes, slices and expands",
        "Gather with an index that does not depend on the query, before the heads are split.",
    ),
    "axes": Code(
        "The scores depend on an index that is no axis of the attention",
        "A score is not a function of batch, head, query and key alone.",
        "biases and masks shaped (batch, heads, queries, keys) or broadcast to it",
        "Sum or select over the other index before adding it to the scores.",
    ),
    "extra": Code(
        "An added column of the softmax depends on the keys",
        "A column that was concatenated to the scores (a sink) is a function of the keys.",
        "`cat([s, sink.expand(...)], -1).softmax(-1)[..., :-1] @ v`",
        "Make the added column a function of batch, head and query.",
    ),
    "dtype": Code(
        "The scores are complex",
        "Complex numbers have no order, so a softmax of them means something else.",
        "real queries, keys and values",
        "Compute with the real part or the magnitude: `(q @ k.mT).real`, from real operands.",
    ),
    "mutated": Code(
        "An operand is changed in place before the attention has read it for the last time",
        "Queries, keys, values or a mask are written between their use in the scores and the product with the values, "
        "or, in training, an input of the graph is among them and is written anywhere.",
        "operands that are computed in the graph, and written before the scores are",
        "Use the out-of-place operator (`k = k + x` for `k.add_(x)`), or write before the scores are computed.",
    ),
    "fault": Code(
        "attnfx itself failed on it",
        "Something went wrong inside attnfx while it looked at this attention or rewrote it. The attention runs as it "
        "was written; the rest of the graph is rewritten as usual.",
        "any form: this is a defect of attnfx",
        "Nothing is wrong with the model; please report it with the traceback that strict=True shows.",
    ),
    "exercise": Code(
        "The kernel that was chosen failed when it was tried",
        "Each new kernel call is run once on tiny tensors while the model is compiled, forward and in training "
        "backward. This one raised an error, so the attention runs as it was written.",
        "any form: this is a defect of attnfx, or of a compiler below it",
        "Choose another tier with the option `tiers`, and report the error that the message shows.",
    ),
    "region": Code(
        "The attention crosses the border of an autocast or a no_grad region",
        "Scores and weighted values are computed under different modes.",
        "the whole attention inside or outside of the region",
        "Move the border before the scores or behind the product with the values.",
    ),
    "masked_rows": Code(
        "A finite fill and weights from a logarithm",
        "The weights are exp(score - log(sum)), which are 1 each where a finite fill masks a whole row, and no softmax "
        "gives that.",
        "`s.masked_fill(mask, -math.inf)`, or `softmax`",
        "Write softmax, or fill with -inf.",
    ),
    "graph_break": Code(
        "The graph breaks in the middle of the attention",
        "Dynamo ends a graph between the scores and the product with the values, and each graph is compiled by itself.",
        "scores, softmax and product with the values in one graph",
        "Remove what breaks the graph (print, .item(), a call that cannot be traced), or move it out of the attention.",
    ),
}
_OTHERS = {
    "not_attention": Code(
        "A softmax that is no attention",
        "No product of two batches of matrices leads to it by operators that are understood: the probabilities of a "
        "classifier, a loss, or a router's gate.",
        _PLAIN,
        "Nothing.",
    ),
    "no_values": Code(
        "The weights meet no values",
        "The softmax of a product of queries and keys is returned or reduced, and no product with values follows.",
        _PLAIN,
        "Nothing, if the weights themselves are the result.",
    ),
    "functorch": Code(
        "The graph is inside a functorch transform",
        "func.grad, and a vmap that draws random numbers, changes a tensor or switches autocast or gradients, must see "
        "the graph exactly as it was made, so it passes through untouched. Any other vmap is written out.",
        "the model compiled inside of the transform, or without it",
        "Move what is named out of vmap's function, or write the batch dimension out; apply func.grad outside.",
    ),
    "higher_order": Code(
        "The body of a control-flow operator",
        "The softmax stands in the body of an operator such as scan or while_loop that is not looked into.",
        "a Python loop, cond, or a checkpointed region",
        "Write the loop in Python, which Dynamo unrolls.",
    ),
    "untraceable": Code(
        "The graph could not be brought to ATen",
        "An input or an operator of the graph cannot be traced (a sparse tensor, a data-dependent value).",
        "dense tensors, and no values that are read back from them",
        "Move what the message names out of the compiled function.",
    ),
}
_DECISIONS = {
    "slower": Code(
        "A rewrite is predicted to take longer",
        "The cost model predicts no gain at these sizes, on this device.",
        "longer sequences, a causal or window mask",
        'Nothing; rewrite="always" rewrites all the same.',
    ),
    "weights_read": Code(
        "The weights themselves are read",
        "They are returned, or an operator reads them whole: they exist whatever is done, and the memory is taken.",
        "weights that only the product with the values reads, or sums of them",
        'Do not return the weights (in transformers: drop output_attentions); rewrite="always" rewrites the attention '
        "and computes the weights as before.",
    ),
    "no_tier": Code(
        "No allowed tier can run it",
        "Each tier that the option `tiers` allows has a condition that the site does not meet; the message has them.",
        "what the message names",
        "Allow more tiers, or change what the message names.",
    ),
    "mismatch": Code(
        "The rewrite did not agree with the original",
        'With verify="first" the rewritten attention was compared with the original on the first inputs, and differed '
        "by more than rounding.",
        "any form: this is a defect of attnfx",
        "Nothing is wrong with the model; please report it with the script that the warning names.",
    ),
    "compiler": Code(
        "The compiler failed on the rewritten graph",
        "Inductor or AOTAutograd raised an error on the graph with the rewritten attention, and compiled the graph as "
        "it was.",
        "any form: this is a defect of attnfx or of the compiler",
        "Nothing is wrong with the model; please report it with the error that the message shows.",
    ),
    "no_rates": Code(
        "The device is not known to the cost model",
        "There are no rates of this device, so nothing can be predicted.",
        "a CPU, or an NVIDIA GPU",
        'rewrite="always" rewrites without a prediction.',
    ),
}
CODES: Mapping[str, Code] = MappingProxyType({**_SITES, **_OTHERS, **_DECISIONS})


def known(code: str) -> Code:
    """Return the entry of a code. Raises ValueError for an unknown code."""
    if code not in CODES:
        raise ValueError(f"{code!r} is no code of a refusal: attnfx/report/codes.py lists them")
    return CODES[code]


def page() -> str:
    """Return the documentation page in Markdown, with a heading for each code."""
    sections = (
        ("Something that looks like attention was refused", _SITES),
        ("A softmax that was not looked at as attention", _OTHERS),
        ("An attention that was understood and kept", _DECISIONS),
    )
    intro = """
        # Why it was not rewritten

        Every softmax of a graph ends in the report: rewritten, or kept with one of these codes. `site.code` is the
        code of a kept site, `site.refusal` has the sentence, the line and the hint, and `report.others` lists the
        softmaxes that are no attention. With `strict=True` the first refusal is raised as an error. The codes are
        stable.
    """
    out = [inspect.cleandoc(intro)]
    for title, codes in sections:
        out.append(f"## {title}")
        for name, code in codes.items():
            lines = f"{code.means}\n\n- Closest form that is rewritten: {code.closest}\n- What to do: {code.edit}"
            out.append(f"### {name}\n\n**{code.title}.** {lines}")
    return "\n\n".join(out) + "\n"


if __name__ == "__main__":
    print(page(), end="")
