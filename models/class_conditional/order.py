"""Where the tokens of a class-conditional sequence stand, and who sees whom.

A sequence is: n class tokens, P - 1 query tokens, then the vision tokens of all patches but the last, in the
order of the model (patch raster, or plain raster). The first n - 1 positions are causal; every later run of P
positions is a block that predicts one patch. B images, C bits, h, w token grid, P tokens per step, e width of
an attention head.

Sources: imagenet_gen/src/model_parallel.py and layers_parallel.py of the code published with the paper (arXiv
2602.14041), whose table 14 compares orders and masks; rotary positions are arXiv 2104.09864.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from models.backbone.attention import plan_packed
from models.class_conditional.config import ClassConditionalConfig
from models.class_conditional.layers import Attend
from models.layout import from_patch_raster, to_patch_raster

ROPE_BASE = 10000.0


def to_sequence_order(bits: Tensor, config: ClassConditionalConfig) -> Tensor:
    """Bits `[B, C, h, w]` of any dtype -> `[B, h*w, C]` in the order that the model predicts them."""
    return to_patch_raster(
        bits.flatten(2).transpose(1, 2), config.grid, config.grid, config.patch_side, dim=1
    )


def from_sequence_order(bits: Tensor, config: ClassConditionalConfig) -> Tensor:
    """The inverse of `to_sequence_order`: `[B, h*w, C]` of any dtype -> `[B, C, h, w]`."""
    plain = from_patch_raster(bits, config.grid, config.grid, config.patch_side, dim=1)
    return plain.transpose(1, 2).unflatten(2, (config.grid, config.grid)).contiguous()


@lru_cache(maxsize=16)
def rotations(config: ClassConditionalConfig, device: torch.device) -> Tensor:
    """Unit complex numbers that rotate the pairs (2k, 2k+1) of q and k: complex64 `[sequence, 1, e/2]`.

    The token in column x and row y turns by (x + 1.5) w_k in its first e/4 pairs and by (y + 1.5) w_k in the
    others; w_k = 10000^(-2k/(e/2)), and e is the width of a head. Class and query tokens do not turn.
    """
    pairs = config.dim // config.n_head // 2
    # Cached: neither an inference tensor nor one on a caller's default device could be used later.
    with torch.inference_mode(False), torch.device("cpu"):
        frequencies = ROPE_BASE ** (-2.0 * torch.arange(pairs // 2, dtype=torch.float32) / pairs)
        side = torch.arange(config.grid, dtype=torch.float32) + 1.5
        column, row = side.repeat(config.grid), side.repeat_interleave(config.grid)
        angles = torch.cat([column[:, None] * frequencies, row[:, None] * frequencies], dim=-1)
        angles = to_patch_raster(angles, config.grid, config.grid, config.patch_side)
        still = torch.zeros(config.cls_token_num + config.parallel_num - 1, pairs)
        angles = torch.cat([still, angles])[: config.sequence, None]
        return torch.polar(torch.ones_like(angles), angles).to(device)


def block_ids(config: ClassConditionalConfig, device: torch.device) -> Tensor:
    """int64 `[sequence]`: the number of each position's block, 0 to M - 1, or -1 where it is causal only.

    Tokens see all earlier ones, and with `mask: block_causal` also the later ones of their block.
    """
    place = torch.arange(config.sequence, device=device) - (config.cls_token_num - 1)
    blocks = place.div(config.parallel_num, rounding_mode="floor").clamp_min(-1)
    return torch.full_like(blocks, -1) if config.mask == "causal" else blocks


@lru_cache(maxsize=16)
def sequence_attention(config: ClassConditionalConfig, positions: int, device: torch.device) -> Attend:
    """Attention of the first `positions` of a sequence to one another, under the model's mask.

    q, k, v `[B, H, positions, e]` of one float dtype -> the same shape; see `models.backbone.plan_packed`.
    """
    with torch.inference_mode(False):
        blocks = block_ids(config, device)[:positions]
        return plan_packed(torch.zeros_like(blocks), blocks)
