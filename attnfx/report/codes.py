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
_BUG = "any form: this is a bug in attnfx"
_SITES = {
    "softmax_dim": Code(
        "The softmax does not run over the keys",
        "The softmax normalizes over another dimension: the heads, or all query-key pairs. Weights that are normalized "
        "over the queries, as in slot attention, or transposed after the softmax, are rewritten only as whole rows of "
        "keys.",
        _PLAIN,
        "If the keys were meant, use `dim=-1` on scores shaped (..., queries, keys), and do not transpose the weights.",
    ),
    "columns": Code(
        "The softmax runs over more columns than the keys",
        "Scores of several sources are concatenated before the softmax, and only a part of the weights is multiplied "
        "by the values. Up to eight columns beside the keys (sinks) are supported.",
        "`cat([s1, s2], -1).softmax(-1) @ cat([v1, v2], -2)`",
        "Concatenate the values like the scores, and multiply them by all of the weights at once.",
    ),
    "normaliser": Code(
        "The weights are not divided by their own sum",
        "The exponentials are divided by something other than their sum over the keys, or the weights are reduced "
        "again after the softmax.",
        "`w = (s - s.amax(-1, keepdim=True)).exp(); (w / w.sum(-1, keepdim=True)) @ v`",
        "Write `softmax(-1)`, or divide by the sum of the same exponentials over the keys.",
    ),
    "no_normaliser": Code(
        "The weights are not normalized",
        "The function between the two products is neither a softmax nor a supported gate of the scores, such as "
        "sigmoid, ReLU, GELU or SiLU.",
        _PLAIN,
        "Nothing to do if this is not attention; otherwise normalize the weights with `softmax(-1)`.",
    ),
    "several_softmaxes": Code(
        "The weights combine several softmaxes",
        "The weights that are multiplied by the values are computed from more than one softmax, such as the "
        "difference of two, or a softmax of a softmax, and their rows cannot be computed separately either.",
        "`s1.softmax(-1) @ v - lam * (s2.softmax(-1) @ v)`: each softmax with its own product",
        "Multiply each softmax of a sum or difference by the values separately, and combine the results.",
    ),
    "several_dropouts": Code(
        "Dropout is applied to the weights more than once",
        "Two dropouts follow each other on the weights.",
        "`dropout(s.softmax(-1), p) @ v`",
        "Use one dropout with probability 1 - (1 - p1) * (1 - p2).",
    ),
    "dropout_place": Code(
        "The weights are changed after dropout",
        "Between the dropout and the product with the values is an operator other than a multiplication or a fill "
        "with zeros.",
        "`dropout(s.softmax(-1), p) @ v`",
        "Apply the dropout last, directly before the product with the values.",
    ),
    "dropout": Code(
        "The dropout probability is not a Python number in [0, 1)",
        "`scaled_dot_product_attention` gets a probability that is a tensor, or one that drops every weight.",
        "`dropout(s.softmax(-1), 0.1) @ v`",
        "Pass the probability as a Python number below 1.",
    ),
    "one_draw": Code(
        "The weights after dropout are also read elsewhere",
        "The rewritten attention samples its own dropout mask and does not return it. Another operator also reads the "
        "weights after this dropout, for example in `w = dropout(s.softmax(-1), 0.1); return w @ v, w`, and needs the "
        "same mask.",
        "`w = s.softmax(-1)`, then `dropout(w, 0.1) @ v` and any use of `w`",
        "Read the weights before the dropout; or read only sums of the dropped weights, or results that are computed "
        "from each row separately.",
    ),
    "not_lifted": Code(
        "An unsupported operator is between the scores and the values",
        "The weights reach the values through an operator that is not a known elementwise function, view, gather or "
        "reduction.",
        "elementwise functions of the scores, views, and sums over the keys",
        "Write the operator that the message names as elementwise functions, or apply it before the scores or to the "
        "output.",
    ),
    "score_used": Code(
        "An unsupported operator is between the scores and the softmax",
        "The scores pass through an operator that is not elementwise, so a score cannot be computed by itself. Its row "
        "cannot be computed separately either, or the option `tiers` does not allow `chunked`.",
        "`f(q @ k.mT).softmax(-1) @ v` with an elementwise f, which may read tensors of (batch, head, query, key)",
        "Write the operator that the message names as elementwise functions, or apply it to the queries or the keys.",
    ),
    "reduction": Code(
        "The scores depend on a reduction of their own row",
        "A sum, mean or maximum over a row of scores changes the scores before the softmax. The rows cannot be "
        "computed separately either, or the option `tiers` does not allow `chunked`. A maximum that is subtracted "
        "cancels, and is supported.",
        "`(s - s.amax(-1, keepdim=True)).softmax(-1) @ v`",
        "Remove the reduction from the scores.",
    ),
    "rows_mixed": Code(
        "The rows of scores depend on each other",
        "The weights cannot be computed score by score, and their rows (one for each query) cannot be computed "
        "separately either: an operator between the scores and the values combines several queries (a cumulative sum "
        "over them, BatchNorm in training), or is not known to keep them separate.",
        "any operators that treat each query's row separately: sort, top-k, cumulative sums over the keys",
        "Replace the operator that the message names by one that works along the keys; call `eval()` if it normalizes "
        "over the batch.",
    ),
    "no_product": Code(
        "No product of queries and keys reaches the softmax",
        "The softmax is not computed from a floating-point product of queries and keys by known operators: another "
        "operator is between them, or the product is of integers.",
        _PLAIN,
        "Make the scores a floating-point product of queries and keys, followed by elementwise functions.",
    ),
    "contraction": Code(
        "The product with the values has an unsupported form",
        "The product is not a sum over the keys of weight times value: an einsum repeats a letter in an operand, for "
        "example, or sums over the heads too.",
        "`w @ v` or `einsum('bhij,bhjd->bhid', w, v)`",
        "Write the product of weights and values as one matmul, or as an einsum that sums over the keys alone.",
    ),
    "values": Code(
        "The values do not have exactly one dimension of their own",
        "Exactly one dimension of the output, the width, must come from the values and not from the weights.",
        "values shaped (batch, heads, keys, width)",
        "Give the values one last dimension that the weights lack: of size 1 if need be, or several flattened to one.",
    ),
    "rows": Code(
        "Each query has its own keys",
        "Every dimension of the scores also belongs to the keys or the values, so none is left for the queries: for "
        "example, `einsum('bhid,bhijd->bhij', q, k)`, in which each query i has gathered its own keys.",
        "queries shaped (batch, heads, queries, width)",
        "Give the queries a dimension of their own, of size 1 for a single query.",
    ),
    "shared_keys": Code(
        "The keys are one matrix",
        "The whole batch shares one matrix of keys, as in a router's gate, a codebook or a classifier.",
        "keys shaped (batch, keys, width), expanded if they are shared",
        "Nothing to do if this is a codebook; otherwise expand the keys over the batch.",
    ),
    "layout": Code(
        "Views cannot express how an operand is read",
        "Queries, keys or values are read at computed positions, or the dimensions of the output cannot be put in "
        "order.",
        "operands read through views, permutes, slices and expands",
        "Gather with an index that does not depend on the query, before the heads are split.",
    ),
    "axes": Code(
        "The scores depend on another index than batch, head, query and key",
        "A score must be a function of its batch, head, query and key alone. Here they also differ along another "
        "dimension, which the output lacks; the message gives its size.",
        "biases and masks shaped (batch, heads, queries, keys) or broadcast to it",
        "Sum or select over the other index before you add the result to the scores.",
    ),
    "extra": Code(
        "An added column of the softmax depends on the keys",
        "A column that is concatenated to the scores (a sink) is a function of the keys.",
        "`cat([s, sink.expand(...)], -1).softmax(-1)[..., :-1] @ v`",
        "Make the added column a function of batch, head and query.",
    ),
    "dtype": Code(
        "The scores are complex",
        "The product of queries and keys, or a tensor that the scores read, is complex.",
        "real queries, keys and values",
        "Compute the scores from real operands: `(q @ k.mT).real` is `q.real @ k.real.mT - q.imag @ k.imag.mT`.",
    ),
    "mutated": Code(
        "An operand is changed in place during the attention",
        "Queries, keys, values or a mask are written in place between their use in the scores and the product with the "
        "values. In training, an input of the graph that the attention reads must not be written in place at all.",
        "operands that are computed in the graph, and written before the scores are",
        "Use the out-of-place operator (`k = k + x` for `k.add_(x)`), or write before the scores are computed.",
    ),
    "fault": Code(
        "attnfx failed on this attention",
        "An error occurred inside attnfx while it searched or rewrote this attention. The attention runs as written; "
        "the rest of the graph is rewritten as usual.",
        _BUG,
        "Your model is not at fault; please report the traceback that `strict=True` shows.",
    ),
    "exercise": Code(
        "The chosen kernel failed in its trial run",
        "While the model is compiled, each new kernel call runs once on tiny tensors, forward and, in training, "
        "backward. This call raised an error, so the attention runs as written.",
        f"{_BUG}, or in a compiler below it",
        "Choose another tier with the option `tiers`, and please report the error in the message.",
    ),
    "region": Code(
        "The attention crosses the boundary of an autocast or no_grad region",
        "The scores and the product with the values are computed under different modes.",
        "the whole attention inside or outside the region",
        "Move the boundary before the scores or after the product with the values.",
    ),
    "masked_rows": Code(
        "A finite fill masks rows of weights that are computed by a logarithm",
        "The weights are `exp(score - log(sum))`. In a row that a finite fill masks entirely each of them is 1, unlike "
        "the result of any softmax.",
        "`s.masked_fill(mask, -math.inf)`, or `softmax`",
        "Write `softmax`, or fill with -inf.",
    ),
    "graph_break": Code(
        "A graph break splits the attention",
        "Dynamo ends a graph between the scores and the product with the values, and compiles each graph separately.",
        "scores, softmax and product with the values in one graph",
        "Remove the cause of the graph break (print, .item(), a call that cannot be traced), or move it out of the "
        "attention.",
    ),
}
_OTHERS = {
    "not_attention": Code(
        "This softmax is not attention",
        "Known operators do not lead from a product of two batches of matrices to this softmax: it gives the "
        "probabilities of a classifier, a loss or a router's gate, for example.",
        _PLAIN,
        "Nothing to do.",
    ),
    "no_values": Code(
        "The weights are not multiplied by values",
        "The softmax of a product of queries and keys is returned or reduced, and no product with values follows.",
        _PLAIN,
        "Nothing to do if the weights themselves are the result.",
    ),
    "functorch": Code(
        "The graph contains a functorch transform",
        "A graph with `func.grad` is compiled exactly as Dynamo captured it. So is one with a `vmap` whose function "
        "samples random numbers, writes to a tensor, or switches autocast or gradients. Any other `vmap` is expanded.",
        "the model compiled inside the transform, or without it",
        "Move random numbers, in-place writes and mode switches out of the mapped function, or write the batch "
        "dimension by hand; apply `func.grad` outside the compiled function.",
    ),
    "higher_order": Code(
        "The softmax is in the body of a control-flow operator",
        "The bodies of operators such as `scan` and `while_loop` are not searched.",
        "a Python loop, `cond`, or a checkpointed region",
        "Write the loop in Python, which Dynamo unrolls.",
    ),
    "untraceable": Code(
        "The graph could not be traced to ATen operators",
        "An input or an operator of the graph cannot be traced, such as a sparse tensor or a data-dependent value.",
        "dense tensors, without values that are read back from them",
        "Move what the message names out of the compiled function.",
    ),
}
_DECISIONS = {
    "slower": Code(
        "The predicted gain is too small",
        "The cost model predicts that a rewrite takes more than 0.95 times the original's time at these sizes on this "
        "device (0.8 times, where the original is PyTorch's fused operator on a GPU), or tuning measured it as slower.",
        "longer sequences, a causal or window mask",
        'Nothing to do; `rewrite="always"` rewrites it anyway.',
    ),
    "weights_read": Code(
        "The weights themselves are read",
        "The weights are returned, or an operator reads them whole, so they are computed and stored in any case.",
        "weights that only the product with the values reads, or sums of them",
        'Do not return the weights (in transformers: drop `output_attentions`); `rewrite="always"` rewrites the '
        "attention and computes the weights as before.",
    ),
    "no_tier": Code(
        "No allowed tier can run this attention",
        "Each tier that the option `tiers` allows has a condition that this attention does not meet; the message lists "
        "these conditions.",
        "an attention that meets the conditions in the message",
        "Allow more tiers, or change what the message names.",
    ),
    "mismatch": Code(
        "The rewrite and the original disagree",
        'With `verify="first"` the rewritten attention was compared with the original on the first inputs, and they '
        "differed by more than rounding.",
        _BUG,
        "Your model is not at fault; please report this with the script that the warning names.",
    ),
    "compiler": Code(
        "The compiler failed on the rewritten graph",
        "Inductor or AOTAutograd raised an error on the graph with the rewritten attention, so the original graph was "
        "compiled instead.",
        f"{_BUG} or in the compiler",
        "Your model is not at fault; please report this with the error in the message.",
    ),
    "no_rates": Code(
        "The cost model does not know the device",
        "attnfx lacks the compute rates of this device, so it cannot predict times.",
        "a CPU, or an NVIDIA GPU",
        'If the tensors are on "meta", name a device with `target=`. `rewrite="always"` rewrites without a prediction.',
    ),
}
CODES: Mapping[str, Code] = MappingProxyType({**_SITES, **_OTHERS, **_DECISIONS})


