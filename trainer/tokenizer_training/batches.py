"""Which pictures a step sees: a pure function of the recipe, the pictures, and the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.tokenizer_training.pictures import PictureGroup
from trainer.tokenizer_training.recipe import PhaseSection, TokenizerRecipe


def phase_of(recipe: TokenizerRecipe, step: int) -> PhaseSection:
    """The phase that the 0-based `step` belongs to."""
    for phase in recipe.phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    raise AssertionError("a step beyond the last phase")


def batch_of_step(recipe: TokenizerRecipe, groups: Sequence[PictureGroup], step: int) -> NDArray[np.uint8]:
    """The pictures of a 0-based step, uint8 [B, height, width, 3].

    The size is drawn in proportion to its pictures, then distinct pictures of that size: at most all of them.
    """
    phase = phase_of(recipe, step)
    draw = np.random.default_rng((recipe.seed, step))
    candidates = [group for group in groups if group.resolution in phase.resolutions]
    counts = np.array([len(group.pixels) for group in candidates], dtype=np.float64)
    group = candidates[draw.choice(len(candidates), p=counts / counts.sum())]
    height, width = group.size
    size = min(max(1, phase.batch_pixels // (height * width)), len(group.pixels))
    return group.pixels[draw.choice(len(group.pixels), size=size, replace=False)]
