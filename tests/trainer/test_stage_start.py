"""What is checked before a stage starts: latents, text tokenizer and model belong together."""

from pathlib import Path

import pytest
from small_stage import CAPTIONS, make_inputs, write_recipe

from data_pipeline.latents import LatentDataset
from foundation.errors import DataError, RecipeError
from foundation.recipes import load_recipe
from models.text_tokens import train_text_tokenizer
from trainer.recipe import StageRecipe
from trainer.stage_start import check_dataset, open_start


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def check(inputs: Path, **changes: object) -> None:
    recipe = load_recipe(StageRecipe, write_recipe(inputs, **changes))
    check_dataset(recipe, open_start(recipe), LatentDataset(recipe.data.latents))


def test_what_belongs_together_passes(inputs: Path) -> None:
    check(inputs)


def test_another_text_tokenizer_is_refused_before_the_start(inputs: Path) -> None:
    other = train_text_tokenizer([caption[::-1] for caption in CAPTIONS], 280)
    other.save_pretrained(inputs / "other-text")
    with pytest.raises(DataError, match=r"'128-0' has \d+ tokens there, \d+ by the model's text tokenizer"):
        check(inputs, model__random__text_tokenizer=str(inputs / "other-text"))


def test_pictures_of_a_size_that_the_model_cannot_have_are_refused(inputs: Path) -> None:
    samples = {"every_steps": 1, "prompts": ["a rocket"], "size": [128, 100]}
    with pytest.raises(RecipeError, match="expected multiples of 64 pixels"):
        check(inputs, samples=samples)
