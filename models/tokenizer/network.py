"""The binary tokenizer: pictures to bits and back.

B batch, C bits per token, H and V rows and columns of pixels, h and w of the token grid, d downsampling.
Pictures and bits have the dtype of the weights (under autocast any float dtype), which the result keeps.
Names of modules are part of the format: the state dict holds `encoder.*` and `decoder.*` as published.

Source: the paper (arXiv 2602.14041); modeling/vision_encoder/autoencoder.py of the published code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import is_count
from models.tokenizer.config import TokenizerConfig
from models.tokenizer.layers import (
    AdaptiveGroupNorm,
    Convolution,
    LatentStatistics,
    Upsample,
    group_norm,
    residual_blocks,
)
from models.tokenizer.quantization import binarize


class EncoderLevel(nn.Module):
    """Residual blocks at one resolution, then half of it where the level `shrinks`."""

    def __init__(self, entering: int, width: int, blocks: int, shrinks: bool) -> None:
        super().__init__()
        self.block = residual_blocks(blocks, entering, width)
        self.downsample = (
            Convolution(width, width, kernel_size=3, stride=2, padding=1) if shrinks else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """float [B, entering, H, V] -> [B, width, H, V], or [B, width, H/2, V/2] where it shrinks."""
        for block in self.block:
            x = block(x)
        out: Tensor = self.downsample(x)
        return out


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, then twice of it where the level `grows`."""

    def __init__(self, entering: int, width: int, blocks: int, grows: bool) -> None:
        super().__init__()
        self.block = residual_blocks(blocks, entering, width)
        self.upsample = Upsample(width) if grows else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """float [B, entering, H, V] -> [B, width, H, V], or [B, width, 2*H, 2*V] where it grows."""
        for block in self.block:
            x = block(x)
        out: Tensor = self.upsample(x)
        return out


