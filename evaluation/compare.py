"""`bitdance compare`: whether there is anything to do, and then `evaluation.comparison`. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from evaluation.recipes import CompareRecipe
from foundation.errors import DataError
from foundation.files import sha256_file
from foundation.json_files import read_json
from foundation.ownership import FolderTaken
from foundation.progress import say
from foundation.recipes import recipe_hash

OWN_FILES = {"grid.png", "comparison.json"}
MEND = "delete it, and `bitdance compare` makes it anew"


def compare(recipe: CompareRecipe) -> None:
    """Write `grid.png` and `comparison.json` into the recipe's output folder, unless they are up to date.

    Raises:
        DataError, RecipeError: a folder is missing or doesn't fit the others.
        FolderTaken: the output folder is something else's.
        ValueError: what models/ says of a folder.
    """
    identity = identity_of(recipe)
    done = recipe.output / "comparison.json"
    if done.exists() and read_json(done, MEND).get("identity") == identity:
        say(f"nothing to do: {done} is up to date")
        return
    refuse_foreign(recipe.output)
    from evaluation.comparison import make_comparison

    make_comparison(recipe, identity)


def refuse_foreign(folder: Path) -> None:
    """FolderTaken where a folder holds anything but a comparison."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(name for name in names - OWN_FILES if not name.startswith("."))
    if foreign:
        raise FolderTaken(
            f"the output folder {folder} holds {foreign[0]!r}, which no comparison has made: give another one"
        )


def identity_of(recipe: CompareRecipe) -> dict[str, str]:
    """What a comparison depends on: the recipe, the dataset's manifest, the models' weights.

    Folders are known by the files that give them their identity, so that a comparison is only repeated when
    one of the models, the dataset or the recipe has changed.
    """
    files = [recipe.latents / "manifest.json", recipe.tokenizer / "ae.safetensors"]
    for model in recipe.models:
        weights = sorted(model.folder.glob("*.safetensors"))
        if not weights:
            raise DataError(f"{model.folder} holds no model ({model.label!r}): export it first")
        files += weights
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise DataError(f"not found: {', '.join(missing)}")
    return {"recipe": recipe_hash(recipe), **{str(file): sha256_file(file) for file in files}}
