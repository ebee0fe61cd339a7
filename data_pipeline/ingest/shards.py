"""The list of input shards, and each shard's samples, whatever their kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any, TypeVar, cast

from data_pipeline.ingest.kept import identity
from data_pipeline.ingest.loose_files import (
    Part,
    class_caption,
    class_captions,
    class_names,
    folder_part_files,
    folder_parts,
    read_folder_part,
    say_which_lack_captions,
)
from data_pipeline.ingest.manifests import jsonl_part_files, jsonl_parts, read_jsonl_part
from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import RawSample, Refused, checked, printable
from data_pipeline.ingest.storage import (
    exists,
    forget_listings,
    matching_files,
    matching_folders,
    not_permitted,
    open_stream,
    reaching,
)
from data_pipeline.ingest.tables import open_table, read_table
from data_pipeline.ingest.tars import DAMAGE, read_tar, tars_inside
from foundation.errors import DataError, Problems
from foundation.progress import say

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One input shard.

    Attributes:
        path: local path or `s3://` address.
        size: bytes; another size means another content.
        first: number of its first picture or line, for a part of a folder or manifest; for a tar in a tar,
            the byte at which it begins.
        count: pictures or lines, for a part of a folder or manifest.
        name: of a tar in a tar.
        start: byte at which a part of a manifest begins.
        listing: of a part of a folder or manifest, what told it from others when it was listed
            (`loose_files.Part`).
    """

    path: str
    size: int
    first: int = 0
    count: int = 0
    name: str = ""
    start: int = 0
    listing: str = ""

    @property
    def label(self) -> str:
        """What tells the shard from all others, for messages."""
        if self.name:
            return f"{self.path}[{self.name}]"
        return f"{self.path}[{self.first}:{self.first + self.count}]" if self.count else self.path

    @property
    def part(self) -> Part:
        """Which part of a folder or manifest it is."""
        return Part(self.first, self.count, self.size, self.listing, self.start)


def list_shards(section: InputSection) -> list[Shard]:
    """The shards of a recipe's input as it is now, sorted by path.

    Raises:
        DataError: a pattern without a match, an empty shard, or shards that are not complete.
    """
    problems = Problems()
    shards: dict[str, Shard] = {}
    forget_listings(section.path)
    for pattern in section.path:
        try:
            found = list(_LISTERS[section.kind](pattern, section, problems))
        except PermissionError as error:
            problems.add(
                error.filename or pattern, f"cannot be read: {error.strerror}", "give rights to read it"
            )
            continue
        if not found and not problems.lines:
            problems.add(
                pattern, f"no pictures of kind {section.kind!r} there", "see input.kind and input.path"
            )
        for shard in found:
            shards[shard.label] = shard
    for shard in shards.values():
        if shard.size == 0:
            problems.add(printable(shard.label), "is empty", "fetch it again or remove it")
        if printable(shard.label) != shard.label:
            problems.add(printable(shard.label), "its name is not UTF-8", "rename it")
    if section.kind == "webdataset":
        shards = _complete_ones(shards, section, problems)
    problems.raise_if_any(DataError, "The image shards cannot be used")
    return sorted(shards.values(), key=lambda shard: (shard.path, shard.first))


def read_shard(shard: Shard, section: InputSection) -> Iterator[RawSample | Refused]:
    """The samples of a shard, in its order; DataError where the shard as a whole cannot be used."""
    with permitted(shard):
        yield from map(checked, _read(shard, section))


@contextmanager
def permitted(shard: Shard) -> Iterator[None]:
    """Turns what is raised about a file of the shard that may not be read into DataError."""
    try:
        yield
    except PermissionError as error:
        raise DataError(not_permitted(shard.path, error)) from None


def shard_files(shard: Shard, section: InputSection) -> tuple[str, list[str]]:
    """What a shard's `listing` is now, and the files that it is made of, the manifest aside."""
    match section.kind:
        case "folder" | "classes":
            return folder_part_files(shard.path, shard.first, shard.count, section)
        case "jsonl":
            return jsonl_part_files(shard.path, shard.part)
        case _:
            return "", [shard.path]


def of_each(shards: Iterable[Shard], read: Callable[[Shard], T]) -> Iterator[T]:
    """What `read` makes of each shard; DataError behind the last one, of all shards that it cannot use."""
    problems: list[str] = []
    for shard in shards:
        try:
            made = read(shard)
        except DataError as error:
            problems.append(str(error))
        else:
            yield made
    if problems:
        raise DataError("\n".join(problems))


def _read(shard: Shard, section: InputSection) -> Iterator[RawSample | Refused]:
    match section.kind:
        case "folder" | "classes":
            yield from read_folder_part(shard.path, shard.first, shard.count, section)
        case "jsonl":
            yield from read_jsonl_part(shard.path, shard.part, section)
        case "parquet":
            yield from read_table(shard.path, section)
        case "webdataset":
            with open_stream(shard.path) as stream:
                yield from read_tar(stream, shard.path, section.max_member_bytes)
        case "class_tars":
            yield from _read_class_tar(shard, section)


