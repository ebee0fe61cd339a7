"""Where a model came from: the chain of stages down to the first dataset. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foundation.errors import DataError
from foundation.files import sha256_file
from foundation.json_files import read_json
from trainer.recipe import StageRecipe
from trainer.run_folder import EXPORT_AGAIN, EXPORT_MANIFEST

SHOWN = 12  # digits of a hash that are shown
RESTORE = "put back a copy of it; what is in it cannot be made anew"


def lineage_lines(folder: Path) -> list[str]:
    """The chain of a run folder or an export, newest first, a stage per paragraph.

    Raises:
        DataError: the folder has no record of where it came from, or a damaged one.
    """
    path, lineage = _read(folder)
    try:
        return _chain(lineage, str(folder))
    except (KeyError, TypeError) as error:  # a record holds those of its parents: damage may lie deep
        raise DataError(f"{path} is damaged (no lineage: {error!r}): {RESTORE}") from None


def _chain(lineage: dict[str, Any], heading: str) -> list[str]:
    lines: list[str] = []
    while True:
        lines += [heading, *(f"    {line}" for line in _stage(lineage))]
        parent = lineage["parent"]
        if parent is None:
            return [*lines, "  from random weights"]
        if "lineage" not in parent:
            return [*lines, f"  from {parent['from']}, which has no record of ours"]
        heading = f"  from {parent['from']}, step {parent['step']}, {parent['manifest_sha256'][:SHOWN]}"
        lineage = parent["lineage"]


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    for path, key in (
        (folder / "lineage.json", None),
        (folder / EXPORT_MANIFEST, "lineage"),
    ):
        try:
            values = read_json(path, RESTORE, *([key] if key else []))
        except (FileNotFoundError, NotADirectoryError):
            continue
        return path, (values[key] if key else values)
    raise DataError(
        f"{folder} is neither a run folder (lineage.json) nor an export of ours ({EXPORT_MANIFEST})"
    )


def _stage(lineage: dict[str, Any]) -> list[str]:
    dataset = lineage["dataset"]
    return [
        f"recipe     {lineage['recipe_sha256'][:SHOWN]}",
        f"dataset    {dataset['folder']}, {dataset['manifest_sha256'][:SHOWN]}",
        f"tokenizer  {lineage['tokenizer_fingerprint'][:SHOWN]}",
    ]


def read_export_manifest(folder: Path) -> dict[str, Any] | None:
    """The record of an export of ours; None for a folder that came from elsewhere.

    Raises:
        DataError: it is damaged.
    """
    try:
        return read_json(folder / EXPORT_MANIFEST, EXPORT_AGAIN, "step", "lineage")
    except FileNotFoundError:
        return None


def parent_of(recipe: StageRecipe) -> dict[str, Any] | None:
    """What a stage records of the folder that its weights came from; None where it had none.

    The hash of the parent's manifest stands for all of its files, whose hashes are in it.
    """
    start = recipe.model.init_from or recipe.model.pretrained
    if start is None:
        return None
    manifest = read_export_manifest(Path(start))
    if manifest is None:
        return {"from": start}
    return {
        "from": start,
        "manifest_sha256": sha256_file(Path(start) / EXPORT_MANIFEST),
        "step": manifest["step"],
        "lineage": manifest["lineage"],
    }
