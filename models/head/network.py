"""The net of the diffusion head: predicts clean bits from noisy ones, a time and a condition.

Shapes: B groups of tokens, P tokens per group, C bits, D width of the condition, W width of the head.
Parameter names are those of the published weights. Tensors have the weights' dtype unless said otherwise.

Sources: modeling/vision_head/flow_head_parallel_x.py of the code published with the paper (arXiv 2602.14041);
time features, modulation and the final layer are those of DiT (arXiv 2212.09748).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.head.config import HeadConfig
from models.head.layers import (
    MLPBlock,
    TimeLinear,
    TransformerBlock,
    XavierLinear,
    ZeroLinear,
    modulate,
    split_modulation,
)

TIME_FREQUENCIES = 128


def time_features(t: Tensor) -> Tensor:
    """`[cos, sin]` of 1000 t at frequencies exp(-ln(10000) i / 128), i < 128.

    t `[N]` in [0, 1], any float dtype -> float32 `[N, 256]` in [-1, 1].
    """
    exponents = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device) / TIME_FREQUENCIES
    angles = (1000.0 * t.float())[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """`time_features`, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = TimeLinear(2 * TIME_FREQUENCIES, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), TimeLinear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t `[N]` in [0, 1], any float dtype -> `[N, W]` in the dtype of the weights."""
        return self.mlp(time_features(t).to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    """LayerNorm modulated by y, then the projection to bits."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_ln_modulation = ZeroLinear(width, 2 * width)
        self.linear = ZeroLinear(width, bits)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x and y float `[B, P, W]` -> `[B, P, C]`, unbounded; zero before any training."""
        scale, shift = self.ada_ln_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), 1.0 + scale, shift))


class HeadNetwork(nn.Module):
    """`res_blocks` modulated by adaLN projections that runs of consecutive blocks share."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.ch_latent
        self.input_proj = XavierLinear(config.ch_target, width)
        self.cond_embed = XavierLinear(config.ch_cond, width)
        self.time_embed = TimeEmbedding(width)
        self.branches = 1 if config.single_token else 2  # gated branches of a block
        self.ada_ln_blocks = nn.ModuleList(
            ZeroLinear(width, 3 * self.branches * width) for _ in range(config.depth_adanln)
        )
        block = MLPBlock if config.single_token else TransformerBlock
        self.res_blocks = nn.ModuleList(block(config) for _ in range(config.depth_latent))
        self.final_layer = FinalLayer(width, config.ch_target)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Predicted bits.

        Args: x_t `[N, P, C]` float32, t `[N]` float32 in [0, 1], cond `[N, P, D]` in any float dtype.
        Returns `[N, P, C]` in the weights' dtype; within [-1, 1] for text-to-image heads, unbounded for
            class-conditional ones.
        """
        return self.denoise(self.embed_tokens(x_t), self.time_embed(t)[:, None], self.embed_condition(cond))

    def embed_tokens(self, x_t: Tensor) -> Tensor:
        """Noisy bits `[N, P, C]`, any float dtype -> `[N, P, W]` in the dtype of the weights."""
        return self.input_proj(x_t.to(self.input_proj.weight.dtype))

    def embed_condition(self, cond: Tensor) -> Tensor:
        """`[N, P, D]`, any float dtype -> `[N, P, W]` in the dtype of the weights.

        The same at every time, so a sampler calls it once.
        """
        return self.cond_embed(cond.to(self.cond_embed.weight.dtype))

    def denoise(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """The part that depends on tokens, time and condition at once.

        Args: x `[N, P, W]`, time broadcastable to it (`[N, 1, W]` or `[W]`), cond `[N, P, W]`, all in the
            float dtype of the weights.
        Returns `[N, P, C]` in that dtype, bounded as in `forward`.
        """
        y = F.silu(time + cond)
        blocks_per_projection = len(self.res_blocks) // len(self.ada_ln_blocks)
        for index, block in enumerate(self.res_blocks):
            if index % blocks_per_projection == 0:
                projected = self.ada_ln_blocks[index // blocks_per_projection](y)
                modulation = split_modulation(projected, self.branches)
            x = block(x, modulation)
        out = self.final_layer(x, y)
        return 2.0 * torch.sigmoid(out) - 1.0 if self.config.variant == "text_to_image" else out
