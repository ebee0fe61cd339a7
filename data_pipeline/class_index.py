"""The side index of one resolution class: the little that a training plan needs to know of each sample."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import SIDE_FILES, ClassManifest
from foundation.errors import DataError, Problems

_CHUNK = 1 << 18  # samples looked at at a time: fits a processor's cache


@dataclass(frozen=True)
class ClassIndex:
    """Sizes and lengths of one class; 3 bytes a sample, mapped from the file, not read.

    Attributes:
        resolution: the class's name, its nominal side in pixels.
        grids: int64 `[buckets, 2]`, rows and columns of each bucket's token grid.
        shard_sizes: int64 `[shards]`, kept samples of each shard; sample ids count through them.
        n_text: uint16 `[samples]`, caption tokens.
        bucket: uint8 `[samples]`, place in `grids`.
        dropped: int64, sorted raw positions that are left out (see `manifest.raw_positions`).
    """

    resolution: int
    grids: NDArray[np.int64]
    shard_sizes: NDArray[np.int64]
    n_text: NDArray[np.uint16]
    bucket: NDArray[np.uint8]
    dropped: NDArray[np.int64]

    @property
    def samples(self) -> int:
        """Samples in the class."""
        return len(self.n_text)

    def release(self) -> None:
        """Give mapped pages back, so that steps all over the index do not add up in this process's memory."""
        for column in (self.n_text, self.bucket):
            if isinstance(column.base, mmap.mmap):
                column.base.madvise(mmap.MADV_DONTNEED)  # read again from the file where needed

    def longest_caption(self) -> int:
        """Tokens of the longest caption: one pass over 2 bytes a sample."""
        return max((int(chunk.max()) for _, chunk in _chunks(self.n_text)), default=0)

    def longer_than(self, limits: NDArray[np.int64], at_most: int) -> tuple[int, list[int]]:
        """How many captions have more tokens than `limits[bucket]`, and the first `at_most` sample ids."""
        count, first = 0, list[int]()
        for (start, n_text), (_, bucket) in zip(_chunks(self.n_text), _chunks(self.bucket), strict=True):
            found = np.flatnonzero(n_text > limits[bucket])
            count += len(found)
            first += (start + found[: at_most - len(first)]).tolist()
        return count, first


def _chunks(column: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Parts of a column with their first ids.

    A mapped file is read: a mapping that was walked through once counts as the process's memory from then on.
    """
    for start in range(0, len(column), _CHUNK):
        count = min(_CHUNK, len(column) - start)
        # Of a slice of a mapping the offset is that of the whole, so only a whole one can be found in its
        # file.
        if isinstance(column, np.memmap) and column.filename and isinstance(column.base, mmap.mmap):
            at = column.offset + start * column.itemsize
            yield start, np.fromfile(column.filename, column.dtype, count, offset=at)
        else:
            yield start, column[start : start + count]


def load_class_index(files: Mapping[str, Path], entry: ClassManifest, downsample: int) -> ClassIndex:
    """Map the side index of one class.

    Args:
        files: where its `.npy` files lie, by name.
        entry: its part of the manifest.
        downsample: pixels of a token's side.

    Raises:
        DataError: a file is missing, is no array, or does not have the number of entries that the manifest
            tells.
    """
    problems = Problems()
    arrays: dict[str, NDArray[Any]] = {}
    entries = {
        "n_text.npy": entry.samples,
        "bucket.npy": entry.samples,
        "shard_sizes.npy": entry.shards,
        "dropped.npy": entry.raw_samples - entry.samples,
    }
    for name in SIDE_FILES:
        path = files[name]
        try:
            arrays[name] = np.load(path, mmap_mode="r" if entries[name] else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            problems.add(str(path), f"cannot be read: {error}", "run `bitdance data finalize` again")
            continue
        if arrays[name].shape != (entries[name],):
            problems.add(
                str(path), f"has the shape {arrays[name].shape}, the manifest says {entries[name]} entries"
            )
    if not problems.lines and int(arrays["shard_sizes.npy"].sum(dtype=np.int64)) != entry.samples:
        problems.add(
            str(files["shard_sizes.npy"]), f"does not add up to the {entry.samples} samples of the manifest"
        )
    problems.raise_if_any(DataError, f"The side index of class {entry.resolution} is broken")
    return ClassIndex(
        resolution=entry.resolution,
        grids=np.array(entry.buckets, np.int64) // downsample,
        shard_sizes=arrays["shard_sizes.npy"].astype(np.int64),
        n_text=arrays["n_text.npy"],
        bucket=arrays["bucket.npy"],
        dropped=arrays["dropped.npy"].astype(np.int64),
    )
