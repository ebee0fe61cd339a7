"""Checkpoints in an object store: a copy beside the run folder's own, for when that folder is lost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from data_pipeline.ingest.storage import StoreUnreachable, is_remote, reaching, remote_files
from data_pipeline.store import writing_to
from foundation.errors import UserError
from foundation.progress import say
from trainer.checkpoint_files import MANIFEST, parse_manifest, refuse_other_run, step_of, superseded
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
from trainer.run_folder import RunFolder

_WRITTEN = re.compile(r"\.metadata|__\d+_\d+\.distcp")  # by torch.distributed.checkpoint


class RemoteStore:
    """The copies of one run's checkpoints: `step-N` below ``section.remote``, in a folder that is called as
    the run folder is. Nothing is there where the recipe names no store.
    """

    def __init__(self, run: RunFolder, section: CheckpointSection, identity: dict[str, Any]):
        """``identity``: what the run knows its own checkpoints by (`checkpoint_files.refuse_other_run`)."""
        self._run, self._section, self._identity = run, section, identity
        self.address = section.remote and f"{section.remote.rstrip('/')}/{run.path.resolve().name}"

    def place(self, step: int) -> str:
        """The address of a copy."""
        return f"{self.address}/step-{step}"

    def steps(self) -> list[int]:
        """Steps of the copies that have a manifest, newest first; not verified.

        Raises:
            StoreUnreachable: the store does not answer, or does not let us in.
        """
        if self.address is None:
            return []
        with self._fetching():
            return _steps(*_open(self.address))

    def fetch(self, step: int) -> Path:
        """Copy a checkpoint into the run folder, which has none; what was fetched is not verified.

        Raises:
            OtherRun: it is another run's; nothing was fetched.
            StoreUnreachable: the store does not answer, does not let us in, or fails on the way.
        """
        final = self._run.checkpoints / f"step-{step}"
        partial = final.with_name(f"{final.name}.partial-0")
        with self._fetching():
            filesystem, root = _open(str(self.address))
            self._refuse_other_run(filesystem, root, step)
            filesystem.get(f"{root}/step-{step}/", str(partial), recursive=True)
            partial.rename(final)
        say(f"The checkpoint of step {step} was fetched from {self.address}")
        return final

    def upload(self, folder: Path) -> None:
        """Copy a committed checkpoint, its manifest last, then remove the copies that are not kept.

        What uploads that were cut short have left is removed first: none is under way but this one, or one of
        a start that has been replaced.

        Copies of later steps stay, and hold no place among the newest: they are damaged, or the run would not
        have been resumed from an earlier step.

        Raises:
            OtherRun: another run's copies are there; they stay, and nothing was copied.
            StoreUnreachable: the store does not answer, or does not let us in.
            OSError: anything else that the store, or the disk, says.
        """
        with reaching(str(self.address)):
            filesystem, root = _open(str(self.address))
            begun = _numbers(filesystem.glob(f"{root}/step-*"))
            steps = _steps(filesystem, root)
            for there in steps[:1]:
                self._refuse_other_run(filesystem, root, there)
            step = int(folder.name.removeprefix("step-"))
            if step in steps:
                _remove(filesystem, f"{root}/{folder.name}")
            for cut_short in begun - set(steps):
                _remove_left_over(filesystem, f"{root}/step-{cut_short}")
            _put(filesystem, folder, f"{root}/{folder.name}")
            up_to_here = {step, *(there for there in steps if there < step)}
            for old in superseded(up_to_here, self._section.keep_last, self._section.keep_every):
                _remove(filesystem, f"{root}/step-{old}")

    def _refuse_other_run(self, filesystem: fsspec.AbstractFileSystem, root: str, step: int) -> None:
        where = f"{self.place(step)}/{MANIFEST}"
        try:
            manifest = parse_manifest(filesystem.cat_file(f"{root}/step-{step}/{MANIFEST}"), where)
        except ValueError:
            return  # damaged, which is found out, and said, after it was fetched
        refuse_other_run(self.place(step), manifest, self._identity)

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        try:
            with reaching(str(self.address)), writing_to(self._run.checkpoints):
                yield
        except OSError as error:
            raise StoreUnreachable(
                f"No checkpoint could be fetched from {self.address} ({error}). Without checkpoints.remote "
                f"the run starts with what is in {self._run.checkpoints}"
            ) from None


class RemoteCopies:
    """Copies checkpoints to the store in a thread of its own, which nobody waits for before the end.

    One is copied at a time. Of those that are committed meanwhile only the newest waits its turn, so a store
    that is slower than the saves gets fewer of them.
    """

    def __init__(self, store: RemoteStore, events: EventLog):
        self.store, self._events = store, events
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy")
        self._copies: dict[Path, Future[None]] = {}

    def add(self, folder: Path) -> None:
        """Copy a committed checkpoint; nothing where the recipe names no store."""
        if self.store.address is not None:
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
            self.store.upload(folder)
        except Exception as error:  # noqa: BLE001  (each store's client has kinds of its own; none may end a run)
            # A client's own words may quote a request with its signature.
            reason = str(error) if isinstance(error, OSError | UserError) else type(error).__name__
            say(
                f"THE COPY OF {folder.name} TO {self.store.address} FAILED ({reason}). Training goes on; "
                "the local checkpoint stands, and the next one is copied again."
            )
            self._events.write("copy_failed", checkpoint=folder.name, reason=reason)


def _open(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address, and the address as it writes it, without a slash at the end."""
    if is_remote(address):
        return remote_files(listings_cached=False), address.removeprefix("s3://").rstrip("/")
    filesystem, root = fsspec.core.url_to_fs(address)
    return filesystem, root.rstrip("/")


def _steps(filesystem: fsspec.AbstractFileSystem, root: str) -> list[int]:
    """Steps of the copies that are whole, newest first."""
    manifests = filesystem.glob(f"{root}/step-*/{MANIFEST}")
    return sorted(_numbers(path.removesuffix(f"/{MANIFEST}") for path in manifests), reverse=True)


def _numbers(paths: Iterable[str]) -> set[int]:
    """Steps of the folders that have the name of a checkpoint; others are a person's own."""
    return {step for path in paths if (step := step_of(Path(path))) is not None}


def _put(filesystem: fsspec.AbstractFileSystem, folder: Path, copy: str) -> None:
    """Manifest last, and only where all else is there: a start that replaced this one may have cleared up."""
    filesystem.makedirs(copy, exist_ok=True)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST}
    for name in sorted(sizes):
        filesystem.put_file(str(folder / name), f"{copy}/{name}")
    there = filesystem.find(copy, detail=True).values()
    if {file["name"].split("/")[-1]: file["size"] for file in there} != sizes:
        raise OSError(f"{copy} was changed by someone else while it was written")
    filesystem.put_file(str(folder / MANIFEST), f"{copy}/{MANIFEST}")


def _remove_left_over(filesystem: fsspec.AbstractFileSystem, copy: str) -> None:
    """What an upload has left; a folder that holds anything else is a person's own."""
    names = [path.split("/")[-1] for path in filesystem.find(copy)]
    if names and all(map(_WRITTEN.fullmatch, names)):
        filesystem.rm(copy, recursive=True)


def _remove(filesystem: fsspec.AbstractFileSystem, copy: str) -> None:
    """Manifest first: a removal that is cut short must not leave something that looks whole."""
    filesystem.rm_file(f"{copy}/{MANIFEST}")
    filesystem.rm(copy, recursive=True)
