"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from foundation.errors import RecipeError
from foundation.partials import partial_path


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; on success it replaces ``path``, on failure it is removed.

    ``mode`` is "w" (text, UTF-8) or "wb". The data and the folder entry are on disk when the block has ended.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique to the writer, so that two processes with the same target don't write into one file.
    temporary = partial_path(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_folder(folder: str | Path) -> None:
    """Make the folder's entries durable (a rename is only safe once its folder is)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit_folder(partial: str | Path, final: str | Path) -> None:
    """Make everything under ``partial`` durable, then rename it to ``final``, which may be an empty folder.

    Raises:
        FileExistsError: ``final`` exists already; ``partial`` is left as it is.
    """
    partial, final = Path(partial), Path(final)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise FileExistsError(f"{final} exists already")
    for root, _, names in os.walk(partial):
        for name in names:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_folder(root)
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # another's has appeared since we looked
            raise
        raise FileExistsError(f"{final} exists already") from None
    fsync_folder(final.parent)


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's content, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_locked(path: str | Path, mode: str, operation: int) -> IO[str]:
    """Open a file that is a lock, and hold it for as long as the file is open.

    Args:
        operation: of flock(2).

    Raises:
        FileNotFoundError: there is none, and ``mode`` makes none.
        BlockingIOError: ``operation`` does not wait, and another process holds it.
        RecipeError: it cannot be made, or its file system knows no locks.
    """
    try:
        file: IO[str] = open(path, mode)  # noqa: SIM115  (the caller closes it)
        try:
            fcntl.flock(file, operation)
        except OSError:
            file.close()
            raise
    except (FileNotFoundError, BlockingIOError):
        raise
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be locked ({error.strerror}): name a folder that can be written to, on a file "
            "system with locks"
        ) from None
    return file
