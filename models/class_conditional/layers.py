"""Layers of the class-conditional transformer: RMSNorm, rotary attention, SwiGLU; no biases but in `proj_in`.

Shapes: B sequences, T positions, D width, H heads of width e. Tensors have the dtype of the weights, or
autocast's.

Sources: imagenet_gen/src/layers_parallel.py of the code published with the paper (arXiv 2602.14041); RMSNorm
is arXiv 1910.07467, rotary positions 2104.09864, SwiGLU 2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.class_conditional.config import ClassConditionalConfig
from models.head.layers import swiglu

# (q, k, v), each [B, H, T, e] -> [B, H, T, e]; what is remembered of k and v is its own affair.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

INITIAL_STD = 0.02


class NormalLinear(nn.Linear):
    """Linear with weights N(0, 0.02^2) and, where it has them, zero biases."""

    def reset_parameters(self) -> None:
        """Called as the layer is built."""
        nn.init.normal_(self.weight, std=INITIAL_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NormalEmbedding(nn.Embedding):
    """Embedding with entries N(0, 0.02^2)."""

    def reset_parameters(self) -> None:
        """Called as the layer is built."""
        nn.init.normal_(self.weight, std=INITIAL_STD)


class SwiGLU(nn.Module):
    """w2(silu(a) * b) with a, b the halves of w1(x)."""

    def __init__(self, width_in: int, hidden: int, width_out: int, bias: bool) -> None:
        super().__init__()
        self.w1 = NormalLinear(width_in, 2 * hidden, bias=bias)
        self.w2 = NormalLinear(hidden, width_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """float `[..., width_in]` -> `[..., width_out]`."""
        return self.w2(swiglu(self.w1(x)))


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn the interleaved pairs (u, v) of the last dimension: (u cos - v sin, u sin + v cos), in float32.

    Args: x float `[..., T, H, e]`, rotations complex64 `[T, 1, e/2]`. Returns shape and dtype of x.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with 2D rotary positions; q, k and v come from one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = NormalLinear(width, 3 * width, bias=False)
        self.wo = NormalLinear(width, width, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, attend: Attend) -> Tensor:
        """float `[B, T, D]` -> `[B, T, D]`; rotations complex64 `[T, 1, e/2]`."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 2)  # [B, 3, T, H, e]
        # q and k turn alike, so one pass over both.
        q, k = rotate(qkv[:, :2], rotations).unbind(1)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), qkv[:, 2].transpose(1, 2))
        return self.wo(out.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config.dim, config.n_head)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.feed_forward = SwiGLU(config.dim, config.ffn_width, config.dim, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, attend: Attend) -> Tensor:
        """float `[B, T, D]` -> `[B, T, D]`; rotations complex64 `[T, 1, e/2]`."""
        x = x + self.attention(self.attention_norm(x), rotations, attend)
        return x + self.feed_forward(self.ffn_norm(x))
