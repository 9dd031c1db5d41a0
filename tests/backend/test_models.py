"""Rewrite every attention of tiny transformers models, in inference and training, with eager's outputs and gradients.

The models have random weights."""

import pytest
import torch

from tests.support import check, compiled, new_reports

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
QUIET = dict(attn_implementation="eager", use_cache=False)


def tokens(b: int = 2, t: int = 23) -> torch.Tensor:
    return torch.randint(0, 67, (b, t), generator=torch.Generator().manual_seed(1))


def padded(b: int = 2, t: int = 23) -> dict:
    """Create token ids and a mask, the last row shorter than the others."""
    mask = torch.ones(b, t, dtype=torch.long)
    mask[-1, -6:] = 0
    return dict(input_ids=tokens(b, t), attention_mask=mask)


def image(size: int = 24) -> dict:
    return dict(pixel_values=torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2)))


def gpt2(t):
    config = t.GPT2Config(
        vocab_size=67,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        **QUIET,
    )
    return t.GPT2Model(config), padded(), 2


def llama(t):
    return t.LlamaModel(t.LlamaConfig(**GROUPED, **QUIET)), padded(), 2


def mistral(t):
    return t.MistralModel(t.MistralConfig(**GROUPED, sliding_window=7, **QUIET)), dict(input_ids=tokens()), 2


def qwen3(t):
    return t.Qwen3Model(t.Qwen3Config(**GROUPED, **QUIET)), padded(), 2


def gemma2(t):
    config = t.Gemma2Config(**GROUPED, sliding_window=7, attn_logit_softcapping=5.0, query_pre_attn_scalar=8, **QUIET)
    return t.Gemma2Model(config), dict(input_ids=tokens()), 2


def gpt_neox(t):
    config = t.GPTNeoXConfig(**SMALL, max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0, **QUIET)
    return t.GPTNeoXModel(config), padded(), 2


def bloom(t):
    config = t.BloomConfig(
        vocab_size=67, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, **QUIET
    )
    return t.BloomModel(config), padded(), 2


def bert(t):
    config = t.BertConfig(
        **SMALL,
        max_position_embeddings=64,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        attn_implementation="eager",
    )
    return t.BertModel(config, add_pooling_layer=False), padded(), 2


def t5(t):
    config = t.T5Config(
        vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, **QUIET
    )
    return t.T5Model(config), {**padded(), "decoder_input_ids": tokens(2, 11)}, 6


def vit(t):
    config = t.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        attn_implementation="eager",
    )
    return t.ViTModel(config, add_pooling_layer=False), image(), 2


def swin(t):
    config = t.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        drop_path_rate=0.0,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        attn_implementation="eager",
    )
    return t.SwinModel(config, add_pooling_layer=False), image(32), 3


def whisper(t):
    config = t.WhisperConfig(
        vocab_size=67,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=20,
        max_target_positions=24,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **QUIET,
    )
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))
    return t.WhisperModel(config), dict(input_features=features, decoder_input_ids=tokens(2, 11)), 3


def clip(t):
    text = dict(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=24, patch_size=4
    )
    config = t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, attn_implementation="eager")
    return t.CLIPModel(config), {**padded(), **image()}, 2


MODELS = [gpt2, llama, mistral, qwen3, gemma2, gpt_neox, bloom, bert, t5, vit, swin, whisper, clip]


@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_every_attention_is_rewritten_and_right(build, train):
    torch.manual_seed(0)
    model, inputs, sites = build(transformers)
    check(model.train(train), kwargs={**inputs, "return_dict": False}, train=train, sites=sites, tolerance=1e-4)


def test_a_models_training_step_is_right_with_inductors_code():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1}, **QUIET)
    check(transformers.LlamaModel(config), kwargs={**padded(), "return_dict": False}, tolerance=1e-4, inner="inductor")


def test_a_sliding_window_is_read_off_the_mask():
    model, inputs, sites = mistral(transformers)
    found = check(model.eval(), kwargs={**inputs, "return_dict": False}, train=False, sites=sites)
    assert all("7" in site.mask for site in found), [site.mask for site in found]


def test_grouped_heads_are_not_expanded():
    model, inputs, sites = llama(transformers)
    found = check(model.eval(), kwargs={**inputs, "return_dict": False}, train=False, sites=sites)
    assert [(site.dims["H"], site.dims["G"]) for site in found] == [(4, 2)] * 2


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_returns_eagers_tokens_and_rewrites_every_step(cache):
    """A model with layers of both kinds, sliding and full, generates beyond its window from prompts of two lengths, the
    second with padding on the left."""
    config = transformers.Gemma2Config(
        **GROUPED, sliding_window=7, query_pre_attn_scalar=8, attn_implementation="eager", eos_token_id=None
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    hidden = torch.ones(2, 11, dtype=torch.long)
    hidden[1, :4] = 0
    prompts = [dict(input_ids=tokens(2, 5)), dict(input_ids=tokens(2, 11), attention_mask=hidden)]
    how = dict(max_new_tokens=6, do_sample=False, cache_implementation=cache)
    expected = [model.generate(**prompt, **how) for prompt in prompts]
    model.forward = compiled(model.forward, inner="eager")
    with new_reports() as filed:
        found = [model.generate(**prompt, **how) for prompt in prompts]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    sites = [site for report in filed for site in report.sites]
    assert len(sites) >= 4 and all(site.rewritten for site in sites), "\n".join(map(str, filed))
