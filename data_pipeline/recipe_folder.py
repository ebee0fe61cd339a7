"""An output folder belongs to the recipe that made it; another recipe is refused, naming what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.store import open_store
from foundation.errors import DataError, RecipeError
from foundation.partials import PARTIAL_SUFFIX
from foundation.recipes import differing_keys
from foundation.sections import Section

RECORD_NAME = "recipe.json"


def recipe_record(recipe: Section) -> str:
    """The recipe as the folder's `recipe.json` holds it."""
    return json.dumps(recipe.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def claim_folder(
    folder: str | Path, recipe: Section, done_name: str, free: frozenset[str] = frozenset()
) -> bool:
    """Whether `folder` is this recipe's finished output.

    Args:
        folder: the output, a folder or an `s3://` prefix, which need not exist.
        recipe: the recipe that wants to write there.
        done_name: the file whose presence says that the output is complete.
        free: top-level keys that may differ, because they do not change what is written.

    Raises:
        RecipeError: the folder was made by a recipe that differs in another key.
        DataError: the folder holds something else.
    """
    store = open_store(folder)
    text = store.read(RECORD_NAME)
    if text is None:
        if all(PARTIAL_SUFFIX in name for name in store.files()):
            return False
        text = store.read(RECORD_NAME)  # another job may have begun here just now
    if text is None:
        raise DataError(f"{folder} is not empty and holds no {RECORD_NAME}; name another output folder")
    try:
        earlier = json.loads(text)
    except ValueError as error:
        where = store.address(RECORD_NAME)
        raise DataError(f"{where} is not JSON ({error}); remove the folder or name another") from None
    now = recipe.model_dump(mode="json")
    for key in free:
        earlier.pop(key, None)
        now.pop(key, None)
    differences = differing_keys(_indexed(earlier), _indexed(now))
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise RecipeError(
            f"{folder} was made by another recipe; name another output folder or remove it. "
            f"Keys that differ (there -> here):\n{lines}"
        )
    return store.read(done_name) is not None


def _indexed(value: Any) -> Any:
    """Lists as mappings from their places, so that a difference names the entry and not the whole list."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    return {key: _indexed(inner) for key, inner in value.items()} if isinstance(value, dict) else value
