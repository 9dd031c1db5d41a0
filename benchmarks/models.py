"""Build models of the transformers library with random weights, mostly at their base widths. Nothing is downloaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Tensor]]


def tokens(batch: int, length: int, vocabulary: int = 8192) -> Tensor:
    return torch.randint(vocabulary, (batch, length))


def padded(batch: int, length: int) -> dict[str, Tensor]:
    """Create token ids, and a mask in which the last text of the batch has three quarters of the length."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length * 3 // 4 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def decoder(kind: str, layers: int, length: int, how: dict[str, Any], heads: int = 8, **more: Any) -> Built:
    """Build a Llama or Mistral with `heads` heads of width 64."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64 * heads, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=8192,
        max_position_embeddings=2 * length, use_cache=False, **more, **how,
    )  # fmt: skip
    return getattr(transformers, f"{kind}Model")(config), {"input_ids": tokens(1, length)}


def generator(kind: str, layers: int, length: int, implementation: str = "eager") -> nn.Module:
    """Build a Llama, Qwen2 or Mistral with a language model's head, 8 heads of width 64 and 2 pairs of keys and values.
    A Mistral attends to the last `length` tokens."""
    import transformers

    window = {"sliding_window": length} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=512, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2, vocab_size=8192,
        intermediate_size=1376, max_position_embeddings=2 * length, attn_implementation=implementation,
        eos_token_id=None, pad_token_id=0, **window,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


class Chunked(nn.Module):
    """A layer of a ViT-B whose attention is a loop over chunks of queries; with `chunk` 0, of all queries at once."""

    def __init__(self, chunk: int, width: int = 768, heads: int = 12):
        super().__init__()
        self.chunk, self.heads = chunk, heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return weights @ value

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        step = self.chunk or length
        parts = [self.attend(query[:, :, i : i + step], key, value) for i in range(0, length, step)]
        x = x + self.out(torch.cat(parts, 2).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class ChunkedViT(nn.Module):
    """A stack of `Chunked` layers over embedded patches."""

    def __init__(self, layers: int, chunk: int):
        super().__init__()
        self.layers = nn.Sequential(*(Chunked(chunk) for _ in range(layers)))

    def forward(self, patches: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.layers(patches))


def build(name: str, layers: int, size: int, batch: int = 1, implementation: str = "eager") -> Built:
    """Build a model and its inputs. `size` is the number of tokens, or the side of an image in pixels."""
    import transformers as hf

    how = {"attn_implementation": implementation}
    if name == "llama":
        return decoder("Llama", layers, size, how, intermediate_size=1376, num_key_value_heads=8)
    if name == "grouped":  # a Llama whose 12 heads share 4 pairs of keys and values
        return decoder("Llama", layers, size, how, 12, intermediate_size=2048, num_key_value_heads=4)
    if name == "mistral":
        return decoder("Mistral", layers, size, how, intermediate_size=1792, num_key_value_heads=2, sliding_window=512)
    if name == "bert":
        return hf.BertModel(hf.BertConfig(num_hidden_layers=layers, **how)), padded(batch, size)
    if name == "gpt2":
        return hf.GPT2Model(hf.GPT2Config(n_layer=layers, use_cache=False, **how)), padded(batch, size)
    if name == "t5":
        config = hf.T5Config(d_model=768, d_ff=3072, num_heads=12, num_layers=layers, use_cache=False, **how)
        return hf.T5Model(config), padded(batch, size) | {"decoder_input_ids": tokens(batch, size // 4)}
    if name == "swin":
        config = hf.SwinConfig(image_size=size, depths=[2] * layers, num_heads=[3, 6, 12, 24][:layers], **how)
        return hf.SwinModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(batch, 3, size, size)}
    if name == "vit":
        side = (768, 816) if size == 2448 else (size, size)  # 48 x 51 patches, and the class token
        config = hf.ViTConfig(num_hidden_layers=layers, image_size=side, **how)
        return hf.ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(batch, 3, *side)}
    if name.startswith("vit-"):
        chunk = name.removeprefix("vit-")
        return ChunkedViT(layers, 0 if chunk == "whole" else int(chunk)), {"patches": torch.randn(batch, size, 768)}
    raise ValueError(f"no model is named {name!r}")
