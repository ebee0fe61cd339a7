"""Where a model came from: the chain of stages down to the first dataset. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.errors import DataError, Problems
from foundation.files import atomic_write, sha256_file
from foundation.json_files import read_json
from foundation.recipes import recipe_hash
from trainer.checkpoint_files import committed
from trainer.recipe import CHANGEABLE, StageRecipe
from trainer.run_folder import EXPORT_AGAIN, EXPORT_MANIFEST, RunFolder

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest

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
    except (KeyError, TypeError, AttributeError) as error:  # damage may lie deep, in a parent's record
        raise DataError(f"{path} is damaged (no lineage: {error!r}): {RESTORE}") from None


def _chain(lineage: dict[str, Any], heading: str) -> list[str]:
    lines = [heading]
    while True:
        lines += [f"    {line}" for line in _stage(lineage)]
        parent = lineage["parent"]
        if parent is None:
            return [*lines, "  from random weights"]
        files = parent.get("files", {}).items()
        weights = [f"    weights    {name}, {sha256[:SHOWN]}" for name, sha256 in files]
        if "lineage" not in parent:
            return [*lines, f"  from {parent['from']}, which has no record of ours", *weights]
        lines += [f"  from {parent['from']}, step {parent['step']}, {parent['manifest_sha256'][:SHOWN]}"]
        lines += weights
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


def lineage_of(
    run: RunFolder, recipe: StageRecipe, dataset: Manifest, start_files: Sequence[Path]
) -> dict[str, Any]:
    """A run's lineage, as its first start recorded it; that one records it now. For one rank: it may hash all
    weights, 33 GB of a 14B model.

    Args:
        start_files: of the model that the recipe starts from; none where that is random.

    Raises:
        DataError: the record is damaged; or what the run began with has changed since: the dataset, or
            weights that this start will read. It reads those under adapters, which a checkpoint does not
            hold, and any where there is no checkpoint yet.
    """
    now: dict[str, Any] = {
        "recipe_sha256": recipe_hash(recipe, exclude=CHANGEABLE),
        "dataset": {"folder": recipe.data.latents, "manifest_sha256": dataset.sha256()},
        "tokenizer_fingerprint": dataset.tokenizer.fingerprint,
    }
    try:
        lineage = read_json(run.lineage, RESTORE, "parent", "dataset", "recipe_sha256")
    except FileNotFoundError:
        lineage = {**now, "parent": _parent(recipe, start_files)}
        with atomic_write(run.lineage) as file:
            json.dump(lineage, file, indent=1)
        return lineage
    problems = Problems()
    found, began = now["dataset"]["manifest_sha256"], lineage["dataset"]["manifest_sha256"]
    if found != began:
        problems.add(recipe.data.latents, _changed(found, began), "what step s sees would be something else")
    recorded = (lineage["parent"] or {}).get("files")  # an earlier version of the code recorded none
    if recorded is not None and (recipe.model.lora is not None or not committed(run)):
        for path, problem in _changes(recorded, start_files):
            problems.add(str(path), problem)
    problems.raise_if_any(
        DataError,
        f"What {run.path} began with has changed since: put it back, or give the recipe another `run`",
    )
    return lineage


def _parent(recipe: StageRecipe, start_files: Sequence[Path]) -> dict[str, Any] | None:
    """What a stage records of the model that it starts from; None where that is random."""
    if not start_files:
        return None
    folder = start_files[0].parent
    parent = {
        "from": recipe.model.init_from or recipe.model.pretrained,
        "files": {path.name: sha256 for path, sha256 in _hashes(start_files).items()},
    }
    manifest = read_export_manifest(folder)
    if manifest is None:
        return parent
    return {
        **parent,
        "manifest_sha256": sha256_file(folder / EXPORT_MANIFEST),
        "step": manifest["step"],
        "lineage": manifest["lineage"],
    }


def _changes(recorded: dict[str, str], start_files: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """What has become of the files that a run began with: path and problem."""
    hashes = _hashes([path for path in start_files if path.exists()])
    paths = {path.name: path for path in start_files}
    for name in sorted(recorded.keys() | paths.keys()):
        path = paths.get(name, start_files[0].with_name(name))
        if path not in hashes:
            yield path, "is missing"
        elif name not in recorded:
            yield path, "the run began without it"
        elif hashes[path] != recorded[name]:
            yield path, _changed(hashes[path], recorded[name])


def _changed(found: str, began: str) -> str:
    return f"its hash is {found[:SHOWN]}, the run began with {began[:SHOWN]}"


def _hashes(files: Sequence[Path]) -> dict[Path, str]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256_file, files), strict=True))
