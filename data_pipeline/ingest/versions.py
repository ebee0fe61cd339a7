"""Whether a shard is what it was: told by names and sizes, then by times, and by its content last.

A file on S3 is known by its entity tag, and what is read of it is what was listed, or reading fails
(`storage.reaching`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.shards import Shard, permitted, shard_files
from data_pipeline.ingest.storage import (
    CHANGED_MEANWHILE,
    FileState,
    file_state,
    file_version,
    is_remote,
)
from foundation.errors import DataError

CLASS_KINDS = ("classes", "class_tars")
# Between the times of an input and of a task: two servers' clocks may differ, and a marker on S3 is as much
# later than the last look at the input as the task's upload takes. A wider margin only costs hashes.
MARGIN_SECONDS = 900.0


@dataclass(frozen=True)
class Look:
    """What can be told of a shard's local files without opening one.

    Attributes:
        whole: state of the file that the shard is, or is a part of; None of a folder.
        files: states of the pictures and captions of a part of a folder or manifest, and of a whole file;
            None where there is none.
    """

    whole: FileState | None
    files: tuple[FileState | None, ...]

    @property
    def sizes(self) -> str:
        """Sixteen hex digits that tell the sizes from others, and missing files."""
        text = " ".join(str(state.size) if state else "-" for state in self.files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def last_change(self) -> float:
        """Newest time of a content or an entry, in seconds since 1970; 0 where there is none."""
        states = [state for state in self.files if state]
        return max((max(s.content_changed, s.entry_changed) for s in states), default=0) / 1e9


def look_at(shard: Shard, section: InputSection) -> Look:
    """Look at a shard; DataError where that is not permitted."""
    with permitted(shard):
        files = [file for file in shard_files(shard, section)[1] if not is_remote(file)]
        whole = None if is_remote(shard.path) else file_state(shard.path)
        return Look(whole, tuple(map(file_state, files)))


def shard_version(shard: Shard, section: InputSection) -> str:
    """What tells a shard from one that has taken its place.

    Of a file, or a tar in one: `file_version`. Of a part of a folder or manifest three hashes: its `listing`,
    the sizes of the files that it is made of, and their versions.

    Raises:
        DataError: it is not what was listed any more, or may not be read.
    """
    with permitted(shard):
        if not shard.count:
            return file_version(shard.path, shard.first, shard.size if shard.name else None)
        listing, files = shard_files(shard, section)
        if listing != shard.listing:
            raise DataError(f"{shard.label} {CHANGED_MEANWHILE}")
        contents = hashlib.sha256()
        for file in files:
            if not is_remote(file):
                contents.update(f"{file_version(file) if file_state(file) else '-'}\n".encode())
        return f"{listing} {look_at(shard, section).sizes} {contents.hexdigest()[:16]}"


def has_changed(shard: Shard, section: InputSection, then: str, since: float) -> bool:
    """Whether a shard is not what it was; its content is only read where its times do not tell.

    Args:
        shard: as it is listed now.
        section: the recipe's input.
        then: its `shard_version` at an earlier time.
        since: that time, in seconds since 1970; 0 where nobody knows.

    Raises:
        DataError: there is no such shard, or it may not be read.
    """
    look = look_at(shard, section)
    if shard.count and not then.startswith(f"{shard.listing} {look.sizes} "):
        return True
    if look.files and look.last_change < since - MARGIN_SECONDS:
        return False
    return shard_version(shard, section) != then


def captions_version(section: InputSection) -> str | None:
    """What tells the recipe's class captions from others; None where it has none."""
    return file_version(section.captions) if section.captions and section.kind in CLASS_KINDS else None
