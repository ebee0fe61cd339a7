"""Lists image shards and opens them, local or `s3://`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

from data_pipeline.ingest.kept import identity
from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import RawSample, Refused
from data_pipeline.ingest.tars import read_tar
from foundation.errors import DataError, Problems
from foundation.progress import say


@dataclass(frozen=True)
class Shard:
    """One input shard.

    Attributes:
        path: local path or `s3://` address.
        size: bytes.
    """

    path: str
    size: int


def list_shards(section: InputSection) -> list[Shard]:
    """The shards of a recipe's input, sorted by path.

    Raises:
        DataError: a pattern without a match, an empty shard, or shards that are not complete.
    """
    problems = Problems()
    found: dict[str, int] = {}
    for pattern in section.path:
        matches = _sizes(pattern)
        if not matches:
            problems.add(pattern, "no shard there", "give a folder of tars, or a glob such as shards/*.tar")
        found.update(matches)
    for path, size in found.items():
        if size == 0:
            problems.add(path, "is empty", "fetch it again or remove it")
    complete = [path for path in found if _has_stats(path)]
    incomplete = sorted(path for path in found if path not in complete) if complete else []
    for path in incomplete:
        if section.incomplete == "refuse":
            problems.add(
                path,
                f"has no {os.path.basename(_stats_path(path))}, so its download did not finish",
                "finish it, or set input.incomplete to skip or read",
            )
        elif section.incomplete == "skip":
            del found[path]
    problems.raise_if_any(DataError, "The image shards cannot be used")
    if incomplete and section.incomplete == "skip":
        say(f"{len(incomplete)} shards without _stats.json are skipped")
    return [Shard(path, found[path]) for path in sorted(found)]


def read_shard(shard: Shard, section: InputSection) -> Iterator[RawSample | Refused]:
    """The samples of a shard, in its order; DataError where the shard as a whole cannot be used."""
    with open_stream(shard.path) as stream:
        yield from read_tar(stream, shard.path, section.max_member_bytes)


def shard_identities(shard: Shard, section: InputSection, by: str) -> list[Any]:
    """What a filter's rows know the shard's samples by, without those that lack it.

    Read from the parquet that img2dataset leaves beside its tar where that has the column, else from the samples'
    json, at the cost of reading the tar once more.
    """
    table = _sidecar(shard.path)
    if table is not None and by in table.schema_arrow.names:
        values = table.read([by]).column(by).to_pylist()
        samples = (RawSample("", b"", None, {by: value}) for value in values)
    else:
        read = read_shard(shard, section)
        samples = (sample for sample in read if isinstance(sample, RawSample))
    return [key for key in (identity(sample, by) for sample in samples) if key is not None]


def _sidecar(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    beside = path.removesuffix(".tar") + ".parquet"
    try:
        if path.startswith("s3://"):
            import fsspec

            return pq.ParquetFile(beside.removeprefix("s3://"), filesystem=fsspec.filesystem("s3"))
        return pq.ParquetFile(beside)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


@contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """Open a local file or an `s3://` object for reading; DataError where that fails."""
    try:
        if path.startswith("s3://"):
            import fsspec

            with fsspec.open(path, "rb") as stream:
                yield cast(IO[bytes], stream)
        else:
            with open(path, "rb") as stream:
                yield stream
    except FileNotFoundError:
        raise DataError(f"{path} does not exist any more") from None


def _sizes(pattern: str) -> dict[str, int]:
    """Path -> size of what a pattern stands for; a folder stands for the tars in it."""
    if pattern.startswith("s3://"):
        import fsspec

        filesystem: Any = fsspec.filesystem("s3")
        pattern = pattern if pattern.endswith(".tar") else pattern.rstrip("/") + "/*.tar"
        details = filesystem.glob(pattern, detail=True)
        return {f"s3://{path}": int(info["size"]) for path, info in details.items()}
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    return {
        path: os.path.getsize(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)
    }


def _stats_path(path: str) -> str:
    return path.removesuffix(".tar") + "_stats.json"


def _has_stats(path: str) -> bool:
    if path.startswith("s3://"):
        import fsspec

        return bool(fsspec.filesystem("s3").exists(_stats_path(path)))
    return os.path.exists(_stats_path(path))
