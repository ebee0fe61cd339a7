"""The sizes of the model that a recipe trains, from wherever they are written; no weights are needed.

What a stage starts from may not exist yet (the export of the stage before) or not be here (a hub's model).
Then its size comes from the recipe that will make it, or from what is known of the published models; what had
to be assumed is said.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import yaml
from transformers import Qwen3Config

from foundation.errors import RecipeError
from foundation.recipes import load_recipe
from models.backbone import read_backbone_config
from models.backbone.presets import BACKBONES, VOCABULARY, backbone_config
from models.layout import TemplateLengths
from models.layout.grid import MAX_SIDE
from models.text_to_image import TextToImageConfig, preset
from models.text_tokens import load_text_tokenizer
from models.tokenizer import read_tokenizer_config
from models.weights import read_folder_config
from models.weights.layout import LLM_CONFIG
from trainer.model_recipe import RandomSection
from trainer.recipe import StageRecipe
from trainer.stage_start import fresh_head_config

QWEN_TOKENS = 151_669
"""Entries of the Qwen3 text tokenizers, special tokens included."""
QWEN_TEMPLATE = TemplateLengths(user=3, turn_end=2, assistant=3)
PUBLISHED_BITS, PUBLISHED_DOWNSAMPLE = 32, 16


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """A model's configuration, and what of it was assumed."""

    config: TextToImageConfig
    assumptions: tuple[str, ...]


def model_size(recipe: StageRecipe, recipe_path: Path) -> ModelSize:
    """The size of the model that the recipe trains.

    Args:
        recipe_path: where the recipe lies: one that makes what it starts from is looked for beside it.

    Raises:
        RecipeError: nothing tells the size.
    """
    try:
        if recipe.model.init_from is not None:
            return _of_parent(recipe, recipe_path)
        return _of_fresh_head(recipe)
    except ValueError as error:
        raise RecipeError(f"The size of the model of {recipe_path} cannot be told: {error}") from error


def _of_parent(recipe: StageRecipe, recipe_path: Path) -> ModelSize:
    assert recipe.model.init_from is not None
    parent = Path(recipe.model.init_from)
    published = re.search(r"bitdance-([0-9.]+b)", parent.name.lower())
    if parent.is_dir():
        size = ModelSize(read_folder_config(parent), ())
    elif published is not None and published[1] in BACKBONES:
        p = recipe.model.grow_from or recipe.model.p
        config = preset(
            published[1],
            p,
            PUBLISHED_BITS,
            PUBLISHED_DOWNSAMPLE,
            max(VOCABULARY, QWEN_TOKENS + _added(p)),
        )
        said = f"{parent} is not here: it has the published size of BitDance-{published[1].upper()}, p = {p}"
        size = ModelSize(config, (said,))
    else:
        maker = _recipe_that_makes(parent, recipe_path)
        made = model_size(load_recipe(StageRecipe, maker), maker)
        size = ModelSize(
            made.config, (f"{parent} does not exist yet: its size is that of {maker}", *made.assumptions)
        )
    config = size.config
    if config.p == recipe.model.p:
        return size
    head = dataclasses.replace(config.head, parallel_num=recipe.model.p**2)
    llm = Qwen3Config.from_dict(config.llm.to_dict())
    llm.vocab_size += recipe.model.p**2 - config.p**2  # the query tokens that are added
    return ModelSize(TextToImageConfig(llm, head, config.tokenizer_downsample), size.assumptions)


def _recipe_that_makes(export: Path, recipe_path: Path) -> Path:
    """The recipe beside this one whose run has this export."""
    for candidate in sorted(recipe_path.parent.glob("*.yaml")):
        try:
            values = yaml.safe_load(candidate.read_text())
        except yaml.YAMLError:
            continue
        if isinstance(values, dict) and values.get("run") and Path(values["run"]) / "export" == export:
            return candidate
    raise RecipeError(
        f"model.init_from: {export} does not exist, and no recipe in {recipe_path.parent} has "
        f"`run: {export.parent}`. Train or fetch what this stage starts from, or put the recipe that makes "
        "it beside this one."
    )


def _of_fresh_head(recipe: StageRecipe) -> ModelSize:
    section = recipe.model.head
    assert section is not None
    assumptions: list[str] = []
    llm = _language_model(recipe, assumptions)
    bits, downsample = _tokenizer(recipe, assumptions)
    head = fresh_head_config(section, recipe.model.p, bits, llm.hidden_size)
    return ModelSize(TextToImageConfig(llm, head, downsample), tuple(assumptions))


def _language_model(recipe: StageRecipe, assumptions: list[str]) -> Qwen3Config:
    if recipe.model.random is not None:
        return _random_language_model(recipe.model.random, recipe.model.p, assumptions)
    name = recipe.model.pretrained
    assert name is not None
    if (Path(name) / LLM_CONFIG).is_file():
        llm = read_backbone_config(Path(name) / LLM_CONFIG)
    else:
        published = re.search(r"qwen3-([0-9.]+b)", name.lower())
        if published is None or published[1] not in BACKBONES:
            raise RecipeError(
                f"model.pretrained: {name} is neither a folder with a config.json nor one of "
                + ", ".join(f"Qwen/Qwen3-{size.upper()}" for size in BACKBONES)
            )
        llm = backbone_config(published[1])
        assumptions.append(f"{name} is not here: it has the published size of Qwen3-{published[1].upper()}")
    llm.vocab_size = max(llm.vocab_size, QWEN_TOKENS + _added(recipe.model.p))
    return llm


def _random_language_model(section: RandomSection, p: int, assumptions: list[str]) -> Qwen3Config:
    if Path(section.text_tokenizer).is_dir():
        vocabulary = len(load_text_tokenizer(section.text_tokenizer))
    else:
        vocabulary = QWEN_TOKENS
        assumptions.append(
            f"{section.text_tokenizer} is not here: it has as many entries as Qwen's, {vocabulary}"
        )
    return Qwen3Config(vocab_size=vocabulary + _added(p), use_cache=False, **section.backbone.model_dump())


def _tokenizer(recipe: StageRecipe, assumptions: list[str]) -> tuple[int, int]:
    """(bits per token, pixels of a token's side)."""
    try:
        config = read_tokenizer_config(recipe.tokenizer)
    except ValueError:
        assumptions.append(
            f"{recipe.tokenizer} is not here: a token has {PUBLISHED_BITS} bits and stands for "
            f"{PUBLISHED_DOWNSAMPLE} x {PUBLISHED_DOWNSAMPLE} px"
        )
        return PUBLISHED_BITS, PUBLISHED_DOWNSAMPLE
    return config.z_channels, config.downsample


def _added(p: int) -> int:
    """Entries that the sequence layout adds to a text tokenizer."""
    return MAX_SIDE + p * p - 1
