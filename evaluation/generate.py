"""From a prompt to pictures: an export folder, loaded once, sampled as often as asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from evaluation.recipes import Sampling
from foundation.errors import RecipeError
from foundation.files import atomic_write
from models.layout import from_patch_raster
from models.tokenizer import BinaryTokenizer, load_tokenizer, to_uint8
from models.weights import load_folder

# B pictures, C bits per token, h, w token grid


class PictureGenerator:
    """A model and its tokenizers, ready to sample.

    Args:
        folder: an export of training, or a published text-to-image folder.
        tokenizer: folder of the binary tokenizer, where the model's folder holds none.
        device: where the model runs.
        dtype: of the weights; the flow is solved in float32 all the same.

    Raises:
        RecipeError: no binary tokenizer in either place.
        ValueError: the folder is not a text-to-image model (see `models.weights.load_folder`).
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        loaded = load_folder(folder, dtype=dtype, device=device)
        self.model = loaded.model.eval()
        self.text_tokenizer, self.tokens = loaded.text_tokenizer, loaded.tokens
        place = tokenizer or loaded.tokenizer_folder
        if place is None:
            raise RecipeError(
                f"{folder} holds no binary tokenizer (ae.safetensors): name one with --tokenizer"
            )
        self.tokenizer: BinaryTokenizer = load_tokenizer(place).to(device).eval()
        self.device = torch.device(device)

    def bits(self, prompt: str, height: int, width: int, sampling: Sampling, pictures: int = 1) -> Tensor:
        """Sample the bits of ``pictures`` pictures.

        Args:
            prompt: what to paint.
            height, width: in pixels, multiples of the patch's side (p tokens).
            sampling: steps, guidance, sampler and seed.
            pictures: how many, in one batch, each with its own noise.

        Returns:
            float32 ``[pictures, C, h, w]`` of -1/+1, plain raster.

        Raises:
            ValueError: a size that doesn't fit, an empty prompt, one beyond the context.
        """
        downsample = self.tokenizer.config.downsample
        if height % downsample or width % downsample:
            raise ValueError(f"the size {height}x{width} is not a multiple of {downsample} pixels")
        h, w = height // downsample, width // downsample
        caption = self.text_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        patches = self.model.generate(
            self.tokens.prompt(caption) if caption else [],
            self.tokens.unconditional_prompt(),
            h,
            w,
            num_images=pictures,
            guidance=sampling.guidance,
            steps=sampling.steps,
            sampler=sampling.sampler,
            generator=torch.Generator(self.device).manual_seed(sampling.seed),
            tokens=self.tokens,
        )
        p = self.model.config.p
        plain = torch.stack([from_patch_raster(image, h, w, p) for image in patches])
        return plain.unflatten(1, (h, w)).permute(0, 3, 1, 2).float()

    @torch.inference_mode()
    def decode(self, bits: Tensor) -> list[Image.Image]:
        """Pictures of bits ``[B, C, h, w]``."""
        pixels = to_uint8(self.tokenizer.decode(bits.to(self.device))).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pixels]


def generate_files(
    generator: PictureGenerator,
    prompts: list[str],
    size: tuple[int, int],
    sampling: Sampling,
    pictures: int,
    output: Path,
) -> list[Path]:
    """Write a PNG for each picture of each prompt into ``output``; returns their paths.

    The prompt and the settings are in the PNG's text chunks, so that a picture can be made again.
    """
    paths = []
    for prompt in prompts:
        bits = generator.bits(prompt, *size, sampling, pictures)
        for number, picture in enumerate(generator.decode(bits)):
            paths.append(output / picture_name(prompt, sampling.seed, number))
            note = PngInfo()
            note.add_itxt("prompt", prompt)
            note.add_text("sampling", json.dumps(sampling.model_dump()))
            with atomic_write(paths[-1], "wb") as file:
                picture.save(file, format="PNG", pnginfo=note)
    return paths


def picture_name(prompt: str, seed: int, number: int) -> str:
    """A file name that tells the prompt and is unique to it: letters, digits and dashes alone."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in prompt.lower()).split()
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{'-'.join(words)[:48].strip('-') or 'picture'}-{digest}-s{seed}-{number}.png"
