"""Checkpoints as state: what of a run is saved, by whom, and how it comes back on other ranks.

The stall of a save is the copy of this rank's shards to host memory. Writing, hashing and committing go on in
a thread beside training, with a process group of its own; the copy to an object store in another. A save
that has not ended when the next is due postpones that next one, to the first step after which all ranks have
heard its end (`Checkpoints.saving`); training goes on.
A save that fails is said loudly and dropped: training goes on, and the older checkpoints stay.

The format is torch.distributed.checkpoint's: each flat parameter is stored as the runs that the ranks own,
and any other cut can be read back from it, so the number of ranks and the ZeRO stage may change between save
and load.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from data_pipeline.ingest.storage import StoreUnreachable
from data_pipeline.store import writing_to
from foundation.errors import DataError, UserError
from foundation.progress import say
from trainer.checkpoint_files import (
    CheckpointManifest,
    StaleStart,
    commit,
    committed,
    damage,
    damaged,
    describe_file,
    partial_folder,
    put_aside,
    read_manifest,
    refuse_other_run,
    refuse_stale,
    remove,
    remove_partials,
    retain,
)
from trainer.flat_shards import FlatShard, LoadPlanner, PlainReader, PlainWriter, SavePlanner
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
from trainer.remote_copy import RemoteCopies, RemoteStore
from trainer.run_folder import RunFolder


class Checkpoints:
    """A run's checkpoints, as one of its ranks sees them; all methods are called by all ranks alike."""

    def __init__(
        self,
        run: RunFolder,
        start: int,
        section: CheckpointSection,
        recipe_sha256: str,
        lineage: dict[str, Any],
        events: EventLog,
    ):
        self.run, self.start, self.section, self.events = run, start, section, events
        self._identity: dict[str, Any] = {"recipe_sha256": recipe_sha256, "lineage": lineage}
        self._rank = dist.get_rank()
        self.newest = 0
        """Step of the newest checkpoint that this start has resumed from or committed, on rank 0."""
        # gloo on GPUs too: the writer thread talks about files, in host memory, beside the training's
        # collectives.
        self._group = dist.new_group(backend="gloo")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._pending: Future[None] | None = None
        self._copies = RemoteCopies(RemoteStore(run, section, self._identity), events)

    def load_newest(self, shards: dict[str, FlatShard]) -> CheckpointManifest | None:
        """Fill ``shards`` from the newest checkpoint that is whole; None where the run has none yet,
        neither here nor in the object store that the recipe may name.

        A save that is being written is waited for: in a rewind it may well be the newest, and its thread
        talks over the same group. What had to be passed over is said, with the reason, and put aside.

        Raises:
            StaleStart: a newer start of the run has taken over (found by the save that was waited for).
            OtherRun: there is a checkpoint of another run, here or in the store.
            DataError: there are checkpoints, and none is whole.
            OtherVersion: the newest one was written by another version of the code.
            StoreUnreachable, PlaceUnusable: the run folder has no checkpoint, and none could be fetched; or
                its file system fails, which proves nothing against a checkpoint.
        """
        self.wait()
        for folder in self._candidates():
            manifest, problems = self._verify(folder)
            if manifest is not None and not problems:
                refuse_other_run(str(folder), manifest, self._identity)
                self.newest = manifest.step
                self._load(folder, shards)
                return manifest
            if self._rank == 0:
                step = int(folder.name.removeprefix("step-"))
                say(f"The checkpoint of step {step} is passed over: {'; '.join(problems)}")
                self.events.write("checkpoint_passed_over", step=step, problems=problems)
        self._together(self._refuse_to_begin_again)
        return None

    def _candidates(self) -> Iterator[Path]:
        """What may be loaded, newest first: the run folder's own checkpoints, then the store's copies, each
        fetched when its turn comes. Whoever asks for the next one has found the last one damaged.
        """
        store = self._copies.store
        self._together(refuse_stale, self.run, self.start)
        self._together(remove_partials, self.run)
        for _, folder in self._together(committed, self.run):
            yield folder
            self._together(put_aside, self.run, folder, self.start)
        for step in self._together(store.steps):
            yield (folder := self._together(store.fetch, step))
            self._together(remove, folder)

    def _refuse_to_begin_again(self) -> None:
        """Nothing could be loaded: that is well only where nothing was ever saved."""
        store = self._copies.store
        bad = [str(folder) for folder in damaged(self.run)] + [store.place(step) for step in store.steps()]
        if bad:
            raise DataError(
                f"No checkpoint of {self.run.path} is whole, and without one it would begin again at its "
                f"first step. Damaged: {', '.join(bad)}. Put a whole copy of one to "
                f"{self.run.checkpoints}/step-N; or remove the damaged ones, if the run is to begin again."
            )

    def _together(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What ``work`` returns on rank 0, on all ranks. A mistake that it tells of is raised by all: one
        that went alone would leave the others waiting.
        """
        result: list[Any] = [None, None]
        if self._rank == 0:
            try:
                with using(self.run.checkpoints):
                    result[0] = work(*arguments)
            except UserError as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0, group=self._group)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def _verify(self, folder: Path) -> tuple[CheckpointManifest | None, list[str]]:
        """The manifest, as rank 0 reads it, and what is wrong with the folder; each rank hashes its share of
        the files. What keeps a rank from reading is raised by all, since it is no proof of damage.
        """
        manifest, problems = self._together(_manifest, folder)
        if manifest is None:
            return None, problems
        mine: list[str] | UserError
        try:
            with using(folder):
                names = sorted(manifest.files)[self._rank :: dist.get_world_size()]
                mine = list(damage(folder, manifest, names))
        except UserError as error:
            mine = error
        for theirs in (everyones := self._gather(mine)):
            if isinstance(theirs, UserError):
                raise theirs
        return manifest, [line for lines in everyones for line in lines]

    def _load(self, folder: Path, shards: dict[str, FlatShard]) -> None:
        with using(folder):
            reader, planner = PlainReader(folder), LoadPlanner()
            try:
                dcp.load(dict(shards), storage_reader=reader, planner=planner, process_group=self._group)
            except dcp.CheckpointException as error:  # the same on all ranks
                raise _failure(error) from error

    def save(
        self, step: int, shards: dict[str, FlatShard], state: dict[str, Any], in_place: bool = False
    ) -> None:
        """Copy ``shards`` to host memory and write them beside training, as the checkpoint of ``step``.

        A save that is being written is waited for.

        Args:
            state: the rest of the run's state, as JSON values; equal on all ranks.
            in_place: for shards that host memory has no room to copy: they are written as they stand, and
                waited for.

        Raises:
            StaleStart: a newer start of the run has taken over (found by this save, or the one before).
        """
        self.wait()
        if not in_place:
            shards = {k: replace(s, values=s.values.to("cpu", copy=True)) for k, s in shards.items()}
        manifest = CheckpointManifest(step, self.start, **self._identity, state=state)
        self._pending = self._writer.submit(self._write, shards, manifest)
        if in_place:
            self.wait()

    @property
    def saving(self) -> bool:
        """Whether this rank's thread is still at the last save; ranks may differ for a moment."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Until no save is being written.

        Raises:
            StaleStart: a newer start of the run has taken over.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Until the object store has its copies, or they are given up; saves are not waited for."""
        self._copies.close()

    def _write(self, shards: dict[str, FlatShard], manifest: CheckpointManifest) -> None:
        """In the thread: write, agree that all ranks succeeded, commit."""
        started = time.monotonic()
        partial = partial_folder(self.run, manifest.step, self.start)
        files: dict[str, dict[str, Any]] = {}
        problem = ""
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"rank {self._rank}: {_cause(error)}"
        if not any(self._gather(problem)):  # else torch's collectives would wait for a rank that cannot come
            files, problem = self._write_shards(partial, shards)
        answers = self._gather((problem, files))
        problems = [problem for problem, _ in answers if problem]
        stale: list[StaleStart | None] = [None]
        if self._rank == 0:
            whole = replace(manifest, files={k: v for _, theirs in answers for k, v in theirs.items()})
            stale = [self._commit(partial, whole, problems, started)]  # raises nothing: the others wait
        dist.broadcast_object_list(stale, src=0, group=self._group)
        if stale[0] is not None:
            raise stale[0]

    def _write_shards(
        self, partial: Path, shards: dict[str, FlatShard]
    ) -> tuple[dict[str, dict[str, Any]], str]:
        """This rank's files, described, and what went wrong; nothing is raised, since the others wait."""
        files: dict[str, dict[str, Any]] = {}
        try:
            writer = PlainWriter(partial, single_file_per_rank=True, sync_files=True)
            dcp.save(dict(shards), storage_writer=writer, planner=SavePlanner(), process_group=self._group)
            names = [f"__{self._rank}_0.distcp"] + ([".metadata"] if self._rank == 0 else [])
            files = {name: describe_file(partial / name) for name in names if (partial / name).exists()}
        except (Exception, dcp.CheckpointException) as error:  # noqa: BLE001  (the others wait)
            return {}, f"rank {self._rank}: {_cause(error)}"
        return files, ""

    def _gather(self, mine: Any) -> list[Any]:
        """What all ranks have to say, in their order."""
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine, group=self._group)
        return everyones

    def _commit(
        self, partial: Path, manifest: CheckpointManifest, problems: list[str], started: float
    ) -> StaleStart | None:
        """On rank 0: make the folder a checkpoint, or say why it is none and that training goes on."""
        try:
            if not problems:
                final = commit(self.run, partial, manifest)
                self.newest = manifest.step
                self._copies.add(final)
                retain(self.run, self.section.keep_last, self.section.keep_every, self._copies.under_way())
                self.events.write("saved", step=manifest.step, seconds=round(time.monotonic() - started, 3))
                return None
            refuse_stale(self.run, manifest.start)  # a newer start may have removed what was being written
        except StaleStart as error:
            return error
        except Exception as error:  # noqa: BLE001  (nothing may escape before what the other ranks wait for)
            problems = [_cause(error)]
        shutil.rmtree(partial, ignore_errors=True)
        say(
            f"THE CHECKPOINT OF STEP {manifest.step} COULD NOT BE SAVED: {'; '.join(problems)}. Training "
            "goes on; the older checkpoints are untouched. Make room before the next one is due."
        )
        self.events.write("save_failed", step=manifest.step, problems=problems)
        return None


@contextmanager
def using(place: Path) -> Iterator[None]:
    """Turns what a file system says into an error for people, or for the scheduler where it may pass."""
    try:
        with writing_to(place):
            yield
    except OSError as error:
        raise StoreUnreachable(f"{place}: {error}; the same command goes on once it can be read") from error


def _manifest(folder: Path) -> tuple[CheckpointManifest | None, list[str]]:
    """A checkpoint's manifest, or what is wrong with it."""
    try:
        return read_manifest(folder), []
    except ValueError as error:
        return None, [str(error)]


def _cause(error: BaseException) -> str:
    """What went wrong in a save."""
    if isinstance(error, dcp.CheckpointException):
        error = _failure(error)
    return f"{type(error).__name__}: {error}"


def _failure(error: dcp.CheckpointException) -> BaseException:
    """What torch.distributed.checkpoint has wrapped in the tracebacks of all ranks."""
    return next(iter(error.failures.values()))[0]
