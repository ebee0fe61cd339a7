"""How well a tokenizer gives its pictures back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from models.tokenizer import BinaryTokenizer, to_uint8
from trainer.tokenizer_training.pictures import PictureGroup

BATCH_PIXELS = 1 << 18


def to_network(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, height, width, 3] -> float32 [B, 3, height, width] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.inference_mode()
def reconstruction_quality(network: BinaryTokenizer, groups: Sequence[PictureGroup]) -> list[dict[str, Any]]:
    """Mean PSNR (dB, of 8-bit pictures, data range 255) over the pictures of each size, in float32."""
    device = next(network.parameters()).device
    report = []
    for group in groups:
        height, width = group.size
        pixels = torch.from_numpy(group.pixels).to(device)
        ratios = []
        for batch in pixels.split(max(1, BATCH_PIXELS // (height * width))):
            given = to_uint8(network.decode(network.encode(to_network(batch)))).permute(0, 2, 3, 1)
            error = (given.double() - batch.double()).square().mean(dim=(1, 2, 3))
            ratios.append(10.0 * torch.log10(255.0**2 / error.clamp(min=1e-12)))
        report.append(
            {
                "resolution": group.resolution,
                "size": [height, width],
                "pictures": len(group.pixels),
                "psnr": round(float(torch.cat(ratios).mean()), 3),
            }
        )
    return report
