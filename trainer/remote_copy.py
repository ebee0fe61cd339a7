"""Checkpoints in an object store: a copy beside the run folder's own, for when that folder is lost."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fsspec

from data_pipeline.ingest.storage import StoreUnreachable, is_remote, reaching, remote_files
from data_pipeline.store import writing_to
from foundation.errors import UserError
from foundation.progress import say
from trainer.checkpoint_files import MANIFEST, committed
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
from trainer.run_folder import RunFolder


class RemoteCopies:
    """Copies checkpoints to ``section.remote`` in a thread of its own, which nobody waits for before the end.

    One is copied at a time. Of those that are committed meanwhile only the newest waits its turn, so a store
    that is slower than the saves gets fewer of them.
    """

    def __init__(self, section: CheckpointSection, events: EventLog):
        self._section, self._events = section, events
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy")
        self._copies: dict[Path, Future[None]] = {}

    def add(self, folder: Path) -> None:
        """Copy a committed checkpoint; nothing where the recipe names no store."""
        if self._section.remote:
            self._copies = {old: copy for old, copy in self._copies.items() if not copy.cancel()}
            self._copies[folder] = self._thread.submit(self._copy, folder)

    def under_way(self) -> set[Path]:
        """Folders that are still needed here."""
        return {folder for folder, copy in self._copies.items() if not copy.done()}

    def close(self) -> None:
        """Until all is copied, or given up."""
        self._thread.shutdown()

    def _copy(self, folder: Path) -> None:
        try:
            upload(folder, self._section)
        except Exception as error:  # noqa: BLE001  (each store's client has kinds of its own; none may end a run)
            # A client's own words may quote a request with its signature.
            reason = str(error) if isinstance(error, OSError | UserError) else type(error).__name__
            say(
                f"THE COPY OF {folder.name} TO {self._section.remote} FAILED ({reason}). Training goes on; "
                "the local checkpoint stands, and the next one is copied again."
            )
            self._events.write("copy_failed", checkpoint=folder.name, reason=reason)


def upload(folder: Path, section: CheckpointSection) -> None:
    """Copy a committed checkpoint to ``section.remote``, its manifest last, then remove there what is not
    kept.

    Raises:
        StoreUnreachable: the store does not answer, or does not let us in.
        OSError: anything else that the store, or the disk, says.
    """
    with reaching(str(section.remote)):
        filesystem, root = _open(str(section.remote))
        target = f"{root}/{folder.name}"
        filesystem.makedirs(target, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        for name in [*names, MANIFEST]:
            filesystem.put_file(str(folder / name), f"{target}/{name}")
        for step in _steps(filesystem, root)[section.keep_last :]:
            if section.keep_every is None or step % section.keep_every:
                old = f"{root}/step-{step}"
                filesystem.rm_file(f"{old}/{MANIFEST}")
                filesystem.rm(old, recursive=True)


def fetch_newest(run: RunFolder, section: CheckpointSection) -> None:
    """Where the run folder has no checkpoint and ``section.remote`` has, copy the newest one here.

    Raises:
        StoreUnreachable: the store does not answer, does not let us in, or fails on the way.
        PlaceUnusable: there is no room for it here.
    """
    if section.remote is None or committed(run):
        return
    try:
        with reaching(section.remote), writing_to(run.checkpoints):
            filesystem, root = _open(section.remote)
            for step in _steps(filesystem, root)[:1]:
                partial, final = run.checkpoints / f"step-{step}.partial-0", run.checkpoints / f"step-{step}"
                for remains in (partial, final):  # of a fetch, or a removal, that was cut short
                    shutil.rmtree(remains, ignore_errors=True)
                filesystem.get(f"{root}/step-{step}/", str(partial), recursive=True)
                partial.rename(final)
                say(f"The checkpoint of step {step} was fetched from {section.remote}")
    except OSError as error:
        raise StoreUnreachable(
            f"No checkpoint could be fetched from {section.remote} ({error}). Without checkpoints.remote the "
            f"run starts with what is in {run.checkpoints}"
        ) from None


def _open(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address, and the address as it writes it, without a slash at the end."""
    if is_remote(address):
        return remote_files(listings_cached=False), address.removeprefix("s3://").rstrip("/")
    filesystem, root = fsspec.core.url_to_fs(address)
    return filesystem, root.rstrip("/")


def _steps(filesystem: fsspec.AbstractFileSystem, root: str) -> list[int]:
    """Steps of the copies that are whole, newest first."""
    found = filesystem.glob(f"{root}/step-*/{MANIFEST}")
    return sorted((int(path.split("/")[-2].removeprefix("step-")) for path in found), reverse=True)
