"""Checkpoints in an object store: a copy beside the run folder's own, for when that folder is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec

from foundation.progress import say
from trainer.checkpoint_files import MANIFEST
from trainer.recipe import CheckpointSection
from trainer.run_folder import RunFolder


def upload(folder: Path, section: CheckpointSection) -> None:
    """Copy a committed checkpoint to ``section.remote``, its manifest last, then remove there what is not
    kept.

    A copy that fails is said and given up: the local checkpoint is what a run resumes from.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(section.remote)
        target = f"{root.rstrip('/')}/{folder.name}"
        filesystem.makedirs(target, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        for name in [*names, MANIFEST]:
            filesystem.put_file(str(folder / name), f"{target}/{name}")
        for step in _steps(filesystem, root)[section.keep_last :]:
            if section.keep_every is None or step % section.keep_every:
                old = f"{root.rstrip('/')}/step-{step}"
                filesystem.rm_file(f"{old}/{MANIFEST}")
                filesystem.rm(old, recursive=True)
    except OSError as error:
        say(f"The copy of {folder.name} to {section.remote} failed ({error}); the local checkpoint stands")


def fetch_newest(run: RunFolder, section: CheckpointSection) -> None:
    """Where the run folder has no checkpoint and ``section.remote`` has, copy the newest one here."""
    filesystem, root = fsspec.core.url_to_fs(section.remote)
    for step in _steps(filesystem, root)[:1]:
        source = f"{root.rstrip('/')}/step-{step}"
        partial = run.checkpoints / f"step-{step}.partial-0"
        shutil.rmtree(partial, ignore_errors=True)
        filesystem.get(source + "/", str(partial), recursive=True)
        partial.rename(run.checkpoints / f"step-{step}")
        say(f"The checkpoint of step {step} was fetched from {section.remote}")


def _steps(filesystem: fsspec.AbstractFileSystem, root: str) -> list[int]:
    """Steps of the copies that are whole, newest first."""
    found = filesystem.glob(f"{root.rstrip('/')}/step-*/{MANIFEST}")
    return sorted((int(path.split("/")[-2].removeprefix("step-")) for path in found), reverse=True)
