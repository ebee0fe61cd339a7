"""Files of input data, local or `s3://` (by s3fs; keys come from where AWS tools keep them)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from foundation.errors import DataError


@contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; DataError where it is not there."""
    try:
        if is_remote(path):
            with remote_files().open(path, "rb") as stream:
                yield cast(IO[bytes], stream)
        else:
            with open(path, "rb") as stream:
                yield stream
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None


def matching_files(pattern: str, suffix: str) -> dict[str, int]:
    """Path -> bytes of the files that a path or glob stands for; a folder: those in it with `suffix`."""
    if is_remote(pattern):
        pattern = pattern if pattern.endswith(suffix) else f"{pattern.rstrip('/')}/*{suffix}"
        details = remote_files().glob(pattern, detail=True)
        return {f"s3://{path}": int(info["size"]) for path, info in details.items()}
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), f"*{suffix}")
    return {
        path: os.path.getsize(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)
    }


def files_below(folder: str) -> dict[str, int]:
    """Path relative to the folder -> bytes, of all files below it, sorted by path."""
    if is_remote(folder):
        root = folder.removeprefix("s3://").rstrip("/") + "/"
        found = remote_files().find(folder, detail=True)
        return {path.removeprefix(root): int(info["size"]) for path, info in sorted(found.items())}
    sizes = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            # A link may lead anywhere: only what really lies in the folder is its content.
            if os.path.isfile(path) and not os.path.islink(path):
                sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
    return dict(sorted(sizes.items()))


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return bool(remote_files().exists(path)) if is_remote(path) else os.path.exists(path)


def is_remote(path: str) -> bool:
    """Whether a path is an `s3://` address."""
    return path.startswith("s3://")


def remote_files() -> Any:
    """The S3 file system; made anew in each process, since it does not survive a fork."""
    import fsspec

    return fsspec.filesystem("s3")