class Encoder(nn.Module):
    """From pictures to the values whose signs are the bits."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        blocks, widths = config.num_res_blocks, config.widths
        self.conv_in = Convolution(config.in_channels, config.ch, kernel_size=3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            entering = widths[i - 1] if i > 0 else config.ch
            self.down.append(EncoderLevel(entering, width, blocks, shrinks=i < len(widths) - 1))
        self.mid_block = residual_blocks(blocks, widths[-1], widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = Convolution(widths[-1], config.z_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """float [B, 3, H, V] in [-1, 1] -> [B, C, h, w], unbounded."""
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        for block in self.mid_block:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Decoder(nn.Module):
    """From bits to pictures.

    The GAN decoder sees normal noise beside the bits in its first convolution; its adaptive norms read the
    bits alone.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        blocks, widths, bits = config.num_res_blocks, config.widths, config.z_channels
        inputs = 2 * bits if config.gan_decoder else bits
        self.conv_in = Convolution(inputs, widths[-1], kernel_size=3, padding=1)
        self.mid_block = residual_blocks(blocks, widths[-1], widths[-1])
        self.adaptive = nn.ModuleList()
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            entering = widths[min(i + 1, len(widths) - 1)]  # the level's first block changes the width
            self.adaptive.append(AdaptiveGroupNorm(bits, entering))
            self.up.append(DecoderLevel(entering, width, blocks, grows=i > 0))
        self.norm_out = group_norm(widths[0])
        self.conv_out = Convolution(widths[0], config.out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor, noise: Tensor | None) -> Tensor:
        """Bits z, float [B, C, h, w] of -1/+1 -> picture [B, 3, H, V], about [-1, 1].

        noise: standard normal [B, C, h, w] for a GAN decoder, None for the others. ValueError on a grid of a
        single token, whose bits have no variance.
        """
        latent = LatentStatistics(z)
        x = self.conv_in(z if noise is None else torch.cat([z, noise], dim=1))
        for block in self.mid_block:
            x = block(x)
        for i in reversed(range(len(self.up))):
            x = self.up[i](self.adaptive[i](x, latent))
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class BinaryTokenizer(nn.Module):
    """Pictures to bits and back: a token of C bits for each square of `config.downsample` pixels a side.

    Encode at the exact size that is wanted: the group norms see the whole picture, so padding changes bits
    all over.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_raw(self, image: Tensor) -> Tensor:
        """Picture, float [B, 3, H, V] in [-1, 1] -> the values whose signs are the bits, [B, C, H/d, V/d].

        The values are unbounded. Raises ValueError where the shape is another, the dtype is no float or not
        that of the weights (under autocast: float64), or a side is no multiple of the downsampling d.
        """
        side = self.config.downsample
        if not isinstance(image, Tensor):
            raise ValueError(f"a picture is a {type(image).__name__}, expected a float tensor in [-1, 1]")
        if image.dim() != 4 or image.shape[1] != self.config.in_channels:
            expected = f"[batch, {self.config.in_channels}, rows, columns]"
            raise ValueError(f"a picture of shape {list(image.shape)}, expected {expected}")
        if not image.is_floating_point():
            raise ValueError(
                f"a picture of {image.dtype}, expected floats in [-1, 1]: of 0..255, take x / 127.5 - 1"
            )
        weights = self.encoder.conv_out.weight.dtype
        converts = torch.is_autocast_enabled(image.device.type) and image.dtype != torch.float64
        if image.dtype != weights and not converts:
            raise ValueError(
                f"a picture of {image.dtype}, but the tokenizer's weights are {weights}: convert the picture "
                f"with .to({weights}), or the tokenizer"
            )
        rows, columns = image.shape[2:]
        if rows == 0 or columns == 0 or rows % side or columns % side:
            raise ValueError(
                f"a picture of {rows}x{columns} pixels (rows x columns), expected multiples of {side}, the "
                "tokenizer's downsampling: resize or crop it (padding would change the bits)"
            )
        raw: Tensor = self.encoder(image)
        return raw

    def encode(self, image: Tensor) -> Tensor:
        """Picture, float [B, 3, H, V] in [-1, 1] -> bits [B, C, H/d, V/d] of -1 and +1 in the same dtype.

        ValueError as of `encode_raw`, or where the picture has values that are no numbers, or infinite: they
        have no sign, and through the norms neither has any other value.
        """
        raw = self.encode_raw(image)
        if not image.isfinite().all():
            broken = int((~image.isfinite()).sum())
            raise ValueError(
                f"a picture with {broken} values that are NaN or infinite, expected floats in [-1, 1]: "
                "read or compute it again"
            )
        return binarize(raw)

    def encode_all(self, images: Sequence[Tensor], batch_size: int) -> list[Tensor]:
        """Pictures, float [3, H, V] in [-1, 1] of any sizes -> their bits [C, H/d, V/d], in the same order.

        Pictures of equal size go through the network together, at most `batch_size` (>= 1) at a time.
        ValueError as of `encode_raw`, or where `batch_size` is less.
        """
        if not is_count(batch_size):
            raise ValueError(f"batch_size is {batch_size!r}, expected a whole number of at least 1")
        of_size: dict[torch.Size, list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            of_size[image.shape].append(index)
        bits: dict[int, Tensor] = {}
        for indices in of_size.values():
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                encoded = self.encode(torch.stack([images[index] for index in batch]))
                bits.update(zip(batch, encoded, strict=True))
        return [bits[index] for index in range(len(images))]

    def decode(self, bits: Tensor, noise: Tensor | None = None) -> Tensor:
        """Bits, float [B, C, h, w] of -1 and +1 -> picture [B, 3, h*d, w*d], about [-1, 1], not clamped.

        `noise` (same shape as `bits`, normal) is for a GAN decoder, which draws it where none is given.
        Raises ValueError where the shapes do not fit, the grid is a single token, or noise is given to
        a decoder that takes none.
        """
        if not isinstance(bits, Tensor):
            raise ValueError(f"bits are a {type(bits).__name__}, expected a float tensor of -1 and +1")
        if bits.dim() != 4 or bits.shape[1] != self.config.z_channels:
            expected = f"[batch, {self.config.z_channels}, rows, columns]"
            raise ValueError(f"bits of shape {list(bits.shape)}, expected {expected}")
        if bits.shape[2] * bits.shape[3] < 2:
            rows, columns = bits.shape[2:]
            raise ValueError(f"bits of a grid of {rows}x{columns} tokens, expected at least two tokens")
        if not bits.is_floating_point():
            raise ValueError(f"bits of {bits.dtype}, expected floats -1 and +1: convert them with .float()")
        if self.config.gan_decoder:
            noise = torch.randn_like(bits) if noise is None else noise
        elif noise is not None:
            raise ValueError("noise was given, but this tokenizer has no GAN decoder (gan_decoder is false)")
        if noise is not None and noise.shape != bits.shape:
            raise ValueError(
                f"noise of shape {list(noise.shape)}, expected {list(bits.shape)}, that of the bits"
            )
        picture: Tensor = self.decoder(bits, noise)
        return picture


def to_uint8(image: Tensor) -> Tensor:
    """Float [...], about [-1, 1] -> uint8 [...]: 127.5*x + 128, clamped to 0..255 and truncated."""
    return (127.5 * image + 128.0).clamp(0, 255).to(torch.uint8)
