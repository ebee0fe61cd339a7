"""An output folder belongs to the recipe that made it; another recipe is refused, naming what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import pydantic

from data_pipeline.store import open_store
from foundation.errors import DataError
from foundation.json_files import parse_json
from foundation.ownership import FolderTaken, taken_by_another
from foundation.partials import PARTIAL_SUFFIX
from foundation.sections import Section

RECORD_NAME = "recipe.json"
RESTORE = "put back a copy of it, or remove the folder and start over"
R = TypeVar("R", bound=Section)


def recipe_record(recipe: Section) -> str:
    """The recipe as the folder's `recipe.json` holds it."""
    return json.dumps(recipe.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def recipe_of_record(model: type[R], text: bytes, where: str) -> R:
    """The recipe that a folder's `recipe.json` holds; `where` is its address. Raises DataError."""
    parse_json(text, where, RESTORE)
    try:
        return model.model_validate_json(text)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"{where} is no recipe of this version ({key}: {problem['msg']}): {RESTORE}"
        ) from None


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
        FolderTaken: the folder was made by a recipe that differs in another key, or holds something else.
        DataError: its `recipe.json` is damaged.
    """
    store = open_store(folder)
    text = store.read(RECORD_NAME)
    if text is None:
        if all(PARTIAL_SUFFIX in name for name in store.files()):
            return False
        text = store.read(RECORD_NAME)  # another job may have begun here just now
    if text is None:
        raise FolderTaken(f"{folder} is not empty and holds no {RECORD_NAME}; name another output folder")
    earlier = parse_json(text, store.address(RECORD_NAME), RESTORE)
    now = recipe.model_dump(mode="json")
    for key in free:
        earlier.pop(key, None)
        now.pop(key, None)
    taken = taken_by_another(folder, earlier, now, "Name another output folder, or remove this one.")
    if taken:
        raise taken
    return store.read(done_name) is not None
