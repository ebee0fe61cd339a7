"""Folders with captions, class folders and JSONL manifests, cut into shards by number."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import RawSample, Refused, foreign_json, plain_values
from data_pipeline.ingest.storage import files_below, is_remote, open_stream
from data_pipeline.ingest.tars import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from foundation.errors import DataError


@dataclass(frozen=True)
class Part:
    """A stretch of a folder or manifest.

    Attributes:
        first: number of the first picture.
        count: pictures.
        size: bytes: of the pictures, or of the manifest's lines.
        start: byte at which the part begins; 0 in a folder.
    """

    first: int
    count: int
    size: int
    start: int


@dataclass(frozen=True)
class _Listing:
    """A folder: the bytes of all its files, and the names of those that are pictures, sorted."""

    files: dict[str, int]
    pictures: list[str]


@lru_cache(maxsize=1)
def _listing(folder: str) -> _Listing:
    # Kept from part to part: a worker that walked a large folder for each of its parts would do little else.
    files = files_below(folder)
    return _Listing(files, [n for n in files if n.rpartition(".")[2].lower() in IMAGE_EXTENSIONS])


def folder_parts(folder: str, section: InputSection) -> Iterator[Part]:
    """How a folder's pictures are cut into shards; none where it has none. Walks the folder anew."""
    _listing.cache_clear()
    listing = _listing(folder)
    for part in _parts((listing.files[name] for name in listing.pictures), section.samples_per_shard):
        yield replace(part, start=0)


def read_folder_part(
    folder: str, first: int, count: int, section: InputSection
) -> Iterator[RawSample | Refused]:
    """Some of a folder's pictures, with the captions of their `.txt` files or of their class."""
    captions = class_captions(section)
    listing = _listing(folder)
    files = listing.files
    for name in listing.pictures[first : first + count]:
        data = _picture_bytes(_join(folder, name), files[name], section)
        if isinstance(data, Refused):
            yield Refused(name, data.reason)
            continue
        if section.kind == "classes":
            yield RawSample(name, data, class_caption(name.replace(os.sep, "/").split("/")[0], captions))
            continue
        stem = name.rpartition(".")[0]
        text = next((f"{stem}.{e}" for e in CAPTION_EXTENSIONS if f"{stem}.{e}" in files), None)
        caption = None
        if text is not None:
            with open_stream(_join(folder, text)) as stream:
                caption = stream.read(section.max_member_bytes).decode("utf-8", errors="replace")
        yield RawSample(name, data, caption)


def jsonl_parts(path: str, section: InputSection) -> Iterator[Part]:
    """How a manifest's lines are cut into shards."""
    with open_stream(path) as stream:
        yield from _parts(map(len, stream), section.samples_per_shard)


def read_jsonl_part(path: str, part: Part, section: InputSection) -> Iterator[RawSample | Refused]:
    """Some of a manifest's pictures; their paths are relative to the manifest's folder."""
    folder = posixpath.dirname(path)
    seen: set[str] = set()
    with open_stream(path) as stream:
        stream.seek(part.start)
        for number, line in enumerate(islice(stream, part.count), part.first):
            line_name = f"{posixpath.basename(path)}:{number + 1}"
            sample = _jsonl_sample(line, line_name, folder, section)
            if sample.key in seen:
                sample = Refused(line_name, f"duplicate key {sample.key!r} in its shard")
            seen.add(sample.key)
            yield sample


def _jsonl_sample(line: bytes, key: str, folder: str, section: InputSection) -> RawSample | Refused:
    try:
        fields = foreign_json(line)
    except ValueError:
        return Refused(key, "its line is no JSON")
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        return Refused(key, 'its line is not {"image": path, "caption": text}')
    image = fields["image"]
    if "://" in image and not is_remote(image):
        return Refused(key, "its image is an address on the web; download it first")
    address = image if is_remote(image) else _join(folder, image)
    try:
        # What is no path at all (a NUL, an endless name) is no file either; a pipe would never end.
        if not is_remote(address) and not os.path.isfile(address):
            return Refused(key, "its image does not exist, or is no file")
        data = _picture_bytes(address, None, section)
    except (DataError, ValueError):
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


def class_captions(section: InputSection) -> dict[str, str]:
    """The recipe's class names -> captions; DataError where the file is none."""
    if section.captions is None:
        return {}
    with open_stream(section.captions) as stream:
        try:
            captions = foreign_json(stream.read())
        except ValueError as error:
            raise DataError(f"{section.captions} is not JSON: {error}") from None
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise DataError(f"{section.captions} is not an object of class name -> caption")
    return captions


def class_caption(name: str, captions: dict[str, str]) -> str:
    """The caption of a class: the recipe's, else its name with spaces for underscores."""
    return captions.get(name, name.replace("_", " "))


def _picture_bytes(path: str, size: int | None, section: InputSection) -> bytes | Refused:
    if size is None or size <= section.max_member_bytes:
        with open_stream(path) as stream:
            data = stream.read(section.max_member_bytes + 1)
        if len(data) <= section.max_member_bytes:
            return data
    return Refused(path, f"over the cap of {section.max_member_bytes} bytes")


def _join(folder: str, name: str) -> str:
    return posixpath.join(folder, name)


def _parts(sizes: Iterable[int], per_shard: int) -> Iterator[Part]:
    """Parts of `per_shard` pictures or lines, of `sizes` bytes each, one behind the other."""
    remaining, first, start = iter(sizes), 0, 0
    while taken := list(islice(remaining, per_shard)):
        yield Part(first, len(taken), sum(taken), start)
        first, start = first + len(taken), start + sum(taken)
