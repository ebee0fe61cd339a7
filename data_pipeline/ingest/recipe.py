"""The part of a recipe that says which image shards to read, and which of their samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from foundation.recipes import Section


class InputSection(Section):
    """Image shards.

    Attributes:
        kind: `webdataset`: tars of img2dataset and the like.
        path: paths, globs or `s3://` addresses.
        incomplete: what to do with a tar that lacks its `_stats.json` while its neighbours have theirs (the
            downloader writes it last, so the tar may be cut short): `refuse` the job, `skip` it, or `read`
            it.
        max_member_bytes: cap on the size of one member of a tar.
    """

    kind: Literal["webdataset"] = "webdataset"
    path: list[str] = Field(min_length=1)
    incomplete: Literal["refuse", "skip", "read"] = "refuse"
    max_member_bytes: int = Field(default=256 << 20, gt=0)


class KeepSection(Section):
    """Only samples that a filter has kept; its captions and scores go before those of the shards.

    Attributes:
        rows: the filter's `kept.parquet`.
        by: the column that rows and samples share.
    """

    rows: str
    by: Literal["uid", "hash", "url", "sha256"]
