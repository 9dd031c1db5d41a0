"""Build a small transformers model with random weights from its type, with inputs to call it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch

from attnfx.cli.loading import users_code

# The names that configurations use for each size. All existing ones are set, in nested configurations too.
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
               "decoder_layers"),
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
              "decoder_attention_heads"),
    "inner": ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
    "width": ("head_dim", "d_kv"),
}  # fmt: skip
VOCABULARY = 1000


def made(
    model_type: str, layers: int, hidden: int, heads: int, length: int, batch: int
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Build a model with transformers' eager attention, and its inputs.

    Raises click.UsageError if transformers is not installed or does not know the type, or if the model's main input is
    neither tokens nor images.
    """
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as problem:
        raise click.UsageError(f"--hf needs transformers: pip install transformers ({problem})") from None
    if model_type not in CONFIG_MAPPING:
        raise click.UsageError(f"transformers has no model type {model_type!r}{_like(model_type, CONFIG_MAPPING)}")
    if hidden % heads:
        raise click.UsageError(f"--hidden {hidden} is not a multiple of --heads {heads}")
    with users_code(f"transformers could not build a {model_type} model of these sizes"), torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type)
        wanted = {"layers": layers, "hidden": hidden, "heads": heads, "inner": 4 * hidden, "width": hidden // heads}
        _resize(config, wanted, length)
        model = AutoModel.from_config(config, attn_implementation="eager")
        inputs = _inputs(model, config, batch, length)
    return model, (), inputs


def _like(model_type: str, known: Any) -> str:
    import difflib

    found = difflib.get_close_matches(model_type, list(known), 1, 0.0)
    return f"; did you mean {found[0]!r}?" if found else ""


def _resize(config: Any, wanted: dict[str, int], length: int) -> None:
    before = {name: getattr(config, name, None) for name in NAMES["heads"]}
    for size, names in NAMES.items():
        for name in names:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, wanted[size])
    groups, heads = getattr(config, "num_key_value_heads", None), next((n for n in before.values() if n), None)
    if isinstance(groups, int) and heads:  # keep the query heads per key head, if that divides evenly
        each = max(1, heads // groups)
        config.num_key_value_heads = wanted["heads"] // each if wanted["heads"] % each == 0 else 1
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = (config.layer_types * wanted["layers"])[: wanted["layers"]]
    if isinstance(getattr(config, "vocab_size", None), int):
        config.vocab_size = VOCABULARY
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, 0)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, max(length + 2, getattr(config, name)))
    for part in vars(config).values():
        if hasattr(part, "model_type") and hasattr(part, "to_dict"):
            _resize(part, wanted, length)


def _inputs(model: Any, config: Any, batch: int, length: int) -> dict[str, Any]:
    name = model.main_input_name
    if name == "input_ids":
        inputs = {name: torch.randint(1, VOCABULARY, (batch, length))}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs[name].clone()
        return inputs
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        extent = getattr(vision, "image_size", 224)
        height, width = (extent, extent) if isinstance(extent, int) else extent
        return {name: torch.randn(batch, getattr(vision, "num_channels", 3), height, width)}
    raise click.UsageError(f"--hf cannot create the input {name!r} of this model; write a factory instead")
