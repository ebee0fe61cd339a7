"""Checkpoints as files: when one counts, which is the newest, which may go. Imports no torch.

A checkpoint is a folder `step-N` with a `manifest.json` that names every file with its size and hash. It is
written as `step-N.partial-S` (S: the number of the start that writes it) and renamed when it is complete. One
that a start finds damaged is renamed to `step-N.damaged-S`: it counts no more, and is left for people.

The fence. A job that was cut off from the network, and has been replaced, may still be writing. Each start of
a run takes a higher number than all before it, then removes the partial folders of earlier starts, then looks
for the newest checkpoint. A commit looks up the latest number first, and refuses where it isn't its own. If
the replacement takes its number after that look-up, it removes the partial folder, so the stale rename fails;
or the rename came first, and then the replacement sees a whole checkpoint. A commit removes nothing, and
takes no name that is taken. So no stale start takes away what its replacement has resumed from, or committed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from foundation.errors import ExitCode, RecipeError, UserError
from foundation.files import atomic_write, commit_folder, fsync_folder, sha256_file
from foundation.progress import say
from foundation.recipes import differing_keys
from trainer.run_folder import RunFolder, latest_start

MANIFEST = "manifest.json"
FORMAT = 1


class OtherRun(RecipeError):
    """A checkpoint lies where this run would keep its own, and is of another one."""


class OtherVersion(RecipeError):
    """A checkpoint was written by another version of the code, as after a return to an older one."""


class StaleStart(UserError):
    """A newer start of the run has taken over. No fault: the run goes on there."""

    exit_code = ExitCode.REQUEUE


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint is, and the proof that it is whole.

    Attributes:
        step: steps done, so also the number of the next one.
        start: number of the start that wrote it.
        recipe_sha256: hash of the recipe's keys that decide what is computed.
        lineage: as in the run's lineage.json.
        state: all of the run's state that is no tensor, as JSON values.
        files: name -> {"bytes", "sha256"}.
    """

    step: int
    start: int
    recipe_sha256: str
    lineage: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def partial_folder(run: RunFolder, step: int, start: int) -> Path:
    """Where the start numbered ``start`` writes the checkpoint of ``step``."""
    return run.checkpoints / f"step-{step}.partial-{start}"


def commit(run: RunFolder, partial: Path, manifest: CheckpointManifest) -> Path:
    """Make ``partial`` a checkpoint: manifest, fsync, fence, rename.

    Raises:
        StaleStart: a newer start has taken over.
        FileExistsError: there is a folder of that name, which no start has made.
    """
    with atomic_write(partial / MANIFEST) as file:
        json.dump(asdict(manifest), file, indent=1)
    refuse_stale(run, manifest.start)
    final = run.checkpoints / f"step-{manifest.step}"
    try:
        commit_folder(partial, final)
    except (FileNotFoundError, FileExistsError):
        if partial.exists():
            raise
        raise StaleStart(
            f"A newer start of {run.path} has removed {partial}: this one may save no more."
        ) from None
    return final


def refuse_stale(run: RunFolder, start: int) -> None:
    """The fence: to be passed before anything is renamed to where a later start would find it.

    Raises:
        StaleStart: a newer start has taken over.
    """
    newest = latest_start(run)
    if newest != start:
        raise StaleStart(
            f"Start {newest} of {run.path} has taken over: this one (start {start}) may save no more."
        )


def remove_partials(run: RunFolder) -> None:
    """Remove what earlier starts have left half-written (part of the fence: see the module's docstring), or
    half-removed: a `step-N` without a manifest.
    """
    for folder in run.checkpoints.glob("step-*"):
        half_removed = step_of(folder) is not None and not (folder / MANIFEST).exists()
        if half_removed or ".partial-" in folder.name:
            shutil.rmtree(folder, ignore_errors=True)


def put_aside(run: RunFolder, folder: Path, start: int) -> None:
    """Take its name from a checkpoint that the start numbered ``start`` has found damaged: it no longer holds
    a place among the newest, and the step can be saved again.

    Raises:
        StaleStart: a newer start has taken over; nothing has changed.
    """
    refuse_stale(run, start)
    aside = folder.with_name(f"{folder.name}.damaged-{start}")
    shutil.rmtree(
        aside, ignore_errors=True
    )  # of the same step, before this start went back and saved it again
    try:
        folder.rename(aside)
        say(f"{folder} is kept as {aside.name}")
    except FileNotFoundError:  # an earlier start, which was not dead, has put it aside
        return
    try:
        refuse_stale(run, start)
    except StaleStart:  # since the first look: what was moved may be what the newer start has saved there
        with suppress(OSError):  # or it has done so now
            aside.rename(folder)
        raise