def known(code: str) -> Code:
    """Return the entry of a code. Raises ValueError for an unknown code."""
    if code not in CODES:
        raise ValueError(f"{code!r} is not a refusal code; attnfx/report/codes.py lists all of them")
    return CODES[code]


def page() -> str:
    """Return the documentation page in Markdown, with a heading for each code."""
    sections = (
        ("Refused: it looks like attention, but cannot be rewritten", _SITES),
        ("A softmax that was not treated as attention", _OTHERS),
        ("Attention that could be rewritten, and was kept", _DECISIONS),
    )
    intro = """
        # Refusal codes

        Every softmax of a graph ends in the report: rewritten, or kept for a reason with a stable code. `site.code` is
        the code of a kept site, and `site.refusal` holds the sentence, the line of your code and a hint.
        `report.others` lists the softmaxes that are not attention. With `strict=True` the first refusal is raised as an
        error; from a compiled call it arrives as `torch._dynamo.exc.BackendCompilerFailed`: see
        [Options](options.md#errors). The codes are stable; the sentences may change.

        The report works out the closest form and the advice for each site: it names your operator, line, sizes and
        dimensions, or respells your line. Without such facts it gives the texts below.

        A site that no score program can express is also tried as [whole rows](how-it-works.md#whole-rows). It is
        refused only if that is not possible either, or if the option `tiers` excludes `chunked`.
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
