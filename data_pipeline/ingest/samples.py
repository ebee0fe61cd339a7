"""What every kind of image shard is turned into before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RawSample:
    """A picture as it lies in its shard.

    Attributes:
        key: name inside its shard.
        image: the file's bytes, not yet decoded.
        caption: as found; None where the shard has none.
        fields: the shard's other columns (img2dataset's json, parquet columns).
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
