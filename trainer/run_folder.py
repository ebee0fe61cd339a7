"""A run's folder: whose it is, where things lie in it, which start of it this is. Imports no torch.

recipe.yaml        resolved; another recipe is refused
provenance.json    code, versions and host of the first start
lineage.json       what the run started from
starts/0001.json   one file per start of the run (its number is the fence of `checkpoint_files`)
logs/rank-0.log    all that rank 0 printed, over all starts
metrics.jsonl      a line per step; events.jsonl: starts, skips, saves, rewinds, ends
checkpoints/       step-N folders, each whole
export/            the finished stage, in the published layout
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from foundation.errors import DataError, ExitCode, UserError
from foundation.files import atomic_write, open_locked
from foundation.json_files import read_json
from foundation.ownership import FolderTaken, taken_by_another
from foundation.partials import PARTIAL_SUFFIX
from foundation.provenance import provenance
from foundation.recipes import resolved_yaml
from trainer.recipe import CHANGEABLE, StageRecipe

STARTS_WITHOUT_PROGRESS = 3
BEFORE_THE_RECIPE = frozenset(
    {"lock", "logs", "slurm"}
)  # what a start may have made when it is killed so early
EXPORT_MANIFEST = "export.json"
EXPORT_AGAIN = "remove the folder `export`, and `bitdance train` makes it anew from the last checkpoint"

RECIPE_AGAIN = "put there what `bitdance train RECIPE --dry-run` prints for the recipe that began the run"


class NoProgress(UserError):
    """The run was started several times and never came further."""

    exit_code = ExitCode.BUG


class RunInUse(UserError):
    """Another process on this machine is training this run."""

    exit_code = ExitCode.RECIPE


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    recipe = property(lambda self: self.path / "recipe.yaml")
    provenance = property(lambda self: self.path / "provenance.json")
    lineage = property(lambda self: self.path / "lineage.json")
    starts = property(lambda self: self.path / "starts")
    logs = property(lambda self: self.path / "logs")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    events = property(lambda self: self.path / "events.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")
    export = property(lambda self: self.path / "export")
    samples = property(lambda self: self.path / "samples")
    extensions = property(lambda self: self.path / "extensions")

    def began(self) -> bool:
        """Whether the run came as far as to train: all that its recipe names was found and fits together."""
        return self.lineage.exists()

    def finished_at(self) -> int | None:
        """The step that the run's export was made at; None where there is no export yet."""
        try:
            return int(read_json(self.export / EXPORT_MANIFEST, EXPORT_AGAIN, "step")["step"])
        except FileNotFoundError:
            return None


def find_run(recipe: StageRecipe, fork: bool = False) -> StageRecipe:
    """The recipe, pointed at the run folder that it will use; nothing is written.

    Args:
        fork: where the folder belongs to another recipe, take the next of ``RUN-2``, ``RUN-3``, ... that is
            free or belongs to this one.

    Raises:
        FolderTaken: the folder belongs to another recipe (which keys differ is said), or isn't a run folder.
        DataError: its `recipe.yaml` is damaged.
    """
    number = 1
    while True:
        path = Path(recipe.run if number == 1 else f"{recipe.run}-{number}")
        taken = _taken(recipe, path)
        if taken is None:
            return recipe.model_copy(update={"run": str(path)})
        if not fork:
            raise taken
        number += 1


def _taken(recipe: StageRecipe, path: Path, held: bool = False) -> FolderTaken | None:
    """Why the folder is not the recipe's, None where it is. ``held``: by this process, so by no other."""
    if not path.exists() or (path.is_dir() and all(map(_before_the_recipe, path.iterdir()))):
        return None
    if (path / "recipe.yaml").exists() and not _binds(RunFolder(path), held):
        return None  # its starts were refused: nothing was computed by that recipe
    try:
        there = recorded_recipe(RunFolder(path))
    except (FileNotFoundError, NotADirectoryError):
        raise FolderTaken(
            f"{path} exists and is not a run folder (it has no recipe.yaml): give another `run`"
        ) from None
    here = recipe.model_dump(mode="json")
    ours, theirs = ({k: v for k, v in values.items() if k not in CHANGEABLE} for values in (here, there))
    advice = (
        "Go on with the recipe that made it, give this one its own `run`, or let `bitdance train --fork` "
        f"start a new run beside it ({recipe.run}-2)."
    )
    return taken_by_another(path, theirs, ours, advice)


def _binds(run: RunFolder, held: bool) -> bool:
    """Whether something was computed by the run's recipe, or a start that may still compute is under way."""
    under_way = any("refused" not in start for start in starts_of(run))
    return run.began() or under_way or (not held and _held_by_another(run))


def _before_the_recipe(entry: Path) -> bool:
    return entry.name in BEFORE_THE_RECIPE or entry.name.endswith(PARTIAL_SUFFIX)


