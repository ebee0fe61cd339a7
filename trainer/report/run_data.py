"""What a run folder tells about a run, whatever state it was left in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import DataError
from foundation.json_files import read_json
from trainer.metrics import read_lines, read_metrics
from trainer.run_folder import RunFolder, recorded_recipe, starts_of


@dataclass(frozen=True)
class RunData:
    """A run, read.

    Attributes:
        run: its folder.
        recipe: the resolved recipe, as plain values.
        metrics: a dict per step, by rising step; a step that was done again is there once.
        events: all that happened, oldest first.
        starts: time, host, step and ranks of each start.
        lineage: what the run started from; empty where it is not written yet.
        provenance: code and versions; empty where it is not written yet.
        finished_at: step of the export; None before it.
    """

    run: RunFolder
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    lineage: dict[str, Any]
    provenance: dict[str, Any]
    finished_at: int | None

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds."""
        return [event for event in self.events if event.get("event") in kinds]


def read_run(path: Path) -> RunData:
    """Read a run folder; a run in progress, or a file that a kill has cut short, is no mistake.

    Raises:
        DataError: it is no run folder.
    """
    run = RunFolder(path)
    try:
        recipe = recorded_recipe(run)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} is not a run folder: it has no {run.recipe.name}. Give the `run` of a stage's recipe."
        ) from None
    by_step = {line["step"]: line for line in read_metrics(run.metrics)}
    return RunData(
        run=run,
        recipe=recipe,
        metrics=[by_step[step] for step in sorted(by_step)],
        events=read_lines(run.events),
        starts=starts_of(run),
        lineage=_json_or_empty(run.lineage),
        provenance=_json_or_empty(run.provenance),
        finished_at=run.finished_at(),
    )


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "delete it; the report goes without")
    except FileNotFoundError:
        return {}
