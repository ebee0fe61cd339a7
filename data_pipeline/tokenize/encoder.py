"""The binary tokenizer as the pipeline uses it: batches of pixels in, bits out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import TokenizerManifest
from data_pipeline.tokenize.recipe import TokenizeRecipe
from foundation.errors import RecipeError


class Encoder:
    """A loaded tokenizer.

    Args:
        folder: of the tokenizer.
        dtype: `float32` or `bfloat16`, for weights and activations.
        device: a torch device.

    Raises:
        RecipeError: the folder holds no tokenizer, or the device is not there.
    """

    def __init__(self, folder: str, dtype: str, device: str):
        import torch

        from models.tokenizer import load_tokenizer

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RecipeError("compute.device: cuda, but torch sees no GPU here; set compute.device=cpu")
        try:
            tokenizer = load_tokenizer(folder, device)
        except ValueError as error:
            raise RecipeError(f"tokenizer: {error}") from None
        self.tokenizer: Any = tokenizer.to(getattr(torch, dtype))
        self.device = device
        self.downsample: int = tokenizer.config.downsample

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        """Encode pictures of one size, without padding.

        Args:
            pixels: uint8 `[B, height, width, 3]`.

        Returns:
            int8 `[B, h*w, C]` of -1/+1, tokens in plain raster order.
        """
        import torch

        with torch.inference_mode():
            image = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
            # The inverse of the decoder's `127.5 * x + 128`, truncated: 0 is -1 and 255 is +1.
            scaled = (image.float() / 127.5 - 1.0).to(next(self.tokenizer.parameters()).dtype)
            bits = self.tokenizer.encode(scaled)  # [B, C, h, w]
            plain = bits.permute(0, 2, 3, 1).flatten(1, 2)  # [B, h*w, C]
            return plain.to("cpu", torch.int8).numpy()


def describe_tokenizer(recipe: TokenizeRecipe) -> TokenizerManifest:
    """What the manifest says about the recipe's tokenizer; RecipeError where there is none."""
    from models.tokenizer import read_tokenizer_config, tokenizer_fingerprint

    try:
        config = read_tokenizer_config(recipe.tokenizer)
        fingerprint = tokenizer_fingerprint(recipe.tokenizer)
    except (ValueError, OSError) as error:
        raise RecipeError(f"tokenizer: {error}") from None
    return TokenizerManifest(
        fingerprint=fingerprint,
        downsample=config.downsample,
        bits_per_token=config.z_channels,
        dtype=recipe.dtype,
        folder=str(Path(recipe.tokenizer)),
    )
