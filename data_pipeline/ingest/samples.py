"""What every kind of image shard is turned into before anything is decoded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

# What strangers wrote is read only up to here, for a worker parses it whole. JSON becomes up to fifty times
# its bytes in Python's objects; the downloader's, with the EXIF of a camera, has a few kilobytes.
JSON_BYTES = 1 << 20
CAPTION_BYTES = 4 << 20  # far above what `captions.max_tokens` leaves of one


@dataclass(frozen=True)
class RawSample:
    """A picture as it lies in its shard.

    Attributes:
        key: name inside its shard.
        image: the file's bytes, not yet decoded.
        caption: as found; None where the shard has none.
        fields: the shard's other columns (img2dataset's json, parquet columns): plain values.
    """

    key: str
    image: bytes
    caption: str | None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def json_exif(self) -> str | None:
        """The shard's EXIF field, where it has one."""
        exif = self.fields.get("exif")
        return exif if isinstance(exif, str) else None


@dataclass(frozen=True)
class Refused:
    """A sample of a shard that is none: its key and the reason, for the quarantine list."""

    key: str
    reason: str


def foreign_json(text: str | bytes) -> Any:
    """Parse JSON that strangers wrote; ValueError for whatever is none, brackets without end among it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def plain_values(fields: dict[str, Any]) -> dict[str, Any]:
    """Without lists and objects: nobody reads them, and they need not fit through a pipe."""
    return {name: value for name, value in fields.items() if not isinstance(value, (dict, list))}


def printable(text: str) -> str:
    """The text with `\\udce9` and the like spelled out where a name was not UTF-8: it can be written then."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def checked(sample: RawSample | Refused) -> RawSample | Refused:
    """The sample, refused where its name is not UTF-8; what is refused has a key that can be written."""
    key = printable(sample.key)
    if isinstance(sample, Refused):
        return Refused(key, printable(sample.reason))
    return sample if key == sample.key else Refused(key, "its name is not UTF-8")
