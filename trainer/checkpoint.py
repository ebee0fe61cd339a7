"""Checkpoints as state: what of a run is saved, by whom, and how it comes back on other ranks.

The stall of a save is the copy of this rank's shards to host memory. Writing, hashing and committing go on in
a thread beside training, with a process group of its own. A save that has not ended when the next is due
delays that next one.
A save that fails is said loudly and dropped: training goes on, and the older checkpoints stay.

The format is torch.distributed.checkpoint's: each flat parameter is stored as the runs that the ranks own,
and any other cut can be read back from it, so the number of ranks and the ZeRO stage may change between save
and load.
"""

from __future__ import annotations

import io
import pickle
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from foundation.progress import say
from trainer.checkpoint_files import (
    CheckpointManifest,
    StaleStart,
    commit,
    committed,
    damage,
    describe_file,
    partial_folder,
    read_manifest,
    remove_partials,
    retain,
)
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
from trainer.remote_copy import upload
from trainer.run_folder import RunFolder
from trainer.zero_state import Fragment


@dataclass(frozen=True)
class FlatShard:
    """A run of a flat tensor, as torch.distributed.checkpoint reads and writes it.

    Attributes:
        values: [n] the run's elements; loading writes into them.
        start: its first element.
        whole: elements of the whole tensor.
    """

    values: Tensor
    start: int
    whole: int

    def size(self) -> torch.Size:
        return torch.Size([self.whole])

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=self.values.size())

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        data = TensorWriteData(self._chunk(), TensorProperties.create_from_tensor(self.values), self.size())
        return [
            WriteItem(MetadataIndex(fqn, torch.Size([self.start])), WriteItemType.SHARD, tensor_data=data)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]


def shards_of(fragments: Iterable[Fragment], ema: dict[str, Tensor] | None) -> dict[str, FlatShard]:
    """All tensors of this rank's training state: kind and parameter name -> shard (views, not copies)."""
    shards = {}
    for fragment in fragments:
        states: dict[str, Tensor] = dict(fragment.states.items())
        if ema is not None:
            states["ema"] = ema[fragment.name]
        for kind, values in states.items():
            shards[f"{kind}/{fragment.name}"] = FlatShard(values, fragment.start, fragment.size)
    return shards


