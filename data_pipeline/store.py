"""Where a dataset lies: a folder, or a prefix of an object store, with the same few operations.

A file appears whole or not at all: by a rename in a folder; by the nature of a PUT on S3. A *group* of files
appears by one rename in a folder. S3 renames nothing, so there the group's last file, the marker that
readers look for, is uploaded after all others; a group without its marker does not count and is made anew.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.ingest.storage import is_remote, reaching, remote_files
from foundation.errors import DataError, ExitCode, UserError
from foundation.files import atomic_write, commit_folder
from foundation.partials import PARTIAL_SUFFIX, final_of, partial_path

NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class PlaceUnusable(UserError):
    """The disk is full, or the place cannot be written."""

    exit_code = ExitCode.RECIPE


@contextmanager
def writing_to(place: str | Path) -> Iterator[None]:
    """Turns what a full or write-protected disk raises into PlaceUnusable.

    Args:
        place: where the work goes, for an error that does not name its file.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number_by_rust(error)
        if number not in NO_PLACE:
            raise
        # A copy that fails names its source first, and where it was to go second.
        file = getattr(error, "filename2", None) or getattr(error, "filename", None)
        where = final_of(os.fsdecode(file)) if file else place
        raise PlaceUnusable(
            f"{where}: {os.strerror(number)}; what is done stays done. Make room or "
            "give rights there (see also TMPDIR), and the same command goes on"
        ) from None


def not_readable(error: OSError) -> str:
    """What is said of a file that is there, and that its disk does not give."""
    return f"cannot be read: {error.strerror}"


def _number_by_rust(error: Exception) -> int | None:
    """Libraries in Rust (tokenizers, safetensors) raise no OSError, but name its number at the end."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


class Store(ABC):
    """Files by their name, a path relative to the root with `/` between its parts."""

    root: str

    def address(self, name: str) -> str:
        """The file's path or `s3://` address."""
        return f"{self.root}/{name}"

    @abstractmethod
    def read_many(self, names: Sequence[str], unreadable: dict[str, str] | None = None) -> dict[str, bytes]:
        """Content of those of the files that exist.

        Args:
            names: of the files.
            unreadable: gets name -> reason of files that their disk does not give.

        Raises:
            DataError: there is such a file, and no `unreadable`.
        """

    def read(self, name: str) -> bytes | None:
        """A file's content; None where it does not exist."""
        return self.read_many([name]).get(name)

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""

    @abstractmethod
    def files(self, prefix: str = "") -> dict[str, tuple[int, float]]:
        """Name -> bytes and time of the last change (seconds since 1970), of all files below a folder."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Remove files, as far as they exist."""

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """A new local folder to make something in; it may be given to `commit`."""

    @abstractmethod
    def commit(self, made: Path, name: str, last: str | None = None) -> None:
        """Make a local folder's files appear as the folder `name`.

        Args:
            made: a scratch folder; the caller removes what is left of it.
            name: of the new folder.
            last: its marker, relative to it.

        Raises:
            FileExistsError: it is there already, whole.
        """

    @abstractmethod
    def local(self, name: str) -> Path:
        """A local path of a file or folder: itself, or a copy that is kept until the process ends."""


class FolderStore(Store):
    """A local folder."""

    def __init__(self, root: str | Path):
        self.path = Path(root)
        self.root = str(root)

    def read_many(self, names: Sequence[str], unreadable: dict[str, str] | None = None) -> dict[str, bytes]:
        found = {}
        for name in names:
            try:
                found[name] = (self.path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                reason = not_readable(error)
                if unreadable is None:
                    raise DataError(f"{self.address(name)} {reason}; look at its disk") from error
                unreadable[name] = reason
        return found

    def write(self, name: str, data: bytes) -> None:
        with atomic_write(self.path / name, "wb") as file:
            file.write(data)

    def files(self, prefix: str = "") -> dict[str, tuple[int, float]]:
        found = {}
        for folder, _, names in os.walk(self.path / prefix):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    state = os.stat(path)
                except FileNotFoundError:  # gone meanwhile
                    continue
                found[os.path.relpath(path, self.path)] = (state.st_size, state.st_mtime)
        return found

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # there are other files
            self.path.rmdir()  # as on S3, where nothing is left of a folder without files

    def scratch(self, name: str) -> Path:
        # Beside its final place, so that a rename can commit it.
        folder = partial_path(self.path / name)
        folder.mkdir(parents=True)
        return folder

    def commit(self, made: Path, name: str, last: str | None = None) -> None:
        commit_folder(made, self.path / name)

    def local(self, name: str) -> Path:
        return self.path / name


class S3Store(Store):
    """A prefix on S3. Its client asks again where the server fails or is gone for a while."""

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    @property
    def _client(self) -> Any:
        return remote_files(listings_cached=False)

    def read_many(self, names: Sequence[str], unreadable: dict[str, str] | None = None) -> dict[str, bytes]:
        with reaching(self.root):
            keys = {self.address(name).removeprefix("s3://"): name for name in names}
            found = self._client.cat(list(keys), on_error="return", recursive=False) if keys else {}
            # One path alone comes back as bytes, or raises, in some versions; as a mapping here always.
            contents = found if isinstance(found, dict) else dict.fromkeys(keys, found)
            for content in contents.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        return {keys[key]: data for key, data in contents.items() if isinstance(data, bytes)}

    def write(self, name: str, data: bytes) -> None:
        with reaching(self.root):
            self._client.pipe_file(self.address(name), data)

    def files(self, prefix: str = "") -> dict[str, tuple[int, float]]:
        with reaching(self.root):
            found = self._client.find(self.address(prefix).rstrip("/") + "/", detail=True)
        start = len(self.root.removeprefix("s3://")) + 1
        return {
            path[start:]: (int(info["size"]), info["LastModified"].timestamp())
            for path, info in sorted(found.items())
        }

    def remove(self, names: Sequence[str]) -> None:
        with reaching(self.root):
            if names:
                self._client.rm([self.address(name) for name in names])

    def scratch(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"bitdance-{Path(name).name}-", suffix=PARTIAL_SUFFIX))

    def commit(self, made: Path, name: str, last: str | None = None) -> None:
        if last is not None and self.read(f"{name}/{last}") is not None:
            raise FileExistsError(f"{self.address(name)} exists already")
        paths = sorted(path for path in made.rglob("*") if path.is_file())
        final = [path for path in paths if last is not None and path == made / last]
        others = [path for path in paths if path not in final]
        for group in (others, final):
            if group:
                with reaching(self.root):
                    targets = [self.address(f"{name}/{path.relative_to(made)}") for path in group]
                    self._client.put([str(path) for path in group], targets)

    def local(self, name: str) -> Path:
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix="bitdance-")
        target = Path(self._copies.name) / name
        names = [name] if not (below := self.files(name)) else list(below)
        for each in names:
            path = Path(self._copies.name) / each
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with reaching(self.root):
                    self._client.get_file(self.address(each), str(path))
        return target


def open_store(root: str | Path) -> Store:
    """The store at a folder or an `s3://` address."""
    return S3Store(str(root)) if is_remote(str(root)) else FolderStore(root)


def remove_scratch(folder: Path) -> None:
    """Remove what is left of a scratch folder."""
    shutil.rmtree(folder, ignore_errors=True)
