"""Blocks of the diffusion head, and linear layers that know how they start.

The layers initialize themselves as they are built, rather than in a later sweep over the model: under ZeRO-3
a layer's weights are sharded at the end of its constructor, and a sweep would find nothing to initialize.

B groups, P tokens per group, W width of the head. Tensors have the dtype of the weights, or autocast's.
Sources: modeling/vision_head/flow_head_parallel_x.py of the code published with the paper (arXiv 2602.14041);
adaLN is that of DiT (arXiv 2212.09748), SwiGLU arXiv 2002.05202, the single-token block MAR's (arXiv
2406.11838).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone.attention import attend_all
from models.head.config import HeadConfig


class XavierLinear(nn.Linear):
    """Linear with Xavier-uniform weights and zero biases."""

    def reset_parameters(self) -> None:
        """Called as the layer is built."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """Linear that starts at zero: adaLN projections and the final layer."""

    def reset_parameters(self) -> None:
        """Called as the layer is built."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class TimeLinear(nn.Linear):
    """Linear of the time embedding: weights N(0, 0.02^2), zero biases."""

    def reset_parameters(self) -> None:
        """Called as the layer is built."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, where `scale` already has its 1 added; float `[B, P, W]` each."""
    return torch.addcmul(shift, x, scale)


def split_modulation(modulation: Tensor, branches: int) -> tuple[Tensor, ...]:
    """float `[B, P, 3 branches W]` -> 1 + scale, shift, gate of each branch in turn, each `[B, P, W]`."""
    chunks = modulation.chunk(3 * branches, dim=-1)
    return tuple(1.0 + chunk if i % 3 == 0 else chunk for i, chunk in enumerate(chunks))


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of the two halves a, b of the last dimension: float `[..., 2F]` -> `[..., F]`."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


class HeadAttention(nn.Module):
    """Full attention among the P tokens of a group, without positions.

    The width W is split into W / head_width heads, for q, k and v alike.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = width // head_width, head_width
        self.wqkv = XavierLinear(width, 3 * width)
        self.wo = XavierLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """float `[B, P, W]` -> `[B, P, W]`."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.heads, self.head_width))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, P, head_width] each
        return self.wo(attend_all(q, k, v).transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """Attention and a feed-forward part, each with a LayerNorm modulated and a branch gated by adaLN."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, hidden = config.ch_latent, config.ffn_width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = HeadAttention(width, config.attention_head_width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.use_swiglu = config.use_swiglu
        if config.use_swiglu:
            self.w1 = XavierLinear(width, 2 * hidden)
            self.w2 = XavierLinear(hidden, width)
        else:
            self.mlp = nn.Sequential(XavierLinear(width, hidden), nn.SiLU(), XavierLinear(hidden, width))

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """float `[B, P, W]` -> `[B, P, W]`; modulation: six of that shape, from `split_modulation`."""
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), scale1, shift1)))
        return torch.addcmul(x, gate2, self.feed_forward(modulate(self.norm2(x), scale2, shift2)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """float `[B, P, W]` -> `[B, P, W]`, by SwiGLU or (`use_swiglu` false) Linear, SiLU, Linear."""
        return self.w2(swiglu(self.w1(x))) if self.use_swiglu else self.mlp(x)


class MLPBlock(nn.Module):
    """Block of the single-token head: a gated SwiGLU on a modulated LayerNorm."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, hidden = config.ch_latent, config.ffn_width
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.w1 = XavierLinear(width, 2 * hidden)
        self.w2 = XavierLinear(hidden, width)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """float `[B, 1, W]` -> `[B, 1, W]`; modulation: three of that shape, from `split_modulation`."""
        scale, shift, gate = modulation
        return torch.addcmul(x, gate, self.w2(swiglu(self.w1(modulate(self.norm(x), scale, shift)))))
