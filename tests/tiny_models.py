"""Tiny models with every kind of weight in them, for the tests of weights in and out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config

from models.class_conditional import ClassConditionalConfig, ClassConditionalModel
from models.head import HeadConfig
from models.layout import add_sequence_tokens
from models.text_to_image import TextToImageConfig, TextToImageModel
from models.text_tokens import train_text_tokenizer
from models.tokenizer import BinaryTokenizer, TokenizerConfig, save_tokenizer

CAPTIONS = ["a cat on a red sofa", "a cup of coffee", "a rocket at night"]


def text_tokenizer(p: int) -> PreTrainedTokenizerFast:
    tokenizer = train_text_tokenizer(CAPTIONS, vocab_size=300)
    add_sequence_tokens(tokenizer, p)
    return tokenizer


def text_to_image(vocabulary: int, p: int = 4, tied: bool = False, bits: int = 32) -> TextToImageModel:
    """Two layers of width 64, with random values in every parameter (adaLN starts at zero otherwise)."""
    llm = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    head = HeadConfig(
        ch_target=bits, ch_cond=64, ch_latent=128, depth_latent=2, depth_adanln=1, parallel_num=p * p
    )
    return randomized(TextToImageModel(TextToImageConfig(llm, head)))


def class_conditional(parallel_num: int = 4) -> ClassConditionalModel:
    config = ClassConditionalConfig(
        dim=128,
        n_layer=2,
        n_head=2,
        diff_layers=2,
        diff_dim=128,
        diff_adanln_layers=1,
        resolution=64,
        cls_token_num=4,
        num_classes=10,
        parallel_num=parallel_num,
    )
    return randomized(ClassConditionalModel(config))


def binary_tokenizer(gan: bool = False, bits: int = 32, levels: int = 5) -> BinaryTokenizer:
    factors = (1, 1, 2, 2, 2, 2)[:levels]
    config = TokenizerConfig(ch=32, ch_mult=factors, z_channels=bits, num_res_blocks=1, gan_decoder=gan)
    return randomized(BinaryTokenizer(config))


def tokenizer_folder(folder: Path, bits: int = 32) -> Path:
    save_tokenizer(binary_tokenizer(bits=bits), folder)
    return folder


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return module.eval()


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """Equal to the bit, in parameters and in computed buffers."""
    one, other = first.state_dict(), second.state_dict()
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name
    for (name, value), (_, again) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert torch.equal(value, again), name
