"""Whether a tokenizer is trained already. Imports no torch, so that a second start answers at once."""

from __future__ import annotations

from data_pipeline.recipe_folder import claim_folder
from foundation.progress import say
from trainer.tokenizer_training.recipe import TokenizerRecipe

DONE_FILE = "ae_config.json"  # the last file that the export puts into the folder
FREE_KEYS = frozenset({"max_bad_fraction"})  # may differ: it does not change what is trained on


def is_finished(recipe: TokenizerRecipe) -> bool:
    """Whether the recipe's folder holds its tokenizer; says so where it does.

    Raises:
        FolderTaken: the folder belongs to another recipe, or holds something else.
    """
    finished = claim_folder(recipe.output, recipe, DONE_FILE, FREE_KEYS)
    if finished:
        say(f"{recipe.output}: this tokenizer is trained already")
    return finished
