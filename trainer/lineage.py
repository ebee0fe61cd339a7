"""Where a model came from: the chain of stages down to the first dataset. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foundation.errors import DataError
from trainer.run_folder import EXPORT_MANIFEST

SHOWN = 12  # digits of a hash that are shown


def lineage_lines(folder: Path) -> list[str]:
    """The chain of a run folder or an export, newest first, a stage per paragraph.

    Raises:
        DataError: the folder has no record of where it came from.
    """
    lineage, heading = _read(folder)
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


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    for path, key in (
        (folder / "lineage.json", None),
        (folder / EXPORT_MANIFEST, "lineage"),
    ):
        try:
            values = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except json.JSONDecodeError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        return (values[key] if key else values), str(folder)
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
