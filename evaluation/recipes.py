"""Recipes of the jobs that look at a trained model."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from data_pipeline.ingest.recipe import InputSection
from foundation.sections import Section
from models.flow_settings import FlowSettings, SamplerName


class Sampling(Section):
    """How a picture is sampled.

    Attributes:
        steps: solver steps of each patch's flow; 10 to 50 are useful.
        guidance: classifier-free guidance scale, 1 = none.
        sampler: `euler_maruyama` (the published one) or `euler` (the paper's eq. 4).
        seed: of the noise; the same seed gives the same picture.
    """

    steps: int = Field(default=FlowSettings().steps, gt=0)
    guidance: float = Field(default=FlowSettings().guidance, ge=1)
    sampler: SamplerName = FlowSettings().sampler
    seed: int = 0


class ComparedModel(Section):
    """One column of generated pictures: an export folder under a heading."""

    label: str
    folder: Path


class CompareRecipe(Section):
    """`bitdance compare`: photos beside their reconstructions and what models generate from their captions.

    Attributes:
        latents: finished latent dataset whose captions are the prompts.
        photos: the image shards that the latents were made from.
        resolution: resolution class of the dataset to look at.
        samples: the first so many samples of the class, None = all.
        tokenizer: folder of the binary tokenizer that decodes.
        models: the columns, left to right.
        sampling: the same for all models.
        output: folder for `grid.png` and `comparison.json`.
    """

    latents: Path
    photos: InputSection
    resolution: int = Field(gt=0)
    samples: int | None = Field(default=None, gt=0)
    tokenizer: Path
    models: list[ComparedModel] = Field(min_length=1)
    sampling: Sampling = Sampling()
    output: Path
