"""JSONL manifests, a line `{"image": path, "caption": text}` for each picture, cut into shards by lines."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any, NamedTuple

from data_pipeline.ingest.loose_files import Part, read_bounded
from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import JSON_BYTES, RawSample, Refused, foreign_json, plain_values
from data_pipeline.ingest.storage import NoSuchFile, file_state, is_remote, open_stream


class _Line(NamedTuple):
    """A manifest's line.

    Attributes:
        text: with its end; of one over the cap the beginning.
        size: bytes.
    """

    text: bytes
    size: int

    @property
    def blank(self) -> bool:
        return self.size <= JSON_BYTES and not self.text.strip()


def _lines(stream: IO[bytes]) -> Iterator[_Line]:
    while text := stream.readline(JSON_BYTES + 1):
        size, piece = len(text), text
        while not piece.endswith(b"\n") and (piece := stream.readline(JSON_BYTES + 1)):
            size += len(piece)
        yield _Line(text, size)


class _Tally:
    """Lines of a manifest, summed up one by one: together they may be large."""

    def __init__(self) -> None:
        self.count = self.size = 0
        self.blank = True
        self.digest = hashlib.sha256()

    def add(self, line: _Line) -> None:
        self.count += 1
        self.size += line.size
        self.blank = self.blank and line.blank
        self.digest.update(f"{line.size} ".encode() + line.text)

    @property
    def listing(self) -> str:
        return self.digest.hexdigest()[:16]


def jsonl_parts(path: str, section: InputSection) -> Iterator[Part]:
    """How a manifest's lines are cut into shards, but for those of blank lines alone."""
    first = start = 0
    with open_stream(path) as stream:
        lines = _lines(stream)
        while True:
            taken = _Tally()
            for line in islice(lines, section.samples_per_shard):
                taken.add(line)
            if not taken.count:
                return
            if not taken.blank:
                yield Part(first, taken.count, taken.size, taken.listing, start)
            first, start = first + taken.count, start + taken.size


def jsonl_part_files(path: str, part: Part) -> tuple[str, list[str]]:
    """A part's `listing`, and the paths of the pictures that it names."""
    folder, taken = posixpath.dirname(path), _Tally()
    pictures = list[str]()
    with open_stream(path) as stream:
        stream.seek(part.start)
        for line in islice(_lines(stream), part.count):
            taken.add(line)
            fields = _fields(line)
            if not isinstance(fields, str):
                pictures.append(_address(folder, fields["image"]))
    return taken.listing, pictures


def read_jsonl_part(path: str, part: Part, section: InputSection) -> Iterator[RawSample | Refused]:
    """Some of a manifest's pictures; their paths are relative to the manifest's folder."""
    folder = posixpath.dirname(path)
    seen: set[str] = set()
    with open_stream(path) as stream:
        stream.seek(part.start)
        for number, line in enumerate(islice(_lines(stream), part.count), part.first):
            if line.blank:
                continue
            line_name = f"{posixpath.basename(path)}:{number + 1}"
            sample = _jsonl_sample(line, line_name, folder, section)
            if sample.key in seen:
                sample = Refused(line_name, f"duplicate key {sample.key!r} in its shard")
            seen.add(sample.key)
            yield sample


def _fields(line: _Line) -> dict[str, Any] | str:
    """What a line says, with a path for `image`; else why it cannot be used."""
    if line.size > JSON_BYTES:
        return f"its line has {line.size} bytes, over the cap of {JSON_BYTES}"
    try:
        fields = foreign_json(line.text)
    except ValueError:
        return "its line is no JSON"
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        return 'its line is not {"image": path, "caption": text}'
    if "://" in fields["image"] and not is_remote(fields["image"]):
        return "its image is an address on the web; download it first"
    return fields


def _jsonl_sample(line: _Line, key: str, folder: str, section: InputSection) -> RawSample | Refused:
    fields = _fields(line)
    if isinstance(fields, str):
        return Refused(key, fields)
    address = _address(folder, fields["image"])
    try:
        # What is no path at all (a NUL, an endless name) is no file either; a pipe would never end.
        if not is_remote(address) and file_state(address) is None:
            return Refused(key, "its image does not exist, or is no file")
        data = read_bounded(address, None, section.max_member_bytes)
    except (NoSuchFile, ValueError):
        return Refused(key, "its image does not exist, or is no file")
    if isinstance(data, Refused):
        return Refused(key, data.reason)
    caption = fields.get("caption")
    name = fields.get("key", key)
    return RawSample(
        str(name) if isinstance(name, (str, int)) else key,
        data,
        caption if isinstance(caption, str) else None,
        plain_values(fields),
    )


def _address(folder: str, image: str) -> str:
    return image if is_remote(image) else posixpath.join(folder, image)