class _SavePlanner(dcp.DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        shard: FlatShard = self.state_dict[index.fqn]
        return shard.values


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The inherited method would take the shards apart, since they are dataclasses.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        shard: FlatShard = self.state_dict[index.fqn]
        return shard.values


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
        self._recipe_sha256, self._lineage = recipe_sha256, lineage
        self._rank = dist.get_rank()
        # gloo on GPUs too: the writer thread talks about files, in host memory, beside the training's
        # collectives.
        self._group = dist.new_group(backend="gloo")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._pending: Future[None] | None = None

    def load_newest(self, shards: dict[str, FlatShard]) -> CheckpointManifest | None:
        """Fill ``shards`` from the newest checkpoint that is whole; None where there is none.

        What had to be passed over is said, with the reason.
        """
        if self._rank == 0:
            remove_partials(self.run)
        candidates: list[Any] = [committed(self.run) if self._rank == 0 else None]
        dist.broadcast_object_list(candidates, src=0, group=self._group)
        for step, folder in candidates[0]:
            manifest, problems = self._verify(folder)
            if manifest is None or problems:
                if self._rank == 0:
                    say(f"The checkpoint of step {step} is passed over: {'; '.join(problems)}")
                    self.events.write("checkpoint_passed_over", step=step, problems=problems)
                continue
            reader = _PlainReader(folder)
            dcp.load(dict(shards), storage_reader=reader, planner=_LoadPlanner(), process_group=self._group)
            return manifest
        return None

    def _verify(self, folder: Path) -> tuple[CheckpointManifest | None, list[str]]:
        """The manifest, and what is wrong with the folder; each rank hashes its share of the files."""
        manifest, mine = None, []
        try:
            manifest = read_manifest(folder)
            mine = list(damage(folder, manifest, sorted(manifest.files)[self._rank :: dist.get_world_size()]))
        except ValueError as error:
            mine = [str(error)] if self._rank == 0 else []
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, (manifest is not None, mine), group=self._group)
        problems = [line for _, lines in everyones for line in lines]
        if not all(readable for readable, _ in everyones):
            problems = problems or ["its manifest could not be read on every rank"]
        return manifest, problems

    def save(self, step: int, shards: dict[str, FlatShard], state: dict[str, Any]) -> None:
        """Copy ``shards`` to host memory and write them beside training, as the checkpoint of ``step``.

        Args:
            state: the rest of the run's state, as JSON values; equal on all ranks.

        Raises:
            StaleStart: a newer start of the run has taken over (found by the save before).
        """
        self.wait()
        copies = {k: replace(s, values=s.values.to("cpu", copy=True)) for k, s in shards.items()}
        manifest = CheckpointManifest(step, self.start, self._recipe_sha256, self._lineage, state)
        self._pending = self._writer.submit(self._write, copies, manifest)

    def wait(self) -> None:
        """Until no save is being written.

        Raises:
            StaleStart: a newer start of the run has taken over.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, shards: dict[str, FlatShard], manifest: CheckpointManifest) -> None:
        """In the thread: write, agree that all ranks succeeded, commit."""
        started = time.monotonic()
        partial = partial_folder(self.run, manifest.step, self.start)
        files: dict[str, dict[str, Any]] = {}
        problem = ""
        try:
            partial.mkdir(parents=True, exist_ok=True)
            writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
            dcp.save(dict(shards), storage_writer=writer, planner=_SavePlanner(), process_group=self._group)
            names = [f"__{self._rank}_0.distcp"] + ([".metadata"] if self._rank == 0 else [])
            files = {name: describe_file(partial / name) for name in names if (partial / name).exists()}
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            problem = f"rank {self._rank}: {_cause(error)}"
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, (problem, files), group=self._group)
        problems = [problem for problem, _ in everyones if problem]
        stale: list[StaleStart | None] = [None]
        if self._rank == 0:
            whole = replace(manifest, files={k: v for _, theirs in everyones for k, v in theirs.items()})
            stale = [self._commit(partial, whole, problems, started)]
        dist.broadcast_object_list(stale, src=0, group=self._group)
        if stale[0] is not None:
            raise stale[0]

    def _commit(
        self, partial: Path, manifest: CheckpointManifest, problems: list[str], started: float
    ) -> StaleStart | None:
        """On rank 0: make the folder a checkpoint, or say why it is none and that training goes on."""
        try:
            if not problems:
                final = commit(self.run, partial, manifest)
                retain(self.run, self.section.keep_last, self.section.keep_every)
                self.events.write("saved", step=manifest.step, seconds=round(time.monotonic() - started, 3))
                if self.section.remote:
                    upload(final, self.section)
                return None
        except StaleStart as error:
            return error
        except OSError as error:
            problems = [str(error)]
        shutil.rmtree(partial, ignore_errors=True)
        self.events.write("save_failed", step=manifest.step, problems=problems)
        say(
            f"THE CHECKPOINT OF STEP {manifest.step} COULD NOT BE SAVED: {'; '.join(problems)}. Training "
            "goes on; the older checkpoints are untouched. Make room before the next one is due."
        )
        return None


def _cause(error: BaseException) -> str:
    """What went wrong in a save; torch.distributed.checkpoint wraps it in the tracebacks of all ranks."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"


class _PlainReader(dcp.FileSystemReader):
    """Reads a checkpoint's index without letting it name any class but those that an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata: Metadata = _PlainUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    ALLOWED = frozenset(
        {"torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath", "pathlib._local.PosixPath"}
    )
    ALLOWED_MODULES = frozenset(
        {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"}
    )

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if f"{module}.{name}" in self.ALLOWED or (module in self.ALLOWED_MODULES and "." not in name):
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"a checkpoint's index may not name {module}.{name}")
        return found