def shard_identities(shard: Shard, section: InputSection, by: str) -> list[Any]:
    """What a filter's rows know the shard's samples by, without those that lack it.

    Read from the parquet that img2dataset leaves beside its tar where that has the column, else from the
    samples themselves, at the cost of reading the shard once more.
    """
    table = shard.path if section.kind == "parquet" else shard.path.removesuffix(".tar") + ".parquet"
    if section.kind in ("webdataset", "parquet") and exists(table):
        sidecar = open_table(table)
        if by in sidecar.schema_arrow.names:
            with reaching(table):
                values = sidecar.read([by]).column(by).to_pylist()
            fields = (RawSample("", b"", None, {by: value}) for value in values)
            return [key for key in (identity(sample, by) for sample in fields) if key is not None]
    samples = (sample for sample in read_shard(shard, section) if isinstance(sample, RawSample))
    return [key for key in (identity(sample, by) for sample in samples) if key is not None]


def _list_tars(pattern: str, section: InputSection, problems: Problems) -> Iterator[Shard]:
    for path, size in matching_files(pattern, ".tar").items():
        yield Shard(path, size)


def _list_tables(pattern: str, section: InputSection, problems: Problems) -> Iterator[Shard]:
    for path, size in matching_files(pattern, ".parquet").items():
        yield Shard(path, size)


def _list_folder(pattern: str, section: InputSection, problems: Problems) -> Iterator[Shard]:
    classes = set[str]()
    for folder in matching_folders(pattern):
        for part in folder_parts(folder, section):
            yield _shard_of(folder, part)
        classes |= class_names(folder) if section.kind == "classes" else set()
    say_which_lack_captions(classes, section)


def _list_manifests(pattern: str, section: InputSection, problems: Problems) -> Iterator[Shard]:
    for path in matching_files(pattern, ".jsonl"):
        for part in jsonl_parts(path, section):
            yield _shard_of(path, part)


def _shard_of(path: str, part: Part) -> Shard:
    return Shard(path, part.size, part.first, part.count, start=part.start, listing=part.listing)


def _list_class_tars(pattern: str, section: InputSection, problems: Problems) -> Iterator[Shard]:
    classes = set[str]()
    for path, size in matching_files(pattern, ".tar").items():
        try:
            with open_stream(path) as stream:
                inner = [
                    Shard(path, length, first, name=name) for name, first, length in tars_inside(stream, size)
                ]
        except DAMAGE as error:
            problems.add(path, f"is no tar, damaged or cut short ({error})", "fetch it again")
        else:
            yield from (found := inner or [Shard(path, size)])
            classes |= set(map(_class_of_tar, found))
    say_which_lack_captions(classes, section)


def _class_of_tar(shard: Shard) -> str:
    return os.path.basename(shard.name or shard.path).removesuffix(".tar")


_LISTERS: dict[str, Callable[[str, InputSection, Problems], Iterator[Shard]]] = {
    "webdataset": _list_tars,
    "parquet": _list_tables,
    "folder": _list_folder,
    "classes": _list_folder,
    "jsonl": _list_manifests,
    "class_tars": _list_class_tars,
}


def _complete_ones(shards: dict[str, Shard], section: InputSection, problems: Problems) -> dict[str, Shard]:
    """Without unfinished downloads, or with a problem for each, as the recipe says."""
    complete = {path for path in shards if exists(_stats_path(path))}
    incomplete = sorted(set(shards) - complete) if complete else []
    if section.incomplete == "read" or not incomplete:
        return shards
    if section.incomplete == "skip":
        say(f"{len(incomplete)} shards without _stats.json are skipped")
        return {path: shard for path, shard in shards.items() if path in complete}
    for path in incomplete:
        stats = os.path.basename(_stats_path(path))
        fix = "finish it, or set input.incomplete to skip or read"
        problems.add(path, f"has no {stats}, so its download did not finish", fix)
    return shards


def _stats_path(path: str) -> str:
    return path.removesuffix(".tar") + "_stats.json"


def _read_class_tar(shard: Shard, section: InputSection) -> Iterator[RawSample | Refused]:
    captions = class_captions(section)
    with open_stream(shard.path) as stream:
        stream.seek(shard.first)
        inner = cast(IO[bytes], _Bounded(stream, shard.size)) if shard.name else stream
        for sample in read_tar(inner, shard.label, section.max_member_bytes):
            if isinstance(sample, RawSample):
                sample = replace(sample, caption=class_caption(_class_of_tar(shard), captions))
            yield sample


class _Bounded:
    """A stretch of a stream."""

    def __init__(self, stream: IO[bytes], size: int):
        self.stream = stream
        self.left = size

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        return data
