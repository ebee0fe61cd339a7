"""A finished task's marker, `done.json`: counts, what made the task, and the hash of each of its files.

It ends in its own hash, so that no byte of it can change unseen; what does not fit is no marker, and its task
is not done.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.store import Store
from foundation.files import sha256_file

DONE_NAME = "done.json"
SHARD_SUFFIX = ".mds"
CHANGED = "has another content than when it was written (sha256)"
Marker = dict[str, Any]


def marker_text(marker: Marker) -> bytes:
    """The content of `done.json`: sorted keys, with the hash of all the others under `sha256`."""
    digest = hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()
    return (json.dumps(marker | {"sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def parse_marker(text: bytes) -> Marker | None:
    """The inverse of `marker_text`; None where a byte is not as it was written."""
    try:
        marker = json.loads(text)
        del marker["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return marker if marker_text(marker) == text else None


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size and sha256 of every file under `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in paths
    }


def changed_files(store: Store, task: str, marker: Marker) -> dict[str, str]:
    """Those of a task's files, its shards aside, that are not what the marker says: name -> what they are.

    Args:
        store: of the dataset.
        task: name of the task's folder.
        marker: of the task.
    """
    expected = {
        f"{task}/{name}": entry["sha256"]
        for name, entry in marker["files"].items()
        if not name.endswith(SHARD_SUFFIX)
    }
    bad = dict[str, str]()
    contents = store.read_many(list(expected), bad)
    found = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    return {name: bad.get(name, CHANGED) for name, digest in expected.items() if found.get(name) != digest}


def some_of(numbers: Sequence[int]) -> str:
    """The first few tasks' numbers, for a message."""
    return ", ".join(f"{number:05d}" for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")


def total_counts(markers: Mapping[int, Marker]) -> Counter[str]:
    """Samples of finished tasks, by what became of them (`counts` of their markers)."""
    total: Counter[str] = Counter()
    for marker in markers.values():
        total.update(marker["counts"])
    return total


def counts_in_words(counts: Counter[str], lists: str) -> str:
    """A line about the counts.

    Args:
        counts: as `total_counts` has them.
        lists: where the samples are listed that went into no class.
    """
    return (
        f"{counts['read']:,} samples read, {counts['not_kept']:,} not kept by the filter, "
        f"{counts['too_small']:,} too small for every class, {counts['refused']:,} refused"
        + (f" (which and why: {lists})" if counts["too_small"] or counts["refused"] else "")
    )


def without_samples(markers: Mapping[int, Marker]) -> str:
    """Which finished tasks had a shard without a sample, in a line; "" where none had."""
    empty = sorted(number for number, marker in markers.items() if not marker["counts"]["read"])
    return f"{len(empty):,} tasks had a shard without any sample: {some_of(empty)}" if empty else ""
