"""From a prompt to pictures: an export folder, loaded once, sampled as often as asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from evaluation.picture_files import PictureRequest, write_picture
from evaluation.recipes import Sampling
from foundation.errors import RecipeError
from foundation.progress import track
from models.checks import is_count
from models.flow_settings import FlowSettings
from models.generation import Progress, check_request
from models.layout import encode_prompt, from_patch_raster
from models.tokenizer import BinaryTokenizer, load_tokenizer, to_uint8
from models.weights import ModelSource, build_model
from models.weights.class_conditional import ClassConditionalWeights
from models.weights.kinds import describe, open_weights

# B pictures, C bits per token, h, w token grid


class PictureGenerator:
    """A model and its tokenizers, ready to sample.

    Args:
        folder: an export of training, or a published text-to-image folder.
        tokenizer: folder of the binary tokenizer, where the model's folder holds none.
        device: where the model runs.
        dtype: of the weights; the flow is solved in float32 all the same.

    Raises:
        RecipeError: no binary tokenizer in either place, or one of other bits than the model's.
        ValueError: the folder is not there, or no whole text-to-image model (`models.weights.open_folder`),
            or the tokenizer's is no whole tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        source = _text_to_image(folder)
        self.model = build_model(source, dtype, device)
        if torch.device(device).type == "cuda":
            self.model.compile_for_sampling()
        self.text_tokenizer, self.tokens = source.text_tokenizer, source.tokens
        place = tokenizer or source.tokenizer_folder
        if place is None:
            raise RecipeError(
                f"{folder} holds no binary tokenizer (ae.safetensors): name one with --tokenizer"
            )
        self.tokenizer: BinaryTokenizer = load_tokenizer(place).to(device).eval()
        found, expected = self.tokenizer.config.z_channels, self.model.config.head.ch_target
        if found != expected:
            raise RecipeError(
                f"{place}: a tokenizer of {found} bits per token, expected the model's {expected}: name "
                "the one that the model was trained with"
            )
        self.device = torch.device(device)

    def check(
        self, prompts: Sequence[str], height: int, width: int, sampling: Sampling, pictures: int = 1
    ) -> None:
        """Raise one ValueError with everything that keeps `bits` from any of these prompts.

        A size that doesn't fit, an empty prompt, one beyond the context.
        """
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        grid = self._grid(height, width)
        check_request(self.model.config, self.tokens, ids, grid, pictures, _flow(sampling))

    def bits(
        self,
        prompt: str,
        height: int,
        width: int,
        sampling: Sampling,
        pictures: int = 1,
        progress: Progress = iter,
    ) -> Tensor:
        """Sample the bits of ``pictures`` pictures.

        Args:
            prompt: what to paint.
            height, width: in pixels, multiples of the patch's side (p tokens).
            sampling: steps, guidance, sampler and seed.
            pictures: how many, in one batch, each with its own noise.
            progress: goes through the patches, and may show how far it is.

        Returns:
            float32 ``[pictures, C, h, w]`` of -1/+1, plain raster.

        Raises:
            ValueError: as `check` says.
        """
        h, w = self._grid(height, width)
        patches = self.model.generate(
            self._prompt_ids(prompt),
            self.tokens.unconditional_prompt(),
            h,
            w,
            tokens=self.tokens,
            num_images=pictures,
            flow=_flow(sampling),
            generator=torch.Generator(self.device).manual_seed(sampling.seed),
            progress=progress,
        )
        p = self.model.config.p
        plain = torch.stack([from_patch_raster(image, h, w, p) for image in patches])
        return plain.unflatten(1, (h, w)).permute(0, 3, 1, 2).float()

    @torch.inference_mode()
    def decode(self, bits: Tensor) -> list[Image.Image]:
        """Pictures of bits ``[B, C, h, w]``."""
        pixels = to_uint8(self.tokenizer.decode(bits.to(self.device))).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pixels]

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """The size in tokens."""
        downsample = self.tokenizer.config.downsample
        side = downsample * self.model.config.p
        if not (is_count(height) and is_count(width)) or height % side or width % side:
            raise ValueError(
                f"the size {height}x{width}: sides of this model's pictures are multiples of {side} pixels"
            )
        return height // downsample, width // downsample

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Ids of the conditional prompt; none at all where the caption is blank, which `generate` refuses."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is {prompt!r}: expected text")
        return encode_prompt(self.text_tokenizer, prompt) if prompt.strip() else []


def _text_to_image(place: Path) -> ModelSource:
    """The model in a folder, checked; ValueError says what is there instead, and what to do with it."""
    if not place.exists():
        raise ValueError(f"{place}: no such folder; expected an export of training, or a published model")
    weights = open_weights(place)
    if isinstance(weights, ModelSource):
        return weights
    in_python = (
        "; a class-conditional one draws classes, in Python: `bitdance import` makes a folder of it for "
        "models.weights.class_conditional.load_class_conditional, and models.class_conditional.sample draws"
    )
    raise ValueError(
        f"{place} is a {describe(weights)}. Prompts are painted by a text-to-image model"
        + (in_python if isinstance(weights, ClassConditionalWeights) else "")
    )


def _flow(sampling: Sampling) -> FlowSettings:
    return FlowSettings(sampling.guidance, sampling.steps, sampling.sampler)


def generate_files(
    generator: PictureGenerator, request: PictureRequest, size: tuple[int, int], sampling: Sampling
) -> None:
    """Write a request's pictures, each with its settings in a text chunk, so that it can be made again."""
    shown = partial(track, description=f"Generating {request.prompt[:40]!r}, patches")
    bits = generator.bits(request.prompt, *size, sampling, len(request.paths), shown)
    for path, picture in zip(request.paths, generator.decode(bits), strict=True):
        write_picture(path, picture, request.settings)