def recorded_recipe(run: RunFolder) -> dict[str, Any]:
    """The values of a run's `recipe.yaml`.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        DataError: it is damaged.
    """
    try:
        values = yaml.safe_load(run.recipe.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{run.recipe} is damaged ({said}): {RECIPE_AGAIN}") from None
    if not isinstance(values, dict):
        raise DataError(f"{run.recipe} is damaged (no mapping): {RECIPE_AGAIN}")
    return values


@contextmanager
def claimed(recipe: StageRecipe) -> Iterator[RunFolder]:
    """The recipe's run folder, as `create_run` makes it; no other start on this machine has it meanwhile.

    Under srun it is held only until the recipe is written: the batch system sees to it that a run has one
    job, and the ranks of a job that it has given up may live on for a while, on a node that is cut off, and
    must not be waited for.

    Raises:
        RunInUse: another living process holds it.
        FolderTaken: it has become another recipe's since it was found.
    """
    run = RunFolder(Path(recipe.run))
    run.path.mkdir(parents=True, exist_ok=True)
    with lock_run(run) as lock:
        taken = _taken(recipe, run.path, held=True)
        if taken is not None:
            raise taken
        create_run(recipe)
        if "SLURM_PROCID" in os.environ:
            lock.close()
        yield run


def create_run(recipe: StageRecipe) -> RunFolder:
    """Make the run folder, or bring its resolved recipe up to date where only changeable keys differ. Of a
    folder that others may be about to use, only while it is held: `claimed`.
    """
    run = RunFolder(Path(recipe.run))
    with atomic_write(run.recipe) as file:  # first of all: by it the folder is known
        file.write(resolved_yaml(recipe))
    for folder in (run.logs, run.starts, run.checkpoints):
        folder.mkdir(exist_ok=True)
    if not run.provenance.exists():
        with atomic_write(run.provenance) as file:
            json.dump(provenance(), file, indent=1)
    return run


def lock_run(run: RunFolder) -> IO[str]:
    """Hold the run on this machine for as long as the returned file is open.

    Raises:
        RunInUse: another living process holds it.
        RecipeError: nothing can be held there.
    """
    path = run.path / "lock"
    try:
        file = open_locked(path, "a+", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text().strip() or "?"
        raise RunInUse(f"{run.path} is being trained by process {holder} already") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _held_by_another(run: RunFolder) -> bool:
    try:
        open_locked(run.path / "lock", "r", fcntl.LOCK_SH | fcntl.LOCK_NB).close()
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def take_start(run: RunFolder, committed_step: int, ranks: int, despite_no_progress: bool = False) -> int:
    """Number this start of the run: 1 more than any before, and no two starts ever get the same.

    Args:
        committed_step: step of the newest checkpoint.
        ranks: world size.
        despite_no_progress: start even if the last starts came no further.

    Raises:
        NoProgress: the last `STARTS_WITHOUT_PROGRESS` starts began at the same step as this one would.
    """
    if makes_no_progress(run, committed_step) and not despite_no_progress:
        raise NoProgress(
            f"{run.path} was started {STARTS_WITHOUT_PROGRESS} times and never got past step "
            f"{committed_step}. Look at the ends of {run.logs}/rank-*.log; when the cause is mended, add "
            "--despite-no-progress (`bitdance submit` begins a new count)."
        )
    record = {"time": time.time(), "host": platform.node(), "step": committed_step, "ranks": ranks}
    number = latest_start(run)
    while True:
        number += 1
        try:
            # Creating a file that must not exist is atomic on shared file systems too, a counter in a file is
            # not.
            handle = os.open(run.starts / f"{number:04}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            continue
        with os.fdopen(handle, "w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        return number


def note_refusal(run: RunFolder, number: int, code: ExitCode) -> None:
    """A start has ended with bad data or a bad recipe. Only a person who has mended them starts again after
    that, so it does not count as a start without progress. Its number stays taken.
    """
    path = run.starts / f"{number:04}.json"
    with suppress(OSError), atomic_write(path) as file:  # where it cannot be noted it counts
        json.dump({**json.loads(path.read_text()), "refused": int(code)}, file)


def makes_no_progress(run: RunFolder, committed_step: int, since: float = 0.0) -> bool:
    """Whether the last `STARTS_WITHOUT_PROGRESS` starts, but refused ones, began at the step where one more
    would begin.

    Args:
        since: seconds since 1970; starts before then do not count.
    """
    counted = [s for s in starts_of(run) if "refused" not in s and s.get("time", 0.0) >= since]
    stuck = counted[-STARTS_WITHOUT_PROGRESS:]
    return len(stuck) == STARTS_WITHOUT_PROGRESS and all(s.get("step") == committed_step for s in stuck)


def first_started(run: RunFolder) -> float:
    """When the run was first started, in seconds since 1970: of a run that has been started."""
    return float(next(start["time"] for start in starts_of(run) if start))


def latest_start(run: RunFolder) -> int:
    """Number of the latest start of the run, 0 before the first."""
    return max((int(path.stem) for path in run.starts.glob("*.json")), default=0)


def starts_of(run: RunFolder) -> list[dict[str, Any]]:
    """All starts, oldest first: time, host, step of the newest checkpoint then, ranks; of those that were
    refused their exit code.
    """
    # Not deleted: by its name it keeps the start's number, which is the fence.
    mend = "empty it (`: > FILE`); it notes when and where a start was"
    return [
        read_json(path, mend, "time") if path.stat().st_size else {}
        for path in sorted(run.starts.glob("*.json"))
    ]
