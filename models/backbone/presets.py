"""Sizes of the published Qwen3 language models, which the text-to-image models start from."""

from dataclasses import dataclass

from transformers import Qwen3Config

VOCABULARY = 151936
CONTEXT = 40960


@dataclass(frozen=True)
class BackboneSize:
    """One Qwen3: 8 key-value heads of width 128, untied or tied embeddings, as published."""

    layers: int
    width: int
    heads: int
    ffn_width: int
    tied: bool


BACKBONES: dict[str, BackboneSize] = {
    "0.6b": BackboneSize(28, 1024, 16, 3072, True),
    "1.7b": BackboneSize(28, 2048, 16, 6144, True),
    "4b": BackboneSize(36, 2560, 32, 9728, True),
    "8b": BackboneSize(36, 4096, 32, 12288, False),
    "14b": BackboneSize(40, 5120, 40, 17408, False),
    "32b": BackboneSize(64, 5120, 64, 25600, False),
}


def backbone_config(name: str, vocabulary: int = VOCABULARY) -> Qwen3Config:
    """The transformers config of a published size; ValueError on an unknown name.

    The published vocabulary has room for 267 tokens beyond the tokenizer's 151669; p = 4 adds 271 and p = 8
    adds 319, so give len(text_tokenizer) where that is larger.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r}: expected one of {', '.join(BACKBONES)}")
    size = BACKBONES[name]
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=size.ffn_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=CONTEXT,
        rope_theta=1_000_000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=size.tied,
        use_cache=False,
    )
