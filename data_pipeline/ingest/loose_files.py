"""Folders with captions and class folders, cut into shards by number."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import CAPTION_BYTES, RawSample, Refused, foreign_json, printable
from data_pipeline.ingest.storage import files_below, open_stream
from data_pipeline.ingest.tars import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from foundation.errors import DataError
from foundation.progress import say

CLASSES_SHOWN = 8


@dataclass(frozen=True)
class Part:
    """A stretch of a folder or manifest.

    Attributes:
        first: number of the first picture or line.
        count: pictures or lines.
        size: bytes: of the pictures, or of the lines.
        listing: what tells it from another without opening a picture or caption, in sixteen hex digits: of a
            folder names, sizes and entity tags of pictures and captions, of a manifest its lines.
        start: byte at which the part begins; 0 in a folder.
    """

    first: int
    count: int
    size: int
    listing: str
    start: int = 0


@dataclass(frozen=True)
class _Listing:
    """A folder: bytes and entity tag of all its files, and the names of those that are pictures, sorted."""

    files: dict[str, tuple[int, str]]
    pictures: list[str]

    def caption(self, picture: str) -> str | None:
        """The name of a picture's caption file; None where it has none."""
        stem = picture.rpartition(".")[0]
        return next((f"{stem}.{e}" for e in CAPTION_EXTENSIONS if f"{stem}.{e}" in self.files), None)


@lru_cache(maxsize=1)
def _listing(folder: str) -> _Listing:
    # Kept from part to part: a worker that walked a large folder for each of its parts would do little else.
    files = files_below(folder)
    return _Listing(files, [n for n in files if n.rpartition(".")[2].lower() in IMAGE_EXTENSIONS])


def folder_parts(folder: str, section: InputSection) -> Iterator[Part]:
    """How a folder's pictures are cut into shards; none where it has none. Walks the folder anew."""
    _listing.cache_clear()
    pictures, files = _listing(folder).pictures, _listing(folder).files
    for first in range(0, len(pictures), section.samples_per_shard):
        names = pictures[first : first + section.samples_per_shard]
        listing, _ = folder_part_files(folder, first, len(names), section)
        yield Part(first, len(names), sum(files[name][0] for name in names), listing)


def folder_part_files(folder: str, first: int, count: int, section: InputSection) -> tuple[str, list[str]]:
    """A part's `listing`, and the paths of its pictures and captions."""
    whole, digest = _listing(folder), hashlib.sha256()
    pictures = whole.pictures[first : first + count]
    captions = map(whole.caption, pictures) if section.kind == "folder" else ()
    names = [*pictures, *(name for name in captions if name is not None)]
    for name in names:
        size, tag = whole.files[name]
        digest.update(os.fsencode(name) + f"\0{size} {tag}\0".encode())
    return digest.hexdigest()[:16], [_join(folder, name) for name in names]


def read_folder_part(
    folder: str, first: int, count: int, section: InputSection
) -> Iterator[RawSample | Refused]:
    """Some of a folder's pictures, with the captions of their `.txt` files or of their class."""
    captions = class_captions(section)
    listing = _listing(folder)
    for name in listing.pictures[first : first + count]:
        class_name, below = _class_of(name)
        if section.kind == "classes" and not below:
            yield Refused(name, "lies in no class's folder")
            continue
        data = read_bounded(_join(folder, name), listing.files[name][0], section.max_member_bytes)
        if isinstance(data, Refused):
            yield Refused(name, data.reason)
        elif section.kind == "classes":
            yield RawSample(name, data, class_caption(class_name, captions))
        else:
            yield _captioned(folder, name, data, listing)


def _captioned(folder: str, name: str, data: bytes, listing: _Listing) -> RawSample | Refused:
    caption = listing.caption(name)
    if caption is None:
        return RawSample(name, data, None)
    text = read_bounded(_join(folder, caption), listing.files[caption][0], CAPTION_BYTES)
    if isinstance(text, Refused):
        return Refused(name, f"its {posixpath.basename(caption)} is {text.reason}")
    return RawSample(name, data, text.decode("utf-8", errors="replace"))


def class_names(folder: str) -> set[str]:
    """The classes that a folder has pictures of."""
    return {name for name, below in map(_class_of, _listing(folder).pictures) if below}


def _class_of(picture: str) -> tuple[str, str]:
    """A picture's class and its path below that; the latter "" where the picture is in none."""
    class_name, _, below = picture.replace(os.sep, "/").partition("/")
    return class_name, below


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


def say_which_lack_captions(classes: set[str], section: InputSection) -> None:
    """Say which classes the recipe's captions have no entry for."""
    missing = sorted(classes - class_captions(section).keys())
    if section.captions is not None and missing:
        more = ", ..." if len(missing) > CLASSES_SHOWN else ""
        shown = ", ".join(map(printable, missing[:CLASSES_SHOWN])) + more
        say(f"{len(missing)} classes lack a caption in {section.captions} and have their names: {shown}")


def read_bounded(path: str, size: int | None, cap: int) -> bytes | Refused:
    """A file's content; refused where it has more bytes than the cap.

    Args:
        path: of the file.
        size: its bytes, where they are known.
        cap: in bytes.
    """
    if size is None or size <= cap:
        with open_stream(path) as stream:
            data = stream.read(cap + 1)
        if len(data) <= cap:
            return data
    return Refused(path, f"over the cap of {cap} bytes")


def _join(folder: str, name: str) -> str:
    return posixpath.join(folder, name)
