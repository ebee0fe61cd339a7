"""The layers of the binary tokenizer: convolutions, group norms, nothing else.

B batch, C bits per token, W channels; H and V rows and columns of a level, h and w of the token grid. Tensors
have the dtype of the weights, or autocast's.

Source: modeling/vision_encoder/autoencoder.py of the code published with the paper (arXiv 2602.14041).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tokenizer.config import NORM_GROUPS

NORM_EPS = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, eps 1e-6, with weights and biases; `channels` is a multiple of 32."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class Convolution(nn.Conv2d):
    """A convolution that starts with He-normal weights and zero biases.

    torch's own default is smaller by a factor of about 2.4, and learns visibly slower in the first few
    hundred steps of this network.
    """

    def reset_parameters(self) -> None:
        """Called as the layer is built."""
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ResidualBlock(nn.Module):
    """norm, swish, 3x3 convolution, twice; the shortcut is a 1x1 convolution where the width changes."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = Convolution(width_in, width_out, kernel_size=3, padding=1, bias=False)
        self.norm2 = group_norm(width_out)
        self.conv2 = Convolution(width_out, width_out, kernel_size=3, padding=1, bias=False)
        if width_in != width_out:
            self.nin_shortcut = Convolution(width_in, width_out, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, width_in, H, V] -> [B, width_out, H, V]."""
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        shortcut: Tensor = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + residual


def residual_blocks(count: int, width_in: int, width_out: int) -> nn.ModuleList:
    """`count` blocks, the first of which changes the width."""
    return nn.ModuleList(ResidualBlock(width_in if i == 0 else width_out, width_out) for i in range(count))


def depth_to_space(x: Tensor) -> Tensor:
    """[B, 4*W, H, V] of any dtype -> [B, W, 2*H, 2*V] in depth-column-row order.

    Input channel (row*2 + column)*W + c holds the pixel (row, column) of channel c's 2x2 block.
    (`torch.pixel_shuffle` has c outermost instead.) torch raises RuntimeError where 4 does not divide the
    channels.
    """
    batch, channels, rows, columns = x.shape
    x = x.view(batch, 2, 2, channels // 4, rows, columns)  # batch, row, column, c, H, V
    x = x.permute(0, 3, 4, 1, 5, 2)  # batch, c, H, row, V, column
    return x.reshape(batch, channels // 4, 2 * rows, 2 * columns)


class Upsample(nn.Module):
    """Twice the resolution at the same width: 3x3 convolution to four times the channels, depth to space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = Convolution(width, 4 * width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, W, H, V] -> [B, W, 2*H, 2*V]."""
        return depth_to_space(self.conv1(x))


class LatentStatistics:
    """What every adaptive norm reads: mean and deviation of the bits z [B, C, h, w] over positions, [B, C].

    The deviation is sqrt(variance + 1e-6); both have the float dtype of z.
    The variance is the unbiased one, which a grid of a single token has not.
    """

    def __init__(self, z: Tensor) -> None:
        self.mean = z.mean(dim=(2, 3))
        self.deviation = torch.sqrt(z.var(dim=(2, 3), unbiased=True) + NORM_EPS)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and shift are linear in the statistics of the latent bits.

    It starts as a plain group norm: scale 1 and shift 0, whatever the bits.
    """

    def __init__(self, bits: int, width: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(bits, width)
        self.beta = nn.Linear(bits, width)
        for parameter in (self.gamma.weight, self.beta.weight, self.beta.bias):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.gamma.bias)

    def forward(self, x: Tensor, latent: LatentStatistics) -> Tensor:
        """float [B, W, H, V] -> [B, W, H, V]; latent: the statistics [B, C] of the same pictures' bits."""
        scale = self.gamma(latent.deviation)[:, :, None, None]
        shift = self.beta(latent.mean)[:, :, None, None]
        return F.group_norm(x, NORM_GROUPS, eps=NORM_EPS) * scale + shift
