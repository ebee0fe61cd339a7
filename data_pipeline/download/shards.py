"""Which shards of img2dataset are complete.

It writes a shard's tar, its parquet and at last its `_stats.json` in place, and passes over what has the
last of them. That may lie beside a tar that is cut short all the same, or be cut short itself: where the
power went, or the disk was full.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

from foundation.errors import DataError
from foundation.json_files import read_json
from foundation.progress import say

STATS = ("status_dict", "count", "successes", "failed_to_download", "failed_to_resize", "duration")
END_MARK = bytes(2 * tarfile.BLOCKSIZE)


def complete_shards(folder: Path, expected: int) -> list[dict[str, Any]]:
    """The statistics of the complete ones of the shards 0 to `expected` - 1 in a folder."""
    found = (_stats(folder, number) for number in range(expected))
    return [stats for stats in found if stats is not None]


def forget_damaged(folder: Path, expected: int) -> None:
    """Remove the `_stats.json` of shards that are not complete, so that the tool fetches these again."""
    for number in range(expected):
        stats = _stats_path(folder, number)
        if stats.exists() and _stats(folder, number) is None:
            say(f"{folder / _name(number)}.tar is cut short, damaged or gone; its pictures are fetched again")
            stats.unlink()


def _stats(folder: Path, number: int) -> dict[str, Any] | None:
    """What `_stats.json` says of a shard; None where the shard is not complete."""
    try:
        stats = read_json(_stats_path(folder, number), "", *STATS)
        return stats if _has_end(folder / f"{_name(number)}.tar") else None
    except (FileNotFoundError, DataError):
        return None


def _has_end(tar: Path) -> bool:
    """Whether a file ends as tars do: in whole blocks, the last two of them empty."""
    with open(tar, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(END_MARK)))
        return size % tarfile.BLOCKSIZE == 0 and file.read() == END_MARK


def _stats_path(folder: Path, number: int) -> Path:
    return folder / f"{_name(number)}_stats.json"


def _name(number: int) -> str:
    return f"{number:05d}"
