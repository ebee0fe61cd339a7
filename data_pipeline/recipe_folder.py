"""An output folder belongs to the recipe that made it; another recipe is refused, naming what differs."""

from __future__ import annotations

import json
import os
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
    """Whether `folder` is this recipe's finished output; an empty folder is as good as none.

    Args:
        folder: the output, a folder or an `s3://` prefix, which need not exist.
        recipe: the recipe that wants to write there.
        done_name: the file whose presence says that the output is complete.
        free: top-level keys that may differ, because they do not change what is written.

    Raises:
        FolderTaken: the folder was made by a recipe that differs in another key, holds something else, or
            cannot be one, since there is a file.
        DataError: its `recipe.json` is damaged.
    """
    path = Path(folder)
    there = next(filter(os.path.lexists, (path, *path.parents)), path)
    if os.path.lexists(there) and not there.is_dir():
        raise FolderTaken(f"{there} is no folder; name another output folder")
    store = open_store(folder)
    text = store.read(RECORD_NAME)
    if text is None:
        if all(PARTIAL_SUFFIX in name for name in (os.listdir(path) if path.is_dir() else store.files())):
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


def check_inputs(folder: str | Path, there: dict[str, str], here: dict[str, str]) -> None:
    """That a folder was made of the files that its recipe stands for now.

    Args:
        folder: the finished output.
        there: file -> version (`storage.file_version`) when it was made.
        here: the same now.

    Raises:
        FolderTaken: files are new, gone or replaced.
    """
    changes = {
        "new": sorted(here.keys() - there.keys()),
        "gone": sorted(there.keys() - here.keys()),
        "replaced": sorted(file for file in here.keys() & there.keys() if here[file] != there[file]),
    }
    said = [f"{len(files)} {word} (such as {files[0]})" for word, files in changes.items() if files]
    if said:
        raise FolderTaken(
            f"{folder} was made of other files: since then {', '.join(said)}. Name another output folder; or "
            "remove this one, and the same command makes it of the present files"
        )