def damaged(run: RunFolder) -> list[Path]:
    """What was put aside, by this start or an earlier one."""
    return sorted(run.checkpoints.glob("step-*.damaged-*"))


def committed(run: RunFolder) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints that have a manifest, newest first; not verified."""
    steps = [(step_of(folder), folder) for folder in run.checkpoints.glob("step-*")]
    found = [(step, folder) for step, folder in steps if step is not None and (folder / MANIFEST).exists()]
    return sorted(found, reverse=True)


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, or damaged.
        OtherVersion: another version of the code has written it.
        OSError: the file system fails, which proves nothing against the checkpoint.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{folder / MANIFEST} is missing") from None
    return parse_manifest(text, str(folder / MANIFEST))


def parse_manifest(text: bytes, where: str) -> CheckpointManifest:
    """The manifest that stands in the file ``where``, which has been read already.

    Raises:
        ValueError: it is damaged.
        OtherVersion: another version of the code has written it.
    """
    try:
        entries = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} cannot be read ({error})") from None
    found = entries.get("format", FORMAT)
    unknown = sorted(entries.keys() - {key.name for key in fields(CheckpointManifest)})
    if found != FORMAT or unknown:
        what = f"format {found}" if found != FORMAT else f"the keys {', '.join(unknown)}"
        raise OtherVersion(
            f"{where} has {what}, which this code (format {FORMAT}) does not know: another version of the "
            "code wrote it, and nothing was changed. Go on with that version, or move the checkpoint away."
        )
    try:
        return CheckpointManifest(**entries)
    except TypeError as error:
        raise ValueError(f"{where} cannot be read ({error})") from None


def refuse_other_run(where: str, manifest: CheckpointManifest, identity: dict[str, Any]) -> None:
    """Whether a checkpoint is the run's own: made by its recipe, from what its lineage names.

    Args:
        identity: the run's "recipe_sha256" and "lineage", as its manifests have them.

    Raises:
        OtherRun: it is not; what differs is said.
    """
    theirs = {key: getattr(manifest, key) for key in identity}
    differences = "\n".join(f"  {line}" for line in differing_keys(theirs, identity))
    if differences:
        raise OtherRun(
            f"{where} is a checkpoint of another run. It differs in (there -> here):\n{differences}\nGive "
            "this run a `run` and a `checkpoints.remote` of its own, or move what is there away."
        )


def damage(folder: Path, manifest: CheckpointManifest, names: Iterable[str]) -> Iterator[str]:
    """What is wrong with the files ``names`` of a checkpoint, a line each; nothing where all is well.

    Raises:
        OSError: the file system fails, which proves nothing against the checkpoint.
    """
    for name in names:
        entry = manifest.files[name]
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                yield f"{name} has {size} bytes, {entry['bytes']} were written"
            elif sha256_file(path) != entry["sha256"]:
                yield f"{name} has changed since it was written (hash)"
        except FileNotFoundError:
            yield f"{name} is missing"


def retain(
    run: RunFolder, keep_last: int, keep_every: int | None, in_use: Collection[Path] = frozenset()
) -> None:
    """Remove the checkpoints that are `superseded`, but those ``in_use`` (which go at a later call)."""
    folders = dict(committed(run))
    for step in superseded(folders, keep_last, keep_every):
        if folders[step] not in in_use:
            remove(folders[step])


def superseded(steps: Collection[int], keep_last: int, keep_every: int | None) -> list[int]:
    """Which of a run's checkpoints may go: not the newest ``keep_last``, nor the first one at or after each
    multiple of ``keep_every``.

    That one is the first of those there with its ``step // keep_every``, whichever others have gone already:
    no earlier one of the same quotient comes after it.
    """
    oldest_first = sorted(steps)
    kept = set(oldest_first[-keep_last:])
    if keep_every is not None:  # of each quotient the last that the comprehension comes to: the first step
        first = {step // keep_every: step for step in reversed(oldest_first) if step >= keep_every}
        kept |= set(first.values())
    return [step for step in oldest_first if step not in kept]


def step_of(folder: Path) -> int | None:
    """The step of a folder that has the name of a checkpoint."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else None


def remove(folder: Path) -> None:
    """Manifest first: a removal that is cut short must not leave something that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    fsync_folder(folder)
    shutil.rmtree(folder)
