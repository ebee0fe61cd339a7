"""Random access to the records of a finished latent dataset, local or remote, by (class, sample id).

Shards are mosaicml-streaming's MDS files, and its transport and hashes bring them to a local cache
(`shard_cache.py`), but they are not read through its `StreamingDataset`: the order of training is computed
elsewhere (`order.py`), and nothing here lives in shared memory, so a killed job leaves nothing to clean up
and several datasets can be open in one process. C bits a token.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.class_index import ClassIndex, load_class_index
from data_pipeline.ingest.storage import StoreUnreachable, fails_for_a_while
from data_pipeline.manifest import (
    MANIFEST_NAME,
    SIDE_FILES,
    ClassManifest,
    Manifest,
    parse_manifest,
    raw_positions,
)
from data_pipeline.own_cache import own_cache
from data_pipeline.records import LATENT_COLUMNS, LatentRecord
from foundation.errors import DataError

_UINT16 = struct.Struct("<H")
_MAKE = (
    "run `bitdance data tokenize RECIPE`, whose output it is, to the end; where all tasks are done, "
    "`bitdance data finalize` is enough"
)
_OPEN_SHARDS = 256  # file handles kept; a window of 64 shards in each of three classes fits


class LatentDataset:
    """A finished dataset. Safe to share among threads; worker processes get their own by pickling or forking.

    Attributes:
        folder: where it lies.
        manifest: what it is.
        classes: side index of each resolution class.
    """

    def __init__(self, folder: str, cache: str | None = None, cache_limit: int | None = None):
        """
        Args:
            folder: a local folder, whose shards are read in place; or an object store's prefix
                (`s3://...`), whose shards are copied to `cache` on first use, verified by size and hash.
            cache: folder for copies; may be shared by all processes of a node, and kept between jobs.
                Default: one of this user's own in the system's temporary folder. A local dataset is copied
                only if it is given.
            cache_limit: bytes that the copies may take, those under way and the side index included; None: no
                limit. A training order needs the window's shards of each class at a time: below that, each
                step fetches again what it evicted.

        Raises:
            DataError: the dataset is not finished, or its manifest, index or side index is missing or broken.
        """
        self.folder = folder.rstrip("/")
        remote = "://" in folder
        if not remote and not Path(folder).is_dir():
            raise DataError(f"{folder}: there is no such folder; {_MAKE}")
        self._cache = None
        if remote or cache is not None:
            # Imports mosaicml-streaming, a second or two, which what is read in place need not wait for.
            from data_pipeline.shard_cache import ShardCache

            self._cache = ShardCache(self.folder, _cache_folder(self.folder, cache), cache_limit)
        self.manifest = self._read_manifest()
        self._shards = self._read_index()
        beside = sum(entry.bytes for entry in self.manifest.files.values())
        least = beside + 2 * max(self._shards.sizes, default=0)
        if cache_limit is not None and cache_limit < least:
            raise DataError(
                f"the cache limit of {cache_limit} bytes is too small for {folder}: give at least {least}, "
                "what its indexes take and twice its largest shard"
            )
        self.classes: dict[int, ClassIndex] = {}
        self._first_rows: dict[int, NDArray[np.int64]] = {}
        self._first_shards: dict[int, int] = {}
        for entry in self.manifest.classes:
            self._load_class(entry)
        self._open = _OpenShards()

    def record(self, resolution: int, sample_id: int) -> LatentRecord:
        """One record.

        Args:
            resolution: a class of the dataset.
            sample_id: in `[0, classes[resolution].samples)`.

        Raises:
            DataError: the shard cannot be had, or the record cannot be decoded.
            StoreUnreachable: the file system fails, which is not the data's fault.
        """
        index = self.classes[resolution]
        if not 0 <= sample_id < index.samples:
            raise IndexError(f"class {resolution} has {index.samples} samples, asked for number {sample_id}")
        raw = int(raw_positions(np.array([sample_id]), index.dropped)[0]) if len(index.dropped) else sample_id
        first_rows = self._first_rows[resolution]
        shard = int(np.searchsorted(first_rows, raw, side="right")) - 1
        number, row = self._first_shards[resolution] + shard, raw - int(first_rows[shard])
        name = self._shards.names[number]
        try:
            reader = self._open.get(number) or self._open.put(number, self._open_shard(number))
            return reader.read(row)
        except (OSError, ValueError, struct.error) as error:
            if fails_for_a_while(error):
                raise StoreUnreachable(
                    f"{self.folder}/{name}: {error.strerror}; the same command goes on once it can be read"
                ) from error
            raise DataError(
                f"{self.folder}/{name}: record {row} ({resolution}/{sample_id}) cannot be read: {error}; "
                "run `bitdance data verify`"
            ) from error

    def _load_class(self, entry: ClassManifest) -> None:
        side = {name: self._file(f"{entry.side}/{name}") for name in SIDE_FILES}
        self.classes[entry.resolution] = load_class_index(side, entry, self.manifest.tokenizer.downsample)
        rows = self._shards.rows[entry.first_shard : entry.first_shard + entry.shards]
        if int(rows.sum()) != entry.raw_samples:
            raise DataError(
                f"{self.folder}/index.json has {int(rows.sum())} records of class {entry.resolution}, the "
                f"manifest says {entry.raw_samples}: run `bitdance data finalize` again"
            )
        self._first_rows[entry.resolution] = np.cumsum(rows) - rows
        self._first_shards[entry.resolution] = entry.first_shard

    def _open_shard(self, number: int) -> _OpenShard:
        shards = self._shards
        for _ in range(3):
            path = Path(self.folder) / shards.names[number]
            if self._cache is not None:
                path = self._cache.fetch(shards.names[number], shards.sizes[number], shards.hashes[number])
            try:
                return _OpenShard(path)
            except FileNotFoundError:
                if self._cache is None:
                    raise
        raise DataError(
            f"{shards.names[number]} is evicted before it can be opened: the cache limit is too small"
        )

    def _file(self, name: str) -> Path:
        """Local path of a file that the manifest lists, verified where it is a copy."""
        if self._cache is None:
            return Path(self.folder) / name
        entry = self.manifest.files.get(name)
        if entry is None:
            raise DataError(
                f"{self.folder}/{MANIFEST_NAME} does not list {name}: run `bitdance data finalize` again"
            )
        return self._cache.fetch(name, entry.bytes, {"sha256": entry.sha256})

    def _read_manifest(self) -> Manifest:
        where = f"{self.folder}/{MANIFEST_NAME}"
        if self._cache is not None:
            text = self._cache.fetch(MANIFEST_NAME).read_bytes()
        else:
            try:
                text = Path(where).read_bytes()
            except OSError as error:
                raise DataError(f"{where} cannot be read ({error.strerror}); {_MAKE}") from None
        return parse_manifest(text, where)

    def _read_index(self) -> _Shards:
        where = f"{self.folder}/index.json"
        try:
            return _parse_index(json.loads(self._file("index.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{where} is not an index of latent shards ({error}): run `bitdance data finalize` again"
            ) from error


@dataclass(frozen=True)
class _Shards:
    """`index.json`, without what is the same for every shard."""

    names: list[str]
    sizes: list[int]
    hashes: list[dict[str, str]]
    rows: NDArray[np.int64]


def _parse_index(index: dict[str, Any]) -> _Shards:
    """Check and condense `index.json`; raises ValueError or KeyError on anything unexpected."""
    shards = index["shards"]
    names = sorted(LATENT_COLUMNS)
    for shard in shards:
        path = PurePosixPath(shard["raw_data"]["basename"])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"shard {path} lies outside of the dataset")
        found = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        if (
            shard["format"] != "mds"
            or shard["version"] != 2
            or shard["compression"]
            or found != LATENT_COLUMNS
        ):
            raise ValueError(
                f"shard {path} is not an uncompressed MDS shard with the columns {', '.join(names)}"
            )
    return _Shards(
        names=[shard["raw_data"]["basename"] for shard in shards],
        sizes=[int(shard["raw_data"]["bytes"]) for shard in shards],
        hashes=[shard["raw_data"]["hashes"] for shard in shards],
        rows=np.array([shard["samples"] for shard in shards], np.int64),
    )


class _OpenShard:
    """One MDS shard, on a file that stays open: no path look-up per record, and safe from eviction.

    The file: u32 n, u32 offsets[n + 1], a header, then the records; a record is the u32 sizes of its variable
    columns, then all columns, both by rising name. streaming's reader decodes any columns, at four times
    the cost of the rest of a read; these are always the same.
    """

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed with the last reference to it)

    def read(self, row: int) -> LatentRecord:
        """One record; ValueError or struct.error where the bytes are not one."""
        handle = self._file.fileno()
        begin, end = struct.unpack("<2I", os.pread(handle, 8, 4 + 4 * row))
        data = os.pread(handle, end - begin, begin)
        bits, caption, key, scores = struct.unpack_from("<4I", data)
        if len(data) != end - begin or len(data) != 22 + bits + caption + key + scores:
            raise ValueError("the shard is cut short, or its bytes are not a record's")
        at = 16 + bits + caption
        (h,) = _UINT16.unpack_from(data, at)
        (n_text,) = _UINT16.unpack_from(data, at + 2 + key)
        (w,) = _UINT16.unpack_from(data, at + 4 + key + scores)
        return LatentRecord.from_mds(
            {
                "bits": data[16 : 16 + bits],
                "caption": data[16 + bits : at].decode(),
                "h": h,
                "key": data[at + 2 : at + 2 + key].decode(),
                "n_text": n_text,
                "scores": data[at + 4 + key : at + 4 + key + scores].decode(),
                "w": w,
            }
        )


class _OpenShards:
    """The shards that were used last. One that is dropped here stays open for whoever is reading it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, _OpenShard] = OrderedDict()

    def get(self, number: int) -> _OpenShard | None:
        with self._lock:
            reader = self._readers.get(number)
            if reader is not None:
                self._readers.move_to_end(number)
            return reader

    def put(self, number: int, reader: _OpenShard) -> _OpenShard:
        with self._lock:
            self._readers[number] = reader
            while len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader

    def __reduce__(self) -> tuple[type[_OpenShards], tuple[()]]:
        return _OpenShards, ()  # file handles do not travel to another process


def _cache_folder(dataset: str, cache: str | None) -> Path:
    """The folder for one dataset's copies, by default in one of the user's own."""
    folder = own_cache("latents") if cache is None else Path(cache)
    return folder / hashlib.sha256(dataset.encode()).hexdigest()[:16]
