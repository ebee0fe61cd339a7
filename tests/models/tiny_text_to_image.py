"""A tiny text-to-image model with random weights everywhere, its special tokens, and random samples."""

import torch
from transformers import Qwen3Config

from models.head import HeadConfig
from models.layout import Sample, SequenceTokens
from models.text_to_image import TextToImageConfig, TextToImageModel

WIDTH, BITS, CONTEXT = 32, 6, 128


def tiny_config(p: int = 2, **changes: int) -> TextToImageConfig:
    sizes = {
        "vocab_size": 400,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
    }
    head = HeadConfig(
        ch_target=BITS, ch_cond=WIDTH, ch_latent=128, depth_latent=2, depth_adanln=2, parallel_num=p * p
    )
    return TextToImageConfig(Qwen3Config(**(sizes | changes)), head)


def tiny_model(p: int = 2, seed: int = 0) -> TextToImageModel:
    """Random weights everywhere: a fresh head predicts nothing, for its last layer starts at zero."""
    torch.manual_seed(seed)
    model = TextToImageModel(tiny_config(p)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                parameter.normal_(std=0.15)
    return model


def tiny_tokens(p: int = 2) -> SequenceTokens:
    return SequenceTokens(
        im_start=300,
        im_end=301,
        vision_start=302,
        vision_end=303,
        res={k: 310 + k for k in range(1, 17)},
        query=tuple(340 + i for i in range(1, p * p)),
        user_prefix=(300, 10, 11),
        turn_end=(301, 11),
        assistant=(300, 12, 11),
    )


def tiny_sample(seed: int, h: int = 4, w: int = 6, p: int = 2, **changes: object) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    patches = h * w // (p * p)
    fields: dict[str, object] = {
        "bits": torch.randint(0, 2, (h * w, BITS), generator=generator) * 2 - 1,
        "h": h,
        "w": w,
        "caption_ids": torch.randint(20, 200, (3 + seed % 4,), generator=generator).tolist(),
        "flip": torch.rand(h * w, BITS, generator=generator) < 0.1,
        "t": torch.rand(patches, generator=generator),
        "noise": torch.randn(patches, p * p, BITS, generator=generator),
        "key": str(seed),
    }
    return Sample(**(fields | changes))  # type: ignore[arg-type]
