"""Flat tensors as torch.distributed.checkpoint stores them: as the runs that the ranks own.

Any other cut can be read back, by other ranks or by a single process without a process group.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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


class SavePlanner(dcp.DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        shard: FlatShard = self.state_dict[index.fqn]
        return shard.values


class LoadPlanner(dcp.DefaultLoadPlanner):
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


class PlainReader(dcp.FileSystemReader):
    """Reads a checkpoint's index without letting it name any class but those that an index is made of."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:  # read once: at many ranks it is large
            index = (Path(self.path) / ".metadata").read_bytes()
            self._index = PlainUnpickler(io.BytesIO(index)).load()
        metadata = self._index
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainUnpickler(pickle.Unpickler):
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


class PlainWriter(dcp.FileSystemWriter):
    """Writes a checkpoint's shards, and says what the system said where that fails."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            # torch's own writer, closed over a full disk, complains of positions in the file; what had gone
            # wrong before is behind that, and would be lost on the way to the other ranks.
            before: BaseException | None = error
            while before is not None and not isinstance(before, OSError):
                before = before.__cause__ or before.__context__
            raise before or error from error


class SavedTensors:
    """The tensors of a checkpoint, read whole, one at a time; needs no process group.

    Names are "master/PARAMETER", "ema/PARAMETER" and so on; tensors are flat, float32.
    """

    def __init__(self, folder: Path):
        self._reader = PlainReader(folder)
        self._index = self._reader.read_metadata().state_dict_metadata

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> Tensor:
        size = self._index[name].size[0]  # type: ignore[union-attr]
        whole = FlatShard(torch.empty(size), 0, size)
        dcp.load({name: whole}, storage_reader=self._reader, planner=LoadPlanner(), no_dist=True)
        return whole.values
