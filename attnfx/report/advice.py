"""Work out the advice on one site from the facts of its refusal: templates, in one frozen table.

The facts are text. `passes.fx.nodes.refusal` reads the common ones off the refused nodes:

operator, place, source   of the first node: its operator, "file.py:88", and the line of the user's code
shape, dtype              of its result
dim, p, equation, ..      its arguments, under the names of the operator's schema
end                       the place of the last node, the product with the values

The code that refuses adds others. `respelled` is the line `source` as the code advises it (`attnfx.report.respell`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from types import MappingProxyType

from attnfx.report.respell import respell


@dataclass(frozen=True)
class Advice:
    """The closest form that is rewritten, and the edit that leads to it, as templates over facts or filled in."""

    closest: str
    edit: str

    @property
    def names(self) -> frozenset[str]:
        """Return the facts that the templates need."""
        return frozenset(name for t in (self.closest, self.edit) for _, name, _, _ in Formatter().parse(t) if name)

    def filled(self, facts: Mapping[str, str]) -> Advice:
        return Advice(self.closest.format_map(facts), self.edit.format_map(facts))


_LINE = "`{respelled}`"
_FEWER = (
    Advice(
        "at most {most} operators between the scores and the product at {end}",
        "Compute the weights of {end} with at most {most} operators: the search goes no further.",
    ),
    Advice(
        "at most {most} operators between the scores and the output",
        "Compute the weights with at most {most} operators: the search goes no further.",
    ),
)
# Of each code, the first advice whose facts are known is given. Without one, the code's own text is.
ADVICE: Mapping[str, tuple[Advice, ...]] = MappingProxyType({
    "softmax_dim": (
        Advice(_LINE, "If the keys were meant, write `{respelled}` at {place}, instead of dim={dim} of {shape}."),
        Advice(
            "`{operator}` over the last dimension of scores shaped {shape}, directly before the product at {end}",
            "Keep the weights of {place}, shaped {shape}, as (.., queries, keys) up to the product at {end}: do not "
            "flatten or transpose them.",
        ),
    ),
    "columns": (
        Advice(
            "the product of all {columns} weights with {columns} values",
            "Concatenate the {keys} values with those of the other columns, so that all {columns} weights of {place} "
            "are multiplied at once.",
        ),
    ),
    "normaliser": (
        Advice(_LINE, "Sum the exponentials over the keys: write `{respelled}` at {place}."),
        Advice(
            "the weights of {place} multiplied by the values at {end}, without a second division",
            "Multiply the weights of `{operator}` at {place} by the values as they are, and divide the output of {end} "
            "instead.",
        ),
    ),
    "no_normaliser": (
        Advice(
            "`softmax(-1)` in place of `{operator}` at {place}",
            "Normalize the weights of {place} with `softmax(-1)` instead of `{operator}`; nothing to do if the "
            "product at {end} is not attention.",
        ),
    ),
    "several_softmaxes": (
        Advice(
            "a product with the values at {end} for each of the {count} softmaxes at {places}",
            "Multiply each of the {count} softmaxes ({places}) by the values separately, and combine the {count} "
            "results instead of the weights.",
        ),
        Advice(
            "one softmax for the product with the values at {end}",
            "Use one of the {factors} softmaxes ({places}) for the product at {end}, if the model allows it: a product "
            "of softmaxes cannot be split into products with the values.",
        ),
    ),
    "several_dropouts": (
        Advice("one dropout with probability {whole} before {end}", "Use one dropout with p={whole} for p={given}."),
    ),
    "dropout_place": (
        Advice(
            "a dropout with p={given} as the last operator before the product at {end}",
            "Move the dropout with p={given} behind the other operators on the weights of {place}, directly before the "
            "product at {end}.",
        ),
    ),
    "dropout": (
        Advice(
            "`dropout_p` below 1 at {place}", "Pass a Python number below 1 as `dropout_p` at {place}, instead of {p}."
        ),
    ),
    "one_draw": (
        Advice(
            "the weights of {place} read before the dropout with p={p}",
            "Let {reader} read the weights of {place} from before the dropout with p={p}, or drop its result.",
        ),
    ),
    "not_lifted": (
        Advice(
            "elementwise functions, views and sums over the keys in place of `{operator}` at {place}",
            "Write `{operator}` at {place} as elementwise functions of the weights, or apply it to the "
            "output of {end}.",
        ),
    ),
    "score_used": (
        *_FEWER,
        Advice(
            "each score a function of its own element of `{product}` at {place}",
            "Read `{product}` at {place} at the score's own position, instead of other scores too.",
        ),
        Advice(
            "elementwise functions of the scores in place of `{operator}` at {place}",
            "Write `{operator}` at {place} as elementwise functions, or apply it to the queries or the keys.",
        ),
    ),
    "reduction": (
        Advice(
            "the scores without `{operator}` at {place}",
            "Remove `{operator}` at {place} from the scores.",
        ),
    ),
    "rows_mixed": (
        *_FEWER,
        Advice(_LINE, "Let `{operator}` treat each query's row separately: write `{respelled}` at {place}."),
        Advice(
            "`{operator}` with its running statistics at {place}",
            "Call `eval()`, or pass `training=False`: with training={training}, `{operator}` at {place} combines the "
            "rows of a batch.",
        ),
        Advice(
            "an operator that treats each of the rows of {shape} separately, in place of `{operator}` at {place}",
            "Replace `{operator}` at {place} by an operator that works along the keys alone, or apply it before the "
            "scores or to the output of {end}.",
        ),
    ),
    "no_product": (
        *_FEWER,
        Advice(
            "floating-point queries and keys in the product at {place}",
            "Convert the operands of `{operator}` at {place} to a floating-point dtype before the product: its dtype "
            "is {integer}.",
        ),
        Advice(
            "`q @ k.mT` and elementwise functions of it in place of `{operator}` at {place}",
            "Compute the scores at {place} as a floating-point product of queries and keys instead of `{operator}`.",
        ),
    ),
    "contraction": (
        Advice(_LINE, "Sum over the keys alone, then over the rest: write `{respelled}` at {place}."),
        Advice(
            "`w @ v` in place of `{operator}` at {place}",
            "Write `{operator}` at {place} as one matmul of weights and values, and do the rest on its result, shaped "
            "{shape}.",
        ),
    ),
    "values": (
        Advice(
            "values shaped {wanted}, in the product at {end}",
            "Give the values, shaped {shape}, exactly one dimension that the weights lack ({count} now): shape them "
            "{wanted} before the product at {end}.",
        ),
    ),
    "rows": (
        Advice(
            "queries shaped {wanted} at {place}",
            "Give the queries, shaped {queries}, a dimension of size 1 of their own in the product at {place}: "
            "{wanted}.",
        ),
    ),
    "shared_keys": (
        Advice(
            "keys shaped {wanted}",
            "Nothing to do if this is a codebook; otherwise expand the keys, shaped {keys}, to {wanted} before the "
            "product at {place}.",
        ),
    ),
    "layout": (
        Advice(
            "the {role} read through views at {place}",
            "Read the {role} ({operator}, shaped {shape}, at {place}) through views: gather with an index that does "
            "not depend on the query.",
        ),
        Advice(
            "an input that has the size {unread}, for the attention that ends at {place}",
            "Give the function the size {unread}, which the attention that ends at {place} reads, as an input of its "
            "own, or as a dimension of one.",
        ),
        Advice(
            "`{operator}` at {place} of operands read through views, permutes, slices and expands",
            "Read the operands of `{operator}` at {place} through views, without gathers, and order the dimensions of "
            "its result, {shape}, as theirs.",
        ),
    ),
    "axes": (
        Advice(
            "scores without the dimension of size {length}",
            "Sum or select over the dimension of size {length} before it reaches the scores of {place}.",
        ),
    ),
    "extra": (
        Advice(
            "an added column of the softmax that only batch, head and query decide",
            "Compute the column that the softmax before {place} adds without the keys.",
        ),
    ),
    "dtype": (
        Advice(
            "real operands in place of {dtype} at {place}",
            "Compute `{operator}` at {place} from real operands: `(q @ k.mT).real` is `q.real @ k.real.mT - q.imag @ "
            "k.imag.mT`.",
        ),
    ),
    "mutated": (
        Advice(
            "the attention under `{mode}`, or `{operator}` out of place at {place}",
            "Run the model under `{mode}` if it needs no gradients; otherwise write the result of `{operator}` at "
            "{place} to a new tensor.",
        ),
        Advice(_LINE, "Use the out-of-place operator: write `{respelled}` at {place}."),
        Advice(
            "`{operator}` out of place at {place}, or before the scores",
            "Write the result of `{operator}` at {place} to a new tensor (`k = k + x` for `k.add_(x)`), or {earlier}.",
        ),
        Advice(
            "`{operator}` out of place at {place}",
            "Write the result of `{operator}` at {place} to a new tensor: `k = k + x` for `k.add_(x)`.",
        ),
    ),
    "region": (
        Advice(
            "{place} and {end} in one region",
            "Move {place} (`{operator}`) and the product at {end} to the same side of the boundary of the autocast or "
            "no_grad region.",
        ),
    ),
    "masked_rows": (
        Advice(
            "`softmax`, or `-math.inf` in place of the fill {fill} before {place}",
            "Fill with `-math.inf` instead of {fill}, or write `softmax` at {place}.",
        ),
    ),
    "graph_break": (
        Advice(
            "scores, softmax and product with the values without the graph break at {place}",
            "Remove the cause of the graph break at {place}, or move it out of the attention.",
        ),
    ),
    "no_values": (
        Advice(
            "the weights of {place} multiplied by values",
            "Nothing to do if the weights of {place}, shaped {shape}, are the result.",
        ),
    ),
    "not_attention": (
        Advice(
            "`{operator}` at {place} of a product of queries and keys",
            "Nothing to do if the softmax at {place}, shaped {shape}, is not attention.",
        ),
    ),
    "functorch": (
        Advice(
            "{place} outside the transform",
            "Move random numbers, in-place writes and mode switches out of the function that holds {place}, or write "
            "the batch dimension by hand; apply `func.grad` outside the compiled function.",
        ),
    ),
    "higher_order": (
        Advice(
            "{place} in a Python loop, in `cond`, or in a checkpointed region",
            "Write the loop around {place} in Python, which Dynamo unrolls, instead of `{holder}`.",
        ),
    ),
    "untraceable": (
        Advice(
            "{place} in a graph of dense tensors, without values that are read back from them",
            "Move what the message names out of the compiled function that holds {place}.",
        ),
    ),
    "slower": (
        Advice(
            "more than {sizes}, or a causal or window mask",
            'Nothing to do at {sizes}; `rewrite="always"` rewrites it anyway.',
        ),
    ),
    "weights_read": (
        Advice(
            "the weights not read at {reader}, or only in sums",
            "Do not return or read the weights at {reader} (in transformers: drop `output_attentions`); "
            '`rewrite="always"` rewrites the attention and computes the weights as before.',
        ),
    ),
    "no_tier": (
        Advice("this attention in the tier {able}", "Add {able} to the option `tiers`: that runs this attention."),
    ),
    "no_rates": (
        Advice(
            "a CPU or an NVIDIA GPU instead of the device {device}",
            "In place of the device {device}, name a device with `target=`; `rewrite=\"always\"` rewrites without a "
            "prediction.",
        ),
    ),
})  # fmt: skip


def advise(code: str, facts: Mapping[str, str]) -> Advice | None:
    """Return the advice on a site of this code, or None where only the code's own text applies."""
    known = {name: text for name, text in facts.items() if text}
    respelled = respell(code, known.get("source", ""), known)
    if respelled:
        known["respelled"] = respelled
    return next((a.filled(known) for a in ADVICE.get(code, ()) if a.names <= known.keys()), None)
