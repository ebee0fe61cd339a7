"""The recipe of `bitdance data download`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.ingest.storage import LocalPath
from foundation.sections import Section


class PoliteSection(Section):
    """How the job behaves towards the servers that it asks.

    Attributes:
        contact: an address (https:// or mailto:) where the people behind a server learn whose job this is and
            reach you; it goes into the user agent.
        respect_opt_out: leave out pictures whose `X-Robots-Tag` says noai, noimageai, noindex or
            noimageindex, or whose `TDM-Reservation` is 1.
        private_addresses: ask private, loopback and link-local addresses, too; for tests only, since a table
            of the web may name any host of your network.
    """

    contact: str = Field(pattern=r"^(https?://|mailto:)[^\s()<>]+$")
    respect_opt_out: bool = True
    private_addresses: bool = False


class LimitSection(Section):
    """Caps on one picture.

    Attributes:
        max_megabytes: larger answers are broken off.
        stall_seconds: longest wait for a connection, or for the next bytes.
        total_seconds: longest time for a picture's bytes, once the server has begun to answer.
        retries: further attempts at a picture that failed.
    """

    max_megabytes: float = Field(default=32.0, gt=0.0)
    stall_seconds: int = Field(default=10, gt=0)
    total_seconds: float = Field(default=60.0, gt=0.0)
    retries: int = Field(default=0, ge=0)


class PictureSection(Section):
    """What becomes of a picture.

    Attributes:
        side: pixels that `resize` refers to. Pictures are only ever shrunk; one that is small enough keeps
            its own bytes.
        resize: `keep_ratio_largest` shrinks the longer side to `side`, `keep_ratio` the shorter one, `no`
            neither.
        min_side: pictures with a shorter side below it are not kept.
        quality: of JPEG, where a picture was shrunk.
    """

    side: int = Field(default=1024, gt=0)
    resize: Literal["keep_ratio_largest", "keep_ratio", "no"] = "keep_ratio_largest"
    min_side: int = Field(default=0, ge=0)
    quality: int = Field(default=95, ge=1, le=100)


class WorkSection(Section):
    """How the work is done; it does not change what is written.

    Attributes:
        processes: each works on one shard at a time.
        threads: requests under way at a time in each process.
    """

    processes: int = Field(default=4, gt=0)
    threads: int = Field(default=64, gt=0)


class DownloadRecipe(Section):
    """From kept rows to webdataset shards.

    Attributes:
        rows: the filter's `kept.parquet`, local.
        output: a local folder; the tars come into `shards/` below it.
        polite: behaviour towards servers.
        limits: caps on one picture.
        pictures: what becomes of a picture.
        samples_per_shard: rows a tar, failed ones included.
        verify_sha256: leave out pictures that are not those of the rows' `sha256` any more.
        compute: processes and threads.
    """

    rows: LocalPath
    output: LocalPath
    polite: PoliteSection
    limits: LimitSection = LimitSection()
    pictures: PictureSection = PictureSection()
    samples_per_shard: int = Field(default=10_000, gt=0)
    verify_sha256: bool = False
    compute: WorkSection = WorkSection()
