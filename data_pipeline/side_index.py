"""Writes what readers find records by: the list of all shards, and the side index of each class.

Tasks come one after the other, and what is written grows in files: memory follows the list of shards alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.ingest.storage import open_stream
from data_pipeline.manifest import ClassManifest
from data_pipeline.npy_stream import NpyStream
from data_pipeline.tokenize.folder import DatasetFolder
from data_pipeline.tokenize.recipe import ClassSection
from foundation.errors import DataError
from foundation.json_files import parse_json
from foundation.progress import track

INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.parquet"
MEND = "run `bitdance data tokenize` with its recipe, after removing the task's folder"
Dropped = Mapping[int, NDArray[np.int64]]


def write_side_index(
    folder: DatasetFolder, classes: Sequence[ClassSection], tasks: Sequence[int], dropped: Dropped, side: Path
) -> tuple[list[ClassManifest], list[dict[str, Any]]]:
    """Write `side/RESOLUTION/*.npy` of each class.

    Args:
        folder: the dataset.
        classes: by rising resolution.
        tasks: numbers of those that are in the dataset, rising.
        dropped: task -> numbers of its pictures that are left out.
        side: an empty local folder.

    Returns:
        The classes as the manifest has them, but for where their side index lies; and all shards as
        `index.json` has them, in its order.

    Raises:
        DataError: a task's files disagree, or are damaged.
    """
    position, shards = _Position(), list[dict[str, Any]]()
    found = []
    for section in classes:
        own = side / str(section.resolution)
        own.mkdir()
        found.append(_write_class(folder, section, tasks, dropped, own, position, shards))
    return found, shards


@dataclass
class _Position:
    """Where the next shard and the next sample of the whole index stand."""

    shard: int = 0
    sample: int = 0


def _write_class(
    folder: DatasetFolder,
    section: ClassSection,
    tasks: Sequence[int],
    dropped: Dropped,
    side: Path,
    position: _Position,
    shards: list[dict[str, Any]],
) -> ClassManifest:
    """Write a class's side index and append its shards to the whole index."""
    start = _Position(position.shard, position.sample)
    kept = 0
    with (
        NpyStream(side / "n_text.npy", "<u2") as n_text,
        NpyStream(side / "bucket.npy", "|u1") as bucket,
        NpyStream(side / "shard_sizes.npy", "<u4") as shard_sizes,
        NpyStream(side / "dropped.npy", "<i8") as left_out,
    ):
        for number in track(tasks, f"Indexing class {section.resolution}"):
            own = _task_shards(folder, number, section.resolution)
            if not own:
                continue
            table = _class_samples(folder, number, section.resolution)
            keep = ~np.isin(table["picture"], dropped.get(number, np.empty(0, np.int64)))
            sizes = np.array([shard["samples"] for shard in own])
            if sizes.sum() != len(keep):
                raise DataError(
                    f"{folder.address(folder.task(number))}: its shards and its table of samples disagree"
                )
            shard_of_row = np.repeat(np.arange(len(own)), sizes)
            n_text.append(table["n_text"][keep])
            bucket.append(table["bucket"][keep])
            shard_sizes.append(np.bincount(shard_of_row[keep], minlength=len(own)))
            left_out.append(np.flatnonzero(~keep) + position.sample - start.sample)
            shards += own
            kept += int(keep.sum())
            position.shard += len(own)
            position.sample += len(keep)
    return ClassManifest(
        resolution=section.resolution,
        buckets=section.buckets,
        first_shard=start.shard,
        shards=position.shard - start.shard,
        first_sample=start.sample,
        raw_samples=position.sample - start.sample,
        samples=kept,
        side="",
    )


def _task_shards(folder: DatasetFolder, number: int, resolution: int) -> list[dict[str, Any]]:
    """A task's shards of a class, their base names relative to the dataset."""
    name = f"{folder.task(number)}/{resolution}/{INDEX_NAME}"
    index = folder.store.read(name)
    if index is None:
        return []
    shards = parse_json(index, folder.address(name), MEND, "shards")["shards"]
    for shard in shards:
        name = shard["raw_data"]["basename"]
        shard["raw_data"]["basename"] = f"{folder.task(number)}/{resolution}/{name}"
    return list(shards)


def table_address(folder: DatasetFolder, number: int) -> str:
    """Where a task's table of samples lies."""
    return folder.address(f"{folder.task(number)}/{SAMPLES_NAME}")


def _class_samples(folder: DatasetFolder, number: int, resolution: int) -> dict[str, NDArray[Any]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns, address = ["resolution", "n_text", "bucket", "picture"], table_address(folder, number)
    try:
        with open_stream(address) as stream:
            table = pq.read_table(stream, columns=columns)
    except pa.ArrowException as error:
        raise DataError(f"{address} is damaged ({error}): {MEND}") from None
    table = table.filter(pc.equal(table["resolution"], resolution))
    return {name: table[name].to_numpy() for name in columns[1:]}
